"""Measure the cost of wrong labels: train with a fraction of the labels replaced, and test on clean images.

    OMP_NUM_THREADS=1 python examples/label_noise.py    # 2 minutes; one thread is faster for a narrow network
    python examples/label_noise.py --dataset cifar10 --full --epochs 24 --runs 5    # on a GPU

Each line shows two accuracies: on clean test images, and on the noisy, augmented training images during the last epoch.
A network that learns the classes but not the wrong labels scores at most the fraction of correct labels on the second.
A higher value shows that it has memorized wrong labels. The same labels are wrong in every run.
"""

import argparse
import dataclasses
import statistics

from cifar_fast import Recipe, fit, load_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy on clean images after training on noisy labels.")
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.0, 0.2, 0.4, 0.6], help="of wrong labels")
    parser.add_argument("--images", type=int, default=10_000, help="training images; 0: all (default: 10,000)")
    parser.add_argument("--full", action="store_true", help="the published network, batch size and number of images")
    args = parser.parse_args()

    dataset = load_dataset(args.dataset)
    recipe = Recipe(epochs=args.epochs)
    if not args.full:
        recipe = Recipe(epochs=args.epochs, batch_size=32, widths=(6, 12, 12, 24), train_subset=args.images)
    for fraction in args.fractions:
        result = fit(dataclasses.replace(recipe, label_noise=fraction), dataset, runs=args.runs, log=None)
        last = [row for row in result.rows if row.epoch == recipe.epochs]
        test = statistics.fmean(row.test_accuracy for row in last)
        train = statistics.fmean(row.train_accuracy for row in last)
        print(f"{100 * fraction:.0f} % wrong labels: test accuracy {test:.2f} %, on the noisy labels {train:.2f} %")


if __name__ == "__main__":
    main()
