"""Estimate the accuracy of a recipe by the mean of several runs, with a 95 % confidence interval.

    OMP_NUM_THREADS=1 python examples/mean_of_runs.py    # a minute; one thread is faster for a narrow network
    python examples/mean_of_runs.py --dataset cifar10 --full --epochs 24 --runs 40    # as published; on a GPU

It prints the mean so far after each run, with Student's 95 % interval. This shows how many runs a result needs before
you quote it. The interval shrinks with the square root of the number of runs: half the width takes four times the runs.
"""

import argparse
import statistics

from cifar_fast import Recipe, confidence_interval_95, fit, load_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the mean accuracy of several runs with its 95 % interval.")
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--images", type=int, default=10_000, help="training images; 0: all (default: 10,000)")
    parser.add_argument("--full", action="store_true", help="the published network, batch size and number of images")
    args = parser.parse_args()

    recipe = Recipe(epochs=args.epochs)
    if not args.full:
        recipe = Recipe(epochs=args.epochs, batch_size=32, widths=(6, 12, 12, 24), train_subset=args.images)
    result = fit(recipe, load_dataset(args.dataset), runs=args.runs, log=None)

    accuracies = [run.test_accuracy for run in result.runs]
    for n in range(1, len(accuracies) + 1):
        line = f"run {n}: {accuracies[n - 1]:.2f} %, mean so far {statistics.fmean(accuracies[:n]):.2f} %"
        if interval := confidence_interval_95(accuracies[:n]):
            line += f", 95 % interval {interval[0]:.2f} to {interval[1]:.2f}"
        print(line)
    if len(accuracies) > 1:
        print(f"the runs' standard deviation is {statistics.stdev(accuracies):.2f} %")
    for run in result.diverged:
        print(f"not counted: the run with seed {run.seed} diverged at step {run.step}")


if __name__ == "__main__":
    main()
