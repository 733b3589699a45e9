"""The command ``cifar-fast predict``."""

from __future__ import annotations

import argparse
from pathlib import Path

from cifar_fast.cli.flags import add_device_flags, check_json, command_parser, print_error, print_line, run_command
from cifar_fast.utils.errors import InputError, visible, with_flags

SUMMARY = "classify images with a trained network: one line per image, with class and probability"


def main(argv: list[str] | None = None) -> int:
    """Run ``cifar-fast predict``. Return 0; 1 if a file or an image could not be read; 2 for bad input."""
    return run_command(lambda: run(make_parser().parse_args(argv)), argv)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    parser = command_parser("predict", SUMMARY)
    parser.add_argument(
        "model", metavar="MODEL", help="model.pt of a training, its safetensors export, or the folder of the training"
    )
    parser.add_argument(
        "images",
        metavar="IMAGES",
        nargs="+",
        help="image files, folders of them with subfolders, or .npz, .npy and SVHN's .mat files with images; the last "
        "line shows the accuracy if these files have labels or folders are named after the classes",
    )
    parser.add_argument("--top", type=int, default=1, metavar="K", help="show the K most probable classes (default: 1)")
    parser.add_argument("--flip-average", action="store_true", help="average the logits of each image and its mirror")
    parser.add_argument("--batch-size", type=int, default=512, metavar="N", help="images per batch (default: 512)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the predictions to this file")
    add_device_flags(parser, dtype=False)
    return parser


def run(args: argparse.Namespace) -> int:
    """Classify the images and return the exit code."""
    check_json(args.json)
    if args.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, not {args.batch_size}")

    from cifar_fast.backends.select import resolve_backend
    from cifar_fast.data.images import tell_resized
    from cifar_fast.inference.classifier import load_model
    from cifar_fast.inference.predict import Prediction, accuracy, classify, find_images, write_predictions
    from cifar_fast.utils.errors import oom_hint

    device = resolve_backend("eager", args.device, "float32").device
    model = load_model(args.model).to(device)
    names = model.class_names
    if not 1 <= args.top <= len(names):
        raise InputError(f"--top must be from 1 to {len(names)}, the number of classes, not {args.top}")
    unreadable: dict[str, str] = {}

    def on_unreadable(image: object, reason: str) -> None:
        unreadable[str(image)] = with_flags(reason)
        print_error(reason)

    images = find_images(args.images, model, on_unreadable)
    predictions: list[Prediction] = []
    size, flip = args.batch_size, args.flip_average
    with oom_hint(f"in prediction at --batch-size {size}", "try a smaller one"):
        for prediction in classify(model, images, batch_size=size, flip_average=flip, on_unreadable=on_unreadable):
            predictions.append(prediction)
            best = prediction.probabilities.topk(args.top)
            classes = (f"{names[i]} {100 * p:.2f} %" for p, i in zip(best.values.tolist(), best.indices.tolist()))
            print_line(visible("  ".join((str(prediction.image), *classes))))
    if args.json:
        write_predictions(args.json, names, predictions, unreadable, top=args.top, flip_average=flip)
    tell_resized(sum(prediction.resized for prediction in predictions), len(predictions))
    if flip:
        print_line("--flip-average: each image was averaged with its mirror")
    if (percent := accuracy(predictions)) is not None:
        labeled = sum(prediction.image.label is not None for prediction in predictions)
        print_line(f"accuracy {percent:.2f} % of {labeled} images with a known class")
    return 1 if unreadable else 0
