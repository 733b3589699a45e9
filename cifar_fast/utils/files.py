"""Files that are either whole or absent."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_fast.utils.errors import InputError

if TYPE_CHECKING:
    pass


ROWS, SUMMARY, MODEL, LOGITS = "metrics.jsonl", "summary.json", "model.pt", "logits.npz"


CHECKPOINT = "checkpoint.pt"


TRAINING, RUN_RESULT, CURVES = "training.json", "result.json", "curves.png"


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path to write to, in the same directory, that takes the place of ``path`` if the block ends well."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield draft
        with open(draft, "rb") as file:
            os.fsync(file.fileno())  # before the name is, else a power cut leaves an empty file
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def remove_drafts(path: Path) -> None:
    """Remove what was left of ``path`` by processes that were killed while they wrote it."""
    for draft in path.parent.glob(f".{path.name}.*"):
        draft.unlink(missing_ok=True)


def remove_empty(folders: list[Path]) -> None:
    """Remove those of ``folders`` that are empty, in this order."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def writing(what: str, cure: str = "choose another folder") -> Iterator[None]:
    """Tell an error of the file system in a line that names ``what``, such as "--output runs/1", and the cure."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{what}: cannot be written to ({error.strerror or error}); {cure}") from None


def check_writable(path: Path, what: str, cure: str = "choose another folder") -> None:
    """Raise :class:`InputError` where nothing can be made in the folder ``path``, before the work that it is for; what
    of ``path`` is not there is not made.
    """
    with writing(what, cure):
        above = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not above.is_dir():
        raise InputError(f"{what}: {above} is not a directory; {cure}")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{what}: {above} cannot be written to; {cure}")
    with writing(what, cure):
        tempfile.TemporaryFile(dir=above).close()  # file systems that are read-only, or made by the kernel


@contextlib.contextmanager
def locked(folder: Path, on_busy: Callable[[], None]) -> Iterator[None]:
    """Keep other processes that ask for it out of ``folder`` meanwhile; without effect where there are no locks.

    Where another is in it, ``on_busy`` is called; if it returns, the other is waited for.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_busy()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
