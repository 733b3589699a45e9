"""``cifar-fast sweep``."""

from __future__ import annotations

import argparse
import shlex
import sys

from cifar_fast.cli.flags import (
    Parser,
    add_traceback_flag,
    interruptible,
    run_command,
    sentence,
)
from cifar_fast.utils.distributed import World
from cifar_fast.utils.progress import LOGGER

SUMMARY = "train several variants of the recipe in turn, as a file states them, or go on with them"


def main(argv: list[str] | None = None) -> int:
    """``cifar-fast sweep``; gives 0, 1 where a variant diverged or a file could not be written, 2 for bad input."""
    return run_command(lambda: run(argv), argv)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="cifar-fast sweep", description=sentence(SUMMARY))
    parser.add_argument("spec", metavar="SPEC", help="TOML file that states the variants, see docs/experiments.md")
    parser.add_argument("--dry-run", action="store_true", help="list the variants, and where each run stands, and stop")
    add_traceback_flag(parser)
    return parser


def run(argv: list[str] | None) -> int:
    with World.stated().joined() as world:
        return run_in(world, argv)


def run_in(world: World, argv: list[str] | None) -> int:
    with world.together():
        args = make_parser().parse_args(argv)

        from cifar_fast.experiments.sweep import Sweep, fit_sweep, outline, plan_of
        from cifar_fast.utils.device import tune_malloc

        wanted = Sweep.load(args.spec)
        if args.dry_run:
            for line in outline(wanted):
                LOGGER.info(line)
            return 0
        on_cpu = plan_of(wanted).device.type == "cpu"
    if on_cpu:
        tune_malloc()
    with interruptible() as on_step:
        try:
            results = fit_sweep(wanted, world=world, on_step=on_step)
        except KeyboardInterrupt:
            go_on = shlex.join(["cifar-fast", "sweep", args.spec])
            raise KeyboardInterrupt(f"interrupted; to go on: {go_on}") from None
    if world.rank:
        return 0
    unwritten = [line for result in results.values() for line in result.unwritten]
    for line in unwritten:
        print(f"error: {line}", file=sys.stderr)
    LOGGER.info(f"written to {wanted.output}; to see it: {shlex.join(['cifar-fast', 'report', wanted.output])}")
    return 1 if unwritten or len(results) < len(wanted.variants) else 0
