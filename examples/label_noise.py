"""What do wrong labels cost? Train with a share of the labels replaced, and test on clean ones.

    OMP_NUM_THREADS=1 python examples/label_noise.py    # 2 minutes; no threads for so narrow a net
    python examples/label_noise.py --dataset cifar10 --full --epochs 24 --runs 5    # on a GPU

Each line has the accuracy on clean test images beside that on the noisy, augmented training images, with the weights of
each step meanwhile. A network that learns the classes and not the wrong labels can reach at most the share of right
labels on the second; what is above that share has been learnt by heart. The wrong labels are the same in all runs.
"""

import argparse
import statistics

from cifar_fast import Recipe, fit, load_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy on clean images after training on noisy labels.")
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.2, 0.4, 0.6], help="of wrong labels")
    parser.add_argument("--images", type=int, default=10_000, help="train on so many; 0: all (default: 10,000)")
    parser.add_argument("--full", action="store_true", help="the published network, batch size and number of images")
    args = parser.parse_args()

    dataset = load_dataset(args.dataset)
    for share in args.shares:
        recipe = Recipe(epochs=args.epochs, label_noise=share)
        if not args.full:
            small = dict(batch_size=32, widths=(6, 12, 12, 24), train_subset=args.images)
            recipe = Recipe(epochs=args.epochs, label_noise=share, **small)
        result = fit(recipe, dataset, runs=args.runs, log=None)
        last = [row for row in result.rows if row.epoch == recipe.epochs]
        test, train = (
            statistics.fmean(getattr(row, f"{split}_accuracy") for row in last) for split in ("test", "train")
        )
        print(f"{100 * share:.0f} % of the labels wrong: test accuracy {test:.2f} %, on the noisy labels {train:.2f} %")


if __name__ == "__main__":
    main()
