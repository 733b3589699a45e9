"""Train from Python and read the result: rows of epochs, runs, the summary, the weights.

    python examples/train_and_read_result.py            # the embedded data set, a narrow network: a minute on two cores
    python examples/train_and_read_result.py --small    # a few seconds

It prints a line per epoch, the summary, and a prediction for one test image.
"""

import argparse
import dataclasses

import torch

from cifar_fast import CNN, Dataset, Recipe, fit, load_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description="Train from Python and read the result.")
    parser.add_argument("--small", action="store_true", help="few images, and a narrower network")
    args = parser.parse_args()

    # A recipe is data: each constant is a field, and a field that is not given keeps the reference's value.
    recipe = Recipe(epochs=4, batch_size=128, widths=(16, 32, 32, 32, 64, 128, 128, 128))
    dataset = load_dataset("synthetic")
    if args.small:
        recipe = dataclasses.replace(recipe, epochs=3, batch_size=32, widths=(8, 16, 16, 32))
        dataset = head(dataset, train=640, test=200)

    result = fit(recipe, dataset, runs=2, seed=0, log=None)  # output="runs/mine" writes the files too

    for row in result.rows:
        print(f"run {row.run}, epoch {row.epoch}: loss {row.train_loss:.3f}, test accuracy {row.test_accuracy:.2f} %")
    summary = result.summary()
    low, high = summary["test_accuracy_ci95"]
    print(f"{result.backend}, {result.dtype}: mean {summary['test_accuracy_mean']:.2f} % ({low:.2f} to {high:.2f})")
    print(f"median training time {summary['train_seconds_median']:.2f} s")

    # The weights fit the plain model, whichever backend trained them.
    model = CNN(recipe, dataset.num_classes)
    model.load_state_dict(result.state_dict)
    model.eval()
    image = torch.from_numpy(dataset.test_images[:1]).permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (result.mean, result.std))
    logits = model((image - mean) / std)
    guess = dataset.class_names[int(logits.argmax())]
    print(f"first test image: class {dataset.class_names[dataset.test_labels[0]]!r}, predicted {guess!r}")


def head(dataset: Dataset, train: int, test: int) -> Dataset:
    """Return the first images of ``dataset``."""
    return dataclasses.replace(
        dataset,
        train_images=dataset.train_images[:train],
        train_labels=dataset.train_labels[:train],
        test_images=dataset.test_images[:test],
        test_labels=dataset.test_labels[:test],
    )


if __name__ == "__main__":
    main()
