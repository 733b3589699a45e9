"""Names of a run's files, and files that are written completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import secrets
import stat
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from cifar_fast.utils.errors import InputError, option, require_instance
from cifar_fast.utils.progress import LOGGER

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

TRAINING = "training.json"
CHECKPOINT = "checkpoint.pt"
PREVIOUS_CHECKPOINT = "checkpoint-previous.pt"
RUN_RESULT = "result.json"
ROWS = "metrics.jsonl"
SUMMARY = "summary.json"
MODEL = "model.pt"
MODEL_SAFETENSORS = "model.safetensors"
LOGITS = "logits.npz"
CURVES = "curves.png"
CONFUSION = "confusion.png"

NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
"""Flag of ``os.open`` that refuses a link; 0 where the system lacks it."""


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


def regular(path: Path) -> Path:
    """Return ``path`` unless it is a pipe or a device, which could be waited for or read for ever.

    Raises:
        OSError: it is one, or nothing is there.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
    return path


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
    """Yield the path of a draft in the same folder, and rename it to ``path`` if the block succeeds.

    After the block the file survives a power cut. Drafts of ``path`` that killed processes left behind are removed.
    """
    remove_drafts(path.parent, path.name)
    draft, file = _new_draft(path)
    try:
        yield draft
        os.fsync(file.fileno())  # before the rename: a power cut could otherwise leave an empty file
        if not fcntl:
            file.close()  # Windows renames no open file
        os.replace(draft, path)
        sync_folder(path.parent)
    finally:
        file.close()
        draft.unlink(missing_ok=True)


def _new_draft(path: Path) -> tuple[Path, IO[bytes]]:
    """Create a draft of ``path`` and return it locked, which marks it as one of a living process.

    Nobody can guess its name and plant a link there.
    """
    while True:
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}.draft")
        descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | NOFOLLOW, 0o666)
        file = open(descriptor, "r+b", buffering=0)  # noqa: SIM115  (the caller closes it)
        if fcntl:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):  # another process may have removed it before it was locked
            if os.path.samestat(os.stat(draft), os.fstat(descriptor)):
                return draft, file
        file.close()


def remove_drafts(folder: Path, *names: str) -> None:
    """Remove drafts of the files ``names`` that processes of this user left in ``folder`` when they were killed.

    The drafts of living processes are locked. Without locks all drafts stay.
    """
    if not fcntl:
        return
    pattern = re.compile(rf"\.({'|'.join(map(re.escape, names))})\.[0-9a-f]{{16}}\.draft")
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if not pattern.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                continue
            with contextlib.suppress(OSError), open(os.open(entry, os.O_RDWR | NOFOLLOW), "r+b", buffering=0) as file:
                if os.fstat(file.fileno()).st_uid == os.getuid():
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(entry)


def sync_folder(folder: Path) -> None:
    """Let the names in ``folder`` survive a power cut. Do nothing where the system cannot do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def append_lines(path: Path, text: str) -> None:
    """Append whole lines to the file ``path``, all or none of them. They then survive a power cut.

    Other processes may append to the file too. A link is refused.
    """
    data = text.encode()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | NOFOLLOW, 0o666)
    with open(descriptor, "a+b", buffering=0) as file:
        if fcntl:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)  # so that no lines of others are cut off below
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        if file.read(1) not in (b"", b"\n"):
            data = b"\n" + data  # after the half line of a process that was killed
        try:
            if file.write(data) < len(data):
                raise OSError("No space left on device")
            os.fsync(descriptor)
        except OSError:
            file.truncate(size)  # leaves no half line
            raise
    sync_folder(path.parent)  # also if another process has made the file: it may be killed before it does this


def save_tensors(value: Any, path: Path) -> None:
    """Write plain tensors and numbers to ``path`` with torch.save. Equal values give equal bytes."""
    import torch  # late, because commands that do not train start faster without it

    with open(path, "wb") as file:  # torch.save puts the name of a path into the file, and a draft's name is random
        torch.save(value, file)


def load_tensors(path: Path) -> Any:
    """Return the plain tensors and numbers that torch.save wrote to ``path``, on the CPU.

    A damaged file may raise any exception. torch.load does not compare the checksums in the file, so this does.
    """
    import torch

    with open(regular(path), "rb") as file:
        with zipfile.ZipFile(file) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            if size > os.fstat(file.fileno()).st_size:  # torch compresses nothing
                raise ValueError("not written by torch.save")
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} in it is damaged: its checksum is wrong")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


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
    if not fcntl:
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
        for path in missing:
            sync_folder(path.parent)
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
