"""``cifar-fast report``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cifar_fast.cli.flags import (
    Parser,
    add_traceback_flag,
    print_line,
    run_command,
    sentence,
)
from cifar_fast.utils.files import check_writable

SUMMARY = "set trainings beside each other: means, intervals, differences"


def main(argv: list[str] | None = None) -> int:
    """``cifar-fast report``."""
    return run_command(lambda: run(make_parser().parse_args(argv)), argv)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="cifar-fast report", description=sentence(SUMMARY))
    parser.add_argument(
        "folders", metavar="DIR", nargs="+", help="folder that train --output wrote, or sweep, for all its variants"
    )
    parser.add_argument(
        "--baseline", metavar="NAME", help="the variant that the others differ from (default: the first)"
    )
    parser.add_argument(
        "--metric",
        default="test_accuracy",
        metavar="NAME",
        help="test_accuracy, train_accuracy, train_loss, or the name of a set of --also-test",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder for report.md, report.json, report-variants.png and report-curves.png too",
    )
    add_traceback_flag(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from cifar_fast.experiments.report import make_report, read_results, welch

    welch()
    if args.output:
        check_writable(Path(args.output).expanduser(), f"--output {args.output}")
    results, left_out = read_results(args.folders)
    for line in left_out:
        print(line, file=sys.stderr)
    found = make_report(results, baseline=args.baseline, metric=args.metric)
    if args.output:
        found.write(args.output)
    print_line(found.markdown().rstrip())
    return 0
