"""The command ``cifar-fast``, which runs one of the commands of this package."""

from __future__ import annotations

import sys

from cifar_fast import __version__
from cifar_fast.cli import check, compare, export, predict, profile, report, sweep, train
from cifar_fast.utils.errors import did_you_mean

COMMANDS = {
    "train": train,
    "predict": predict,
    "export": export,
    "sweep": sweep,
    "report": report,
    "compare": compare,
    "profile": profile,
    "check": check,
}
"""Each command's module, in the order of --help."""


def main(argv: list[str] | None = None) -> int:
    """Run the command that ``argv`` (default: ``sys.argv``) names; return its exit code, 2 for bad input."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        lines = [f"  {name:9} {module.SUMMARY}" for name, module in COMMANDS.items()]
        end = "\ncifar-fast COMMAND --help lists the flags; --version prints the version."
        print("usage: cifar-fast COMMAND [flags]\n", *lines, end, sep="\n")
        return 0
    if command == "--version":
        print(f"cifar-fast {__version__}")
        return 0
    if command not in COMMANDS:
        hint = did_you_mean(command, COMMANDS)
        print(f"error: there is no command {command!r}; there are {', '.join(COMMANDS)}{hint}", file=sys.stderr)
        return 2
    return COMMANDS[command].main(rest)
