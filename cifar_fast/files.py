"""Files that are either whole or absent."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from cifar_fast.errors import InputError


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path to write to, in the same directory, that takes the place of ``path`` if the block ends well."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(what: str, cure: str = "choose another folder") -> Iterator[None]:
    """Tell an error of the file system in a line that names ``what``, such as "--output runs/1", and the cure."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{what}: cannot be written to ({error.strerror or error}); {cure}") from None
