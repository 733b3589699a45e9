"""``cifar-fast compare``."""

from __future__ import annotations

import argparse
from pathlib import Path

from cifar_fast.cli.flags import (
    add_run_flags,
    check_json,
    command_parser,
    config_of,
    data_options_of,
    print_line,
    run_command,
)
from cifar_fast.data.sources import read_dataset
from cifar_fast.utils.errors import InputError

SUMMARY = "run two backends in lockstep and measure how far apart each layer is"


def main(argv: list[str] | None = None) -> int:
    """Run ``cifar-fast compare``; return 0, 1 if a difference exceeds the tolerance, 2 for bad input."""
    return run_command(lambda: run(make_parser().parse_args(argv)), argv)


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("compare", SUMMARY)
    add_run_flags(parser)
    parser.set_defaults(backend="fused")
    group = parser.add_argument_group("the comparison")
    group.add_argument(
        "--against", choices=("eager", "compiled", "fused"), default="eager", help="the other backend (default: eager)"
    )
    group.add_argument("--steps", type=int, default=4, metavar="K", help="steps of training (default: 4)")
    group.add_argument("--drift", action="store_true", help="copy weights and momentum before the first step only")
    group.add_argument(
        "--tolerance",
        type=float,
        default=3.0,
        metavar="X",
        help="allowed multiple of eager's own difference, to which a quarter of the last bit is added (default: 3)",
    )
    group.add_argument("--json", type=Path, metavar="FILE", help="also write every figure to this file")
    return parser


def run(args: argparse.Namespace) -> int:
    recipe = config_of(args).recipe
    if args.steps < 1:
        raise InputError(f"--steps must be at least 1, not {args.steps}")
    if not args.tolerance > 0:
        raise InputError(f"--tolerance must be above 0, not {args.tolerance:g}")
    check_json(args.json)

    from cifar_fast.backends.select import resolve_backend
    from cifar_fast.diagnostics.compare import Comparison, compare, write_report

    first, second = (
        resolve_backend(backend, args.device, args.dtype, args.memory_format)
        for backend in (args.backend, args.against)
    )
    dataset = read_dataset(args.dataset, args.data_dir, args.data_url, data_options_of(args))
    comparison = Comparison(first, second, tolerance=args.tolerance)
    print_line(comparison.heading())
    if "fused" in (*first.backends, *second.backends):
        from cifar_fast.kernels.launch import interpreted

        if interpreted():
            print_line("the kernels run in Triton's interpreter, slowly; narrow --widths and a small --batch-size help")
    for step in compare(recipe, dataset, first, second, seed=args.seed, steps=args.steps, drift=args.drift):
        print_line(comparison.add(step))
    if args.json:
        write_report(args.json, comparison, recipe, dataset, seed=args.seed, drift=args.drift)
    print_line(comparison.verdict())
    return 0 if comparison.within else 1
