"""What a person sees of long work: a bar on a terminal, plain lines everywhere."""

from __future__ import annotations

from collections.abc import Callable

from tqdm import tqdm

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
    """A bar on standard error where that is a terminal, nothing elsewhere; it vanishes when done. Bytes, "B", show as
    MB/s.
    """
    hidden = True if log is silent else None  # None: tqdm asks whether it writes to a terminal
    scale = unit == "B"
    return tqdm(total=total, desc=what, unit=unit, unit_scale=scale, disable=hidden, leave=False, dynamic_ncols=True)
