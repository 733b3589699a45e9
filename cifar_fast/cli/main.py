"""The command ``cifar-fast``, which runs one of the commands of this package."""

from __future__ import annotations

import sys

from cifar_fast import __version__
from cifar_fast.cli import check, compare, export, predict, profile, report, sweep, train
from cifar_fast.cli.flags import print_line, run_command
from cifar_fast.utils.errors import InputError, did_you_mean

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
    if command in COMMANDS:
        return COMMANDS[command].main(rest)
    return run_command(lambda: answer(command), argv)


def answer(flag: str) -> int:
    """Print what --help or --version asks for, and return 0.

    Raises:
        InputError: ``flag`` is another word, but no command.
    """
    if flag in ("-h", "--help"):
        lines = [f"  {name:9} {module.SUMMARY}" for name, module in COMMANDS.items()]
        end = "\ncifar-fast COMMAND --help lists the flags; --version prints the version."
        print_line("\n".join(("usage: cifar-fast COMMAND [flags]\n", *lines, end)))
    elif flag == "--version":
        print_line(f"cifar-fast {__version__}")
    else:
        hint = did_you_mean(flag, COMMANDS)
        raise InputError(f"there is no command {flag!r}; there are {', '.join(COMMANDS)}{hint}")
    return 0
