"""``cifar-fast check``."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path

from cifar_fast.cli.flags import add_device_flags, check_json, command_parser, run_command
from cifar_fast.recipe import Recipe
from cifar_fast.utils.errors import InputError

SUMMARY = "check that everything a training needs works on this machine, in two minutes"


def main(argv: list[str] | None = None) -> int:
    """Run ``cifar-fast check``; return 0, 1 if something that ``auto`` needs does not work, 2 for bad input."""
    return run_command(lambda: run(make_parser().parse_args(argv)), argv)


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("check", SUMMARY)
    add_device_flags(parser)
    batch_size = "images per step (default: 64 on a GPU, 8 on a CPU)"
    parser.add_argument("--batch-size", type=int, metavar="N", help=batch_size)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    return parser


def run(args: argparse.Namespace) -> int:
    check_json(args.json)

    from cifar_fast.diagnostics.check import BATCH_SIZE, MIN_BATCH_SIZE, Check
    from cifar_fast.training.config import TrainConfig
    from cifar_fast.training.fit import settle_backend
    from cifar_fast.utils.device import tune_malloc

    config, reference = (
        settle_backend(TrainConfig(backend=backend, device=args.device, dtype=args.dtype))
        for backend in ("auto", "eager")
    )
    size = BATCH_SIZE[config.device.type] if args.batch_size is None else args.batch_size
    if size < MIN_BATCH_SIZE:
        raise InputError(f"--batch-size must be at least {MIN_BATCH_SIZE} for a check, not {size}")
    training = Recipe()
    recipe = dataclasses.replace(training, batch_size=size)
    if config.device.type == "cpu":
        tune_malloc()
    if os.environ.get("TRITON_INTERPRET") == "1":
        recipe = dataclasses.replace(recipe, widths=tuple(width // 4 for width in recipe.widths))  # it is slow
    check = Check(config, reference, recipe, training)
    check.run()
    if args.json:
        check.write(args.json)
    return 0 if check.passed else 1
