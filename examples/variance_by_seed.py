"""Why do two runs differ? Vary one source of random numbers at a time, and hold the others.

    OMP_NUM_THREADS=1 python examples/variance_by_seed.py    # 3 minutes; no threads for so narrow a net
    python examples/variance_by_seed.py --dataset cifar10 --full --epochs 24 --runs 20    # on a GPU

Each line has the standard deviation of the test accuracy where only the initial weights, only the order of the images
or only their augmentation change from run to run; the last, where all three do. Were the sources to add up
independently, the squares of the first three would sum to that of the last. A deviation of few runs is a rough one: of
4, its own error is about 40 %, of 20 about 16 %.
"""

import argparse
import statistics

from cifar_fast import Recipe, fit, load_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description="The accuracy's deviation by the source of random numbers.")
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--runs", type=int, default=4, help="of each source, two or more (default: 4)")
    parser.add_argument("--images", type=int, default=10_000, help="train on so many; 0: all (default: 10,000)")
    parser.add_argument("--full", action="store_true", help="the published network, batch size and number of images")
    args = parser.parse_args()
    if args.runs < 2:
        parser.error("a deviation needs --runs 2 or more")

    recipe = Recipe(epochs=args.epochs)
    if not args.full:
        recipe = Recipe(epochs=args.epochs, batch_size=32, widths=(6, 12, 12, 24), train_subset=args.images)
    dataset = load_dataset(args.dataset)
    sources = ("init_seed", "order_seed", "augment_seed")
    for varied in (*sources, "all three"):
        # A seed that is given is the same in all runs; the others are seed + i in run i.
        held = {source: 0 for source in sources if source != varied and varied in sources}
        result = fit(recipe, dataset, runs=args.runs, log=None, **held)
        accuracies = [run.test_accuracy for run in result.runs]
        mean, deviation = statistics.fmean(accuracies), statistics.stdev(accuracies)
        print(f"{varied} varied: standard deviation {deviation:.2f} %, mean {mean:.2f} %, n = {args.runs}")


if __name__ == "__main__":
    main()
