"""Write docs/cli.md from the parsers of the commands, so that the two cannot differ: ``make docs``."""

from __future__ import annotations

import argparse
from pathlib import Path

from cifar_fast.cli import main as cli

PAGE = Path(__file__).with_name("cli.md")

HEAD = """<!-- Written by docs/generate_cli.py out of the commands' own flags: edit those, and run `make docs`. -->

# Commands

| `cifar-fast` | does what | also as |
|---|---|---|
"""
ALSO = {
    "train": "`python -m cifar_fast.train`",
    "predict": "`cifar_fast.load_model(path).predict(images)`",
    "sweep": "`cifar_fast.fit_sweep`, [experiments.md](experiments.md)",
    "report": "`cifar_fast.make_report`",
    "compare": "`python -m cifar_fast.compare`",
    "profile": "`cifar-fast train --profile DIR`",
}
NOTES = """
`cifar-fast --version` prints the version, `cifar-fast COMMAND --help` the flags below.

Exit codes: 0; 1 where a comparison is past its tolerance, a training diverges, a process that shares its runs has died,
a file cannot be written, an image to predict is broken, or something that `auto` needs does not pass its check; 2 for
input that cannot work, with one line on standard error that says what is wrong and what to do; 130 after Ctrl-C or
SIGTERM, the first of which lets `train` and `sweep` end their step, and a line then says how to go on. `--traceback`
shows where an error came from.

## Flags of `train`, `compare` and `profile`
"""

TAIL = """
## Examples

    cifar-fast train                                              # CIFAR-10, 24 epochs, what is fastest here
    cifar-fast train --epochs 6 --runs 3 --output runs/short      # three seeds, with a 95 % interval
    cifar-fast train --resume runs/short                          # go on where it was stopped, with the same bits
    cifar-fast train --resume runs/short --runs 10                # seven seeds more
    cifar-fast train --init-seed 5 --runs 10                      # the same initial weights, ten orders
    cifar-fast train --save-logits --log tensorboard              # the test logits, and curves for TensorBoard
    cifar-fast predict runs/short photos cat.jpg --top 3          # what images in a folder, and one more, are taken for
    cifar-fast train --print-recipe > recipe.json                 # a file for --recipe
    cifar-fast train --backend eager --device cpu --dtype float32 # the reference's numbers, bit for bit
    cifar-fast sweep spec.toml                                    # the variants that the file states, or on with them
    cifar-fast report runs/sweep --output runs/report             # means, intervals, differences and two pictures
    cifar-fast compare --backend compiled --steps 8               # how far torch.compile is from eager here
    cifar-fast check --json check.json                            # does everything work on this machine?
    cifar-fast profile --dataset synthetic --output runs/profile  # a trace and a table of a few steps
"""


def page() -> str:
    """The text of docs/cli.md."""
    parsers = {name: getattr(cli, f"{name}_parser")() for name in cli.COMMANDS}
    flags = {name: rows(parsers.pop(name)) for name in ("train", "compare", "profile")}
    shared = [
        row for row in flags["train"] if all(row[:2] in [other[:2] for other in found] for found in flags.values())
    ]
    names = [row[1] for row in shared]
    lines = [f"| `{name}` | {what} | {ALSO.get(name, '')} |\n" for name, (_, what) in cli.COMMANDS.items()]
    parts = [HEAD + "".join(lines).replace("|  |", "| |") + NOTES]
    for title in dict.fromkeys(row[0] for row in shared):
        parts.append(table(f"### {title[0].upper()}{title[1:]}", [row for row in shared if row[0] == title]))
    for name, found in flags.items():
        for (_, flag, _, default), (_, _, _, usual) in zip([row for row in found if row[1] in names], shared):
            if default != usual:
                parts.append(f"The default of `{name}` for {flag.split()[0]} is `{default}`.\n")
    for name, found in flags.items():
        parts.append(table(f"## Flags of `{name}` alone", [row for row in found if row[1] not in names]))
    for name, parser in parsers.items():
        parts.append(table(f"## Flags of `{name}`", rows(parser)))
    return "\n".join(parts) + TAIL


def rows(parser: argparse.ArgumentParser) -> list[tuple[str, str, str, str]]:
    """Group, flag, meaning and default of each flag of ``parser``."""
    found = []
    for group in parser._action_groups:  # the only place where argparse keeps them
        for action in group._group_actions:
            if isinstance(action, argparse._HelpAction):
                continue
            flag = ", ".join(f"`{option}`" for option in action.option_strings)
            if not flag:  # an argument
                flag = f"`{action.metavar}`" + (" ..." if action.nargs == "+" else "")
            elif action.nargs == "+":
                flag += f" {action.metavar} ..."
            elif action.choices:
                flag += " " + ", ".join(f"`{choice}`" for choice in action.choices)
            elif action.nargs != 0:
                flag += f" {action.metavar or action.dest.upper()}"
            meaning, _, default = (action.help or "").partition(" (default: ")
            default = default.removesuffix(")")
            if not default and action.default not in (None, False):
                default = str(action.default)
            found.append((group.title or "", flag, meaning, default))
    return found


def table(heading: str, rows: list[tuple[str, str, str, str]]) -> str:
    """``rows`` as a Markdown table under ``heading``."""
    lines = [f"{heading}\n", "| flag | meaning | default |", "|---|---|---|"]
    lines += [f"| {flag} | {meaning} | {default} |".replace("|  |", "| |") for _, flag, meaning, default in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written to {PAGE}")
