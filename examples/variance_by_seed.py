"""Find out why two runs differ: vary one source of random numbers at a time, and keep the others fixed.

    OMP_NUM_THREADS=1 python examples/variance_by_seed.py    # 3 minutes; one thread is faster for a narrow network
    python examples/variance_by_seed.py --dataset cifar10 --full --epochs 24 --runs 20    # on a GPU

Each of the first three lines varies one source between runs: the initial weights, the order of the images, or their
augmentation. It shows the standard deviation of the test accuracy. The last line varies all three. If the sources added
up independently, the first three variances would sum to the last. Few runs give a rough estimate: the relative error of
the standard deviation is about 40 % for 4 runs and 16 % for 20.
"""

import argparse
import statistics
from typing import Any

from cifar_fast import Recipe, fit, load_dataset


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Print the standard deviation of the accuracy by source of random numbers."
    )
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--runs", type=int, default=4, help="per source, at least 2 (default: 4)")
    parser.add_argument("--images", type=int, default=10_000, help="training images; 0: all (default: 10,000)")
    parser.add_argument("--full", action="store_true", help="the published network, batch size and number of images")
    args = parser.parse_args()
    if args.runs < 2:
        parser.error("a standard deviation needs --runs 2 or more")

    recipe = Recipe(epochs=args.epochs)
    if not args.full:
        recipe = Recipe(epochs=args.epochs, batch_size=32, widths=(6, 12, 12, 24), train_subset=args.images)
    dataset = load_dataset(args.dataset)
    sources = ("init_seed", "order_seed", "augment_seed")
    for varied in (*sources, "all three"):
        # A seed given here is the same in all runs. The others are seed + i in run i.
        fixed: dict[str, Any] = {source: 0 for source in sources if varied in sources and source != varied}
        result = fit(recipe, dataset, runs=args.runs, log=None, **fixed)
        accuracies = [run.test_accuracy for run in result.runs]
        n, mean = len(accuracies), statistics.fmean(accuracies)
        std = f"{statistics.stdev(accuracies):.2f} %" if n > 1 else "-"  # runs may have diverged
        print(f"{varied} varied: standard deviation {std}, mean {mean:.2f} %, n = {n}")


if __name__ == "__main__":
    main()
