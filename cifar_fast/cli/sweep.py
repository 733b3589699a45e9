"""``cifar-fast sweep``: train variants of the recipe in turn."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING

from cifar_fast.cli.flags import (
    READER_GONE,
    add_traceback_flag,
    command_parser,
    interruptible,
    joined,
    print_error,
    print_line,
    print_to_stderr,
    run_command,
)
from cifar_fast.utils.distributed import World
from cifar_fast.utils.errors import plain
from cifar_fast.utils.progress import LOGGER
from cifar_fast.utils.provenance import command_line

if TYPE_CHECKING:
    from cifar_fast.experiments.sweep import Sweep

SUMMARY = "train the variants of the recipe that a file describes, one after another, or resume them"


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code: 1 if a run diverged or failed or a file is missing, 2 for bad input."""
    return run_command(lambda: run(argv), argv, flags=False, shared=True)


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("sweep", SUMMARY)
    parser.add_argument("spec", metavar="SPEC", help="TOML file with the variants, see docs/experiments.md")
    parser.add_argument("--dry-run", action="store_true", help="list the variants and the state of each run, and stop")
    add_traceback_flag(parser)
    return parser


def run(argv: list[str] | None) -> int:
    """Check everything that needs neither the other processes nor the data, and then train."""
    args = make_parser().parse_args(argv)

    from cifar_fast.experiments.sweep import Sweep, dry_run

    sweep = Sweep.load(args.spec)
    if args.dry_run:
        for line in dry_run(sweep):
            print_line(line)
        return 0
    with joined() as world:
        return train_in(world, args, sweep)


def train_in(world: World, args: argparse.Namespace, sweep: Sweep) -> int:
    """Train the sweep with the processes of ``world``."""
    with world.all_or_none():
        from cifar_fast.backends.select import resolve_backend
        from cifar_fast.experiments.sweep import train_sweep
        from cifar_fast.utils.device import tune_malloc

        on_cpu = resolve_backend(sweep.backend, sweep.device, sweep.dtype, sweep.memory_format).device.type == "cpu"
    if on_cpu:
        tune_malloc()
    failed: dict[str, str] = {}
    with interruptible(quiet=world.rank > 0) as on_step:
        try:
            results = train_sweep(sweep, world, on_step, failed, command_line("sweep", [args.spec]))
        except (KeyboardInterrupt, SystemExit) as stop:
            resume = f"to resume: {shlex.join(['cifar-fast', 'sweep', args.spec])}"
            if isinstance(stop, SystemExit):
                print_to_stderr(f"{READER_GONE}; {resume}")
                raise
            raise KeyboardInterrupt(f"interrupted; {resume}") from None
    if world.rank:
        return 0
    problems = [f"{name}: {message}" for name, message in failed.items()]
    problems += [f"{name}: {plain(line)}" for name, result in results.items() for line in result.problems()]
    for line in problems:
        print_error(line)
    LOGGER.info(f"written to {sweep.output}; to see it: {shlex.join(['cifar-fast', 'report', sweep.output])}")
    return 1 if problems else 0
