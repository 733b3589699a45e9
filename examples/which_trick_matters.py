"""Find out which part of the recipe matters: remove one trick of the published text at a time.

    OMP_NUM_THREADS=1 python examples/which_trick_matters.py    # 4 minutes; one thread is faster for a narrow network
    python examples/which_trick_matters.py --dataset cifar10 --full --epochs 24 --runs 10    # on a GPU

The text calls batch normalization, augmentation, the warm-up and the output scale important, and finds residual
connections unnecessary. The table shows how much accuracy each removal costs, with a 95 % interval. A difference is not
significant if its interval contains 0. The default trains for a few steps on easy textures, so its answers may differ
from those for CIFAR-10 at full length, which the published text is about.
"""

import argparse
import dataclasses
import tempfile
from typing import Any

from cifar_fast import Recipe, Sweep, fit_sweep, make_report, welch


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the accuracy lost without each part of the recipe.")
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--images", type=int, default=10_000, help="training images; 0: all (default: 10,000)")
    parser.add_argument("--full", action="store_true", help="the published network, batch size and number of images")
    parser.add_argument("--output", help="folder to keep the results in, and to resume from (default: none)")
    args = parser.parse_args()
    welch()  # raises now, not after the training, if scipy is not installed

    recipe = Recipe(epochs=args.epochs)
    if not args.full:
        recipe = Recipe(epochs=args.epochs, batch_size=32, widths=(6, 12, 12, 24), train_subset=args.images)
    tricks: dict[str, dict[str, Any]] = {
        "as-published": {},
        "no-batch-norm": dict(batch_norm=False),
        "no-augmentation": dict(crop_padding=0, flip=False, cutout_size=0),
        "no-warm-up": dict(lr_knots=(0, 5), lr_values=(0.6, 0)),
        "output-not-scaled": dict(output_scale=1.0),
        "no-label-smoothing": dict(label_smoothing=0.0),
        "residual-added": dict(residual=True),
    }
    variants = {name: dataclasses.replace(recipe, **changes) for name, changes in tricks.items()}
    with tempfile.TemporaryDirectory() as folder:
        sweep = Sweep(variants, output=args.output or folder, dataset=args.dataset, runs=args.runs)
        results = fit_sweep(sweep, log=None)
    print(make_report(results, baseline="as-published").markdown())  # names runs that diverged


if __name__ == "__main__":
    main()
