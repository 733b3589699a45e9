"""The command ``cifar-fast report``."""

from __future__ import annotations

import argparse

from cifar_fast.cli.flags import (
    add_traceback_flag,
    command_parser,
    print_error,
    print_line,
    print_to_stderr,
    run_command,
)
from cifar_fast.utils.errors import option, plain
from cifar_fast.utils.files import check_writable, expand_home

SUMMARY = "compare trainings: means, confidence intervals, differences"


def main(argv: list[str] | None = None) -> int:
    """Run ``cifar-fast report`` and return the exit code."""
    return run_command(lambda: run(make_parser().parse_args(argv)), argv)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    parser = command_parser("report", SUMMARY)
    parser.add_argument(
        "folders", metavar="DIR", nargs="+", help="folder of a training, or of a sweep for all its variants"
    )
    parser.add_argument("--baseline", metavar="NAME", help="variant to compare the others with (default: the first)")
    parser.add_argument(
        "--metric",
        metavar="NAME",
        help="test_accuracy, validation_accuracy, train_accuracy, test_loss, validation_loss, train_loss, or the name "
        "of a test set of --also-test (default: validation_accuracy if all trainings have a --validation, else "
        "test_accuracy)",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="also write report.md, report.json, report-variants.png and report-curves.png to this folder",
    )
    add_traceback_flag(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the report, write its files, and return the exit code: 1 if a result cannot be read."""
    from cifar_fast.experiments.report import make_report, read_results, welch

    welch()  # raises before the reading if scipy is not installed
    if args.output:
        check_writable(expand_home(args.output), f"{option('output')} {args.output}")
    found = read_results(args.folders)
    left_out = [*found.unfinished, *map(plain, found.unreadable)]
    report = make_report(found.results, baseline=args.baseline, metric=args.metric, left_out=left_out)
    for line in (*found.repeated, *found.unfinished):
        print_to_stderr(line)
    for line in found.unreadable:
        print_error(line)
    print_line(report.markdown().rstrip())
    if args.output:
        report.write(args.output)
    return 1 if found.unreadable else 0
