"""The command ``cifar-fast export``."""

from __future__ import annotations

import argparse

from cifar_fast.cli.flags import add_traceback_flag, command_parser, print_line, run_command

SUMMARY = "write a trained network for other programs: safetensors, torch.export, ONNX"


def main(argv: list[str] | None = None) -> int:
    """Run ``cifar-fast export``. Return 0, or 2 for bad input."""
    return run_command(lambda: run(make_parser().parse_args(argv)), argv)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    parser = command_parser("export", SUMMARY)
    parser.add_argument("model", metavar="MODEL", help="model.pt of a training, or the folder of the training")
    parser.add_argument(
        "--output",
        metavar="FILE",
        required=True,
        help="the file to write, which is replaced if it is there; it ends in .safetensors, .pt2 or .onnx",
    )
    parser.add_argument(
        "--to",
        choices=("safetensors", "torch-export", "onnx"),
        help="safetensors: the weights, by the names of model.pt; torch-export, onnx: the network with its "
        "normalization, from uint8 images of shape [N, 32, 32, 3] to logits [N, classes], for any N "
        "(default: the format of FILE's suffix)",
    )
    add_traceback_flag(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the file and return the exit code."""
    from cifar_fast.inference.classifier import load_model
    from cifar_fast.inference.export import export_model, format_of
    from cifar_fast.utils.files import as_path

    path = as_path(args.output, "output")
    to = format_of(path, args.to)
    export_model(load_model(args.model), path, to)
    takes = "" if to == "safetensors" else "; it takes images, uint8 [N, 32, 32, 3], and gives logits"
    print_line(f"written to {path}{takes}")
    return 0
