"""``cifar-fast check``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from cifar_fast.cli.flags import (
    Parser,
    add_device_flags,
    check_json,
    interpret_without_gpu,
    run_command,
    sentence,
)
from cifar_fast.recipe import Recipe
from cifar_fast.utils.errors import InputError

SUMMARY = "tell whether all that training needs works on this machine, in two minutes"


def main(argv: list[str] | None = None) -> int:
    """``cifar-fast check``; gives 0, 1 where something that ``auto`` needs does not work, 2 for bad input."""
    return run_command(lambda: run(make_parser().parse_args(argv)), argv)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="cifar-fast check", description=sentence(SUMMARY))
    add_device_flags(parser)
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="images per step (default: 64 on a GPU, 8 on a CPU)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the lines there")
    return parser


def run(args: argparse.Namespace) -> int:
    check_json(args.json)

    interpret_without_gpu(args.device)

    from cifar_fast.backends.select import resolve_backend
    from cifar_fast.diagnostics.check import BATCH_SIZE, SMALLEST, Check
    from cifar_fast.training.fit import check
    from cifar_fast.utils.device import tune_malloc
    from cifar_fast.utils.seeds import Seeds

    plan, reference = (resolve_backend(backend, args.device, args.dtype) for backend in ("auto", "eager"))
    check(plan, Seeds())
    size = BATCH_SIZE[plan.device.type] if args.batch_size is None else args.batch_size
    if size < SMALLEST:
        raise InputError(f"--batch-size must be at least {SMALLEST} for a check, not {size}")
    if plan.device.type == "cpu":
        tune_malloc()
    recipe = Recipe(batch_size=size)
    if plan.device.type == "cpu":  # where no kernel is compiled for these widths
        recipe = dataclasses.replace(recipe, widths=tuple(width // 4 for width in recipe.widths))
    found = Check(plan, reference, recipe)
    found.run()
    if args.json:
        found.write(args.json)
    return 0 if found.fine else 1
