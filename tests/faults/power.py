"""The log of ``shim.c``, and what a power cut leaves of the files that it names."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

POWER = ("kept", "undone", "mixed")
"""Faults of :func:`cut_power`: what becomes of a folder's entries that changed since the last sync of the folder."""


@dataclass(frozen=True)
class Operation:
    """A line of the log: an operation on the file ``path`` or on the folder ``path``.

    ``source`` is the path before a rename. ``kept`` is a hard link to the file that was replaced or removed.
    """

    process: int
    succeeded: bool
    kind: str
    path: Path
    inode: int
    size: int
    source: str
    kept: str

    @classmethod
    def read(cls, log: Path) -> list[Operation]:
        """Return the operations in the file ``log``."""
        lines = [line.split("\t") for line in log.read_text().splitlines()]
        return [cls(int(a), b == "1", c, Path(d), int(e), int(f), g, h) for a, b, c, d, e, f, g, h in lines]


def cut_power(folder: Path, crashed: Path, log: list[Operation], fault: str, draw: random.Random) -> None:
    """Take back from ``folder``, a copy of ``crashed``, what was not synced.

    Bytes that were written after a file's last sync are gone. Entries of a folder that changed after its own last sync
    are kept or undone as ``fault`` says, one of ``POWER``. "mixed" draws how many of the changes, the earlier ones, are
    kept in each folder, and whether bytes that are gone are zeros instead.
    """
    synced: dict[int, int] = {}
    changes: list[Operation] = []
    for one in (one for one in log if one.succeeded):
        if one.kind == "create":
            synced[one.inode] = 0
        elif one.kind == "open":
            synced.setdefault(one.inode, one.size)
        elif one.kind == "sync":
            synced[one.inode] = one.size
            changes = [change for change in changes if change.path.parent != one.path]
        if one.kind in ("create", "rename", "unlink", "mkdir", "rmdir"):
            changes.append(one)

    def drop(path: Path, inode: int) -> None:
        size = path.stat().st_size
        if (end := synced.get(inode, size)) < size:
            os.truncate(path, end)
            if fault == "mixed" and draw.random() < 0.5:
                os.truncate(path, size)

    for path in sorted(folder.rglob("*")):
        if path.is_file():
            drop(path, (crashed / path.relative_to(folder)).stat().st_ino)
    undo: dict[Path, int] = {}
    for parent in sorted({change.path.parent for change in changes}):
        total = sum(change.path.parent == parent for change in changes)
        undo[parent] = {"kept": 0, "undone": total, "mixed": draw.randint(0, total)}[fault]
    for change in reversed(changes):
        path = change.path
        undo[path.parent] -= 1
        if undo[path.parent] < 0 or not path.parent.exists():
            continue
        if change.kind == "mkdir":
            shutil.rmtree(path)
        elif change.kind == "rmdir":
            path.mkdir()
        elif change.kind == "create":
            path.unlink(missing_ok=True)  # two processes may both have made it
        elif change.kind == "rename":
            path.rename(change.source)
        if change.kept:
            shutil.copy(change.kept, path)
            drop(path, Path(change.kept).stat().st_ino)
