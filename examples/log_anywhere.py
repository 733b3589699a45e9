"""Log each epoch to any experiment tracker, here to a CSV file.

    OMP_NUM_THREADS=1 python examples/log_anywhere.py    # seconds; one thread is faster for a narrow network
    python examples/log_anywhere.py --dataset cifar10 --full --epochs 24 --csv epochs.csv    # on a GPU

``fit`` calls ``on_epoch`` with an ``EpochRow`` at the end of each epoch: run, epoch, loss and accuracy in % on training
and test images, and on validation images if there are any, train_seconds and evaluation_seconds. A tracker needs one
line there, with the same ``metrics``:

    mlflow.log_metrics(metrics, step=row.epoch)    # MLflow, after mlflow.start_run()
    wandb.log(metrics)                             # Weights & Biases, after wandb.init()
    run.track(metrics, step=row.epoch)             # Aim, after run = aim.Run()
"""

import argparse
import csv
import dataclasses
from pathlib import Path

from cifar_fast import Recipe, fit, load_dataset
from cifar_fast.training.metrics import EpochRow


def main() -> None:
    parser = argparse.ArgumentParser(description="Log each epoch to a CSV file.")
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--images", type=int, default=2_000, help="training images; 0: all (default: 2,000)")
    parser.add_argument("--full", action="store_true", help="the published network, batch size and number of images")
    parser.add_argument("--csv", type=Path, default=Path("epochs.csv"), help="(default: epochs.csv)")
    args = parser.parse_args()

    recipe = Recipe(epochs=args.epochs)
    if not args.full:
        recipe = Recipe(epochs=args.epochs, batch_size=32, widths=(6, 12, 12, 24), train_subset=args.images)

    with args.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(EpochRow)])
        writer.writeheader()

        def on_epoch(row: EpochRow) -> None:
            metrics = {name: value for name, value in dataclasses.asdict(row).items() if value is not None}
            writer.writerow(metrics)
            file.flush()

        result = fit(recipe, load_dataset(args.dataset), runs=args.runs, on_epoch=on_epoch, log=None)
    print(f"{len(result.rows)} epochs logged to {args.csv}; {result.summary_line()}")


if __name__ == "__main__":
    main()
