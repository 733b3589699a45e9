"""``cifar-fast predict``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cifar_fast.cli.flags import Parser, add_device_flags, check_json, print_line, run_command, sentence
from cifar_fast.utils.errors import InputError

SUMMARY = "tell what a trained network takes images for: a line each, class and probability"


def main(argv: list[str] | None = None) -> int:
    """``cifar-fast predict``; gives 0, 1 where an image could not be decoded, 2 for bad input."""
    return run_command(lambda: run(make_parser().parse_args(argv)), argv)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="cifar-fast predict", description=sentence(SUMMARY))
    parser.add_argument("model", metavar="MODEL", help="model.pt of a training, or the training's folder")
    parser.add_argument(
        "images",
        metavar="IMAGES",
        nargs="+",
        help="image files; folders of them, walked down; .npz files with images, uint8 [N, 32, 32, 3]. With labels, or "
        "folders named as the classes are, the last line tells the accuracy",
    )
    parser.add_argument("--top", type=int, default=1, metavar="K", help="tell the K likeliest classes (default: 1)")
    parser.add_argument("--flip-average", action="store_true", help="average the logits of each image and its mirror")
    parser.add_argument("--batch-size", type=int, default=512, metavar="N", help="images at a time (default: 512)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the predictions there too")
    add_device_flags(parser, dtype=False)
    return parser


def run(args: argparse.Namespace) -> int:
    check_json(args.json)
    if args.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, not {args.batch_size}")

    from cifar_fast.backends.select import resolve_backend
    from cifar_fast.inference.classifier import load_model
    from cifar_fast.inference.predict import HOW_RESIZED, accuracy, find_images, predictions, write_report
    from cifar_fast.training.fit import oom_hint

    device = resolve_backend("eager", args.device, "float32").device
    model = load_model(args.model).to(device)
    names = model.class_names
    if not 1 <= args.top <= len(names):
        raise InputError(f"--top must be from 1 to {len(names)}, the number of classes, not {args.top}")
    images = find_images(args.images, names)
    broken: dict[str, str] = {}

    def on_broken(image: object, reason: str) -> None:
        broken[str(image)] = reason
        print(f"error: {reason}", file=sys.stderr)

    told = []
    size, flip = args.batch_size, args.flip_average
    with oom_hint("prediction", size):
        for one in predictions(model, images, batch_size=size, flip_average=flip, on_broken=on_broken):
            told.append(one)
            best = one.probabilities.topk(args.top)
            classes = (f"{names[i]} {100 * p:.2f} %" for p, i in zip(best.values.tolist(), best.indices.tolist()))
            print_line("  ".join((str(one.image), *classes)))
    if args.json:
        write_report(args.json, names, told, broken, top=args.top, flip_average=args.flip_average)
    if resized := sum(one.resized for one in told):
        print_line(f"resized {resized} of {len(told)} images {HOW_RESIZED}")
    if args.flip_average:
        print_line("--flip-average: each image was averaged with its mirror")
    if (percent := accuracy(told)) is not None:
        labelled = sum(one.image.label is not None for one in told)
        print_line(f"accuracy {percent:.2f} % of {labelled} images whose class is known")
    return 1 if broken else 0
