"""What a person sees of long work: a bar on a terminal and in a notebook, plain lines everywhere."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # in a notebook: that tqdm guesses, and that ipywidgets is missing
    from tqdm.autonotebook import tqdm

NOTEBOOK = "ipykernel.zmqshell" in sys.modules
"""Whether output goes to a notebook, as tqdm asks it; its bar is a widget where ipywidgets is installed."""

Log = Callable[[str], None]
"""Takes one line of text for a person; ``print`` is one."""


def print_line(line: str) -> None:
    """The :data:`Log` that prints at once: a redirected output has each line when it is there, not at the end."""
    print(line, flush=True)


def silent(line: str) -> None:
    """The :data:`Log` that drops every line; with it no bar is shown either."""


def encodable(log: Log | None) -> Log:
    """``log``, given escapes for what its encoding lacks, such as a path's letters; :func:`silent` for None."""
    if log is None or log is silent:
        return silent

    def say(line: str) -> None:
        try:
            log(line)
        except UnicodeEncodeError:
            log(line.encode("ascii", "backslashreplace").decode())

    return say


def progress_bar(total: int | None, what: str, unit: str, log: Log) -> tqdm:
    """A bar in a notebook, and on standard error where that is a terminal, nothing elsewhere; it vanishes when done.
    Bytes, "B", show as MB/s.
    """
    hidden = True if log is silent else False if NOTEBOOK else None  # None: tqdm asks whether it writes to a terminal
    file = sys.stdout if NOTEBOOK else sys.stderr  # a notebook shows standard error as an error
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        unit_scale=unit == "B",
        disable=hidden,
        file=file,
        leave=False,
        dynamic_ncols=True,
    )
