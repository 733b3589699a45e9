"""Names of a run's files, and files that are written completely or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cifar_fast.utils.errors import InputError, option, require_instance
from cifar_fast.utils.progress import LOGGER

TRAINING = "training.json"
CHECKPOINT = "checkpoint.pt"
RUN_RESULT = "result.json"
ROWS = "metrics.jsonl"
SUMMARY = "summary.json"
MODEL = "model.pt"
LOGITS = "logits.npz"
CURVES = "curves.png"
CONFUSION = "confusion.png"


def as_path(value: Any, name: str) -> Path:
    """Return ``value``, an argument called ``name``, as a path. "~" is the home folder."""
    require_instance(name, value, (str, os.PathLike), "a path")
    return expand_home(value)


def expand_home(path: str | Path) -> Path:
    """Return ``path`` with the home folder in place of "~".

    Raises:
        InputError: nobody knows the home folder, as in a container without $HOME.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InputError(f"{path}: the home folder is unknown; write the path in full, or set $HOME") from None


def absolute_paths(given: Iterable[str | Path]) -> dict[str, str]:
    """Return the absolute path of each path that exists, by the path that was given."""
    paths = list(map(expand_home, given))
    return {str(path): str(path.absolute()) for path in paths if path.exists()}


def known_path(
    known: Mapping[str, str], given: str | Path, name: str, is_there: Callable[[str], bool] = os.path.exists
) -> str:
    """Return the absolute path that ``known`` has for ``given``, or ``given`` if it has none.

    ``known`` comes from :func:`absolute_paths`, maybe in another working folder. ``name`` is the option of the path.
    ``is_there`` tells whether a path has what was read.

    Raises:
        InputError: nothing is at either path.
    """
    path = str(expand_home(given))
    absolute = known.get(path)
    if absolute is None:
        return path
    if is_there(absolute):
        return absolute
    if not is_there(path):
        raise InputError(
            f"{absolute}: the training read it, but it is gone; move it back, or name its new place with {option(name)}"
        )
    LOGGER.info(f"{absolute} is gone; {path} in this folder is read in its place")
    return path


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, and rename it to ``path`` if the block succeeds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # before the rename: a power cut could otherwise leave an empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporary(path: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote ``path``."""
    for temporary in path.parent.glob(f".{path.name}.*"):
        temporary.unlink(missing_ok=True)


def remove_empty(folders: list[Path]) -> None:
    """Remove each of ``folders`` that is empty, in this order."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def os_error_as_input_error(what: str, hint: str = "choose another folder") -> Iterator[None]:
    """Raise an OSError of the block as an :class:`InputError`: ``what`` cannot be written, ``hint`` says what to do."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{what}: cannot be written to ({error.strerror or error}); {hint}") from None


def check_writable(folder: Path, what: str, hint: str = "choose another folder") -> None:
    """Raise :class:`InputError` if no file can be created in ``folder``, which need not exist and is not created.

    ``what`` and ``hint`` are for the message, as in :func:`os_error_as_input_error`.
    """
    with os_error_as_input_error(what, hint):
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise InputError(f"{what}: {existing} is not a directory; {hint}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{what}: {existing} cannot be written to; {hint}")
    with os_error_as_input_error(what, hint):
        tempfile.TemporaryFile(dir=existing).close()  # os.access misses read-only file systems and /proc


@contextlib.contextmanager
def locked(folder: Path, on_busy: Callable[[], None]) -> Iterator[None]:
    """Hold an exclusive lock on ``folder`` during the block. Do nothing if the file system has no locks.

    If another process holds the lock, call ``on_busy``. If that returns, wait for the lock.
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


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Create ``folder`` and its parents, and remove those of them that are still empty after the block."""
    missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        remove_empty(missing)


def write_json(path: Path, value: Any, what: str, hint: str = "choose another file") -> None:
    """Write ``value`` to ``path`` as JSON, completely or not at all. NaN and infinity, which JSON lacks, become null.

    ``what`` and ``hint`` are for the :class:`InputError` if the file cannot be written.
    """

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    with os_error_as_input_error(what, hint), atomic_write(path) as temporary:
        temporary.write_text(json.dumps(finite(value), indent=2, allow_nan=False) + "\n")
