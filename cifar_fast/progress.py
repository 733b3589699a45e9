"""What a person sees of long work: a bar on a terminal, plain lines everywhere."""

from __future__ import annotations

from collections.abc import Callable

from tqdm import tqdm

Log = Callable[[str], None]
"""Takes one line of text for a person; ``print`` is one."""


def silent(line: str) -> None:
    """The :data:`Log` that drops every line; with it no bar is shown either."""


def progress_bar(total: int | None, what: str, unit: str, log: Log) -> tqdm:
    """A bar on standard error where that is a terminal, nothing elsewhere; it vanishes when done. Bytes, "B", show as
    MB/s.
    """
    hidden = True if log is silent else None  # None: tqdm asks whether it writes to a terminal
    scale = unit == "B"
    return tqdm(total=total, desc=what, unit=unit, unit_scale=scale, disable=hidden, leave=False, dynamic_ncols=True)
