"""Images as files in ``ROOT/train/CLASS/`` and ``ROOT/test/CLASS/``, decoded once and then cached.

The cache is one ``.npz`` file next to ROOT. It holds a fingerprint of the bytes of every image file, and is written
again when the fingerprint changes. Sizes and times are no fingerprint, because copies may keep them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from cifar_fast.data.class_names import ClassNames
from cifar_fast.data.images import RESIZING, SIZE, decode_images, formats, tell_resized
from cifar_fast.data.options import VALIDATION, DataOptions
from cifar_fast.utils.errors import InputError, option
from cifar_fast.utils.files import atomic_write, regular
from cifar_fast.utils.progress import LOGGER

MAX_WAYS = 100
"""The largest number of ways to one folder. Links among a few folders could otherwise lead through millions."""


def read_folder(root: Path, options: DataOptions) -> dict[str, Any]:
    """Read the images below ``root`` as arrays of the splits ``train`` and ``test``, and ``class_names``.

    A folder ``val`` is the split to test on if there is no ``test``. If images for testing are to be held out, ``root``
    may also hold the folders of the classes itself.

    Classes are in alphabetical order, the images of a class in the order of their paths. An InputError names a folder
    or a file that cannot be used.
    """
    root = root.resolve()
    ignored: Counter[str] = Counter()
    bare = options.test_fraction is not None and not (root / "train").exists()
    train = _classes(root if bare else root / "train", ignored)
    found = [split for split in ("test", *VALIDATION) if (root / split).is_dir()]
    split = options.test_split(found, str(root))
    test = _classes(root / split, ignored) if split else {}
    if unknown := sorted(set(test) - set(train)):
        raise InputError(
            f"{root / str(split) / unknown[0]}: {root / 'train'} has no such class; add it there, or remove it from "
            f"{split}"
        )
    for other in found[1:]:
        count = sum(1 for _ in images_below(root / other, Counter()))
        LOGGER.info(f"{root / other}: the {count} images of the split {other} are left out")
    if ignored:
        LOGGER.info(f"ignored {ignored.total()} files under {root} that are not images of a class: {by_kind(ignored)}")
    names = list(train)
    labeled = [(file, names.index(name)) for split in (train, test) for name, paths in split.items() for file in paths]
    files = [file for file, _ in labeled]
    labels = np.array([label for _, label in labeled], np.int64)
    n = sum(map(len, train.values()))

    cache = root.with_name(f"{root.name}.cifar_fast.npz")
    resize = options.resize is not None
    fingerprint = _fingerprint(files, resize)
    images, resized = _read_cache(cache, fingerprint, len(files)) or (None, 0)
    if images is None:
        LOGGER.info(f"decoding {len(files)} images under {root}")
        images, resized = decode_images({str(file): file for file in files}, "decoding", resize)
        try:
            with atomic_write(cache) as temporary, open(temporary, "wb") as file:
                np.savez(file, images=images, resized=resized, fingerprint=np.array(fingerprint))
            LOGGER.info(f"cached the decoded images in {cache}")
        except OSError as error:
            LOGGER.info(
                f"could not cache the decoded images in {cache} ({error.strerror}); the next start decodes them again"
            )
    tell_resized(resized, len(files), str(root))
    arrays: dict[str, Any] = {"class_names": names, "train_images": images[:n], "train_labels": labels[:n]}
    return arrays | ({f"{split}_images": images[n:], f"{split}_labels": labels[n:]} if split else {})


def _classes(split: Path, ignored: Counter[str]) -> dict[str, list[Path]]:
    """Return the images of each class folder in ``split``. Count other files by kind.

    Folders and images are in alphabetical order.
    """
    try:
        entries = _entries(split)
        ignored.update(_kind(path) for path, type_ in entries if type_ != "folder")
        folders = [path for path, type_ in entries if type_ == "folder"]
        found = dict(zip(ClassNames((path.name for path in folders), str(split)), folders))
        classes = {name: list(images_below(folder, ignored)) for name, folder in sorted(found.items())}
    except OSError as error:
        raise InputError(
            f"{error.filename}: {error.strerror}; {option('data_dir')} must be a folder that contains train/CLASS/ "
            "and test/CLASS/"
        ) from None
    if not classes:
        raise InputError(f"{split}: no class folders; put the images of each class into a folder of its own there")
    for name, images in classes.items():
        if not images:
            raise InputError(
                f"{found[name]}: an empty class, without images in a format that is read; add some or delete the folder"
            )
    return classes


def images_below(folder: Path, ignored: Counter[str]) -> Iterator[Path]:
    """Yield the images in ``folder`` and its subfolders, in the order of their paths.

    Links are followed, as by torchvision's ImageFolder. A folder that can be reached in several ways is read each time.
    ``ignored`` counts other files by their kind. It also counts links to a folder that holds the link. Raises OSError.
    """
    reached = Counter[tuple[int, int]]()
    pending: list[tuple[Path, str, tuple[tuple[int, int], ...]]] = [(folder, "folder", ())]
    while pending:
        path, type_, parents = pending.pop()
        if type_ == "folder":
            status = os.stat(path)
            identity = status.st_dev, status.st_ino
            if identity in parents:
                ignored["link to a parent folder"] += 1
                continue
            reached[identity] += 1
            if reached[identity] > MAX_WAYS:
                raise InputError(f"{path}: links lead to this folder in over {MAX_WAYS} ways; remove some of them")
            pending += [(*entry, (*parents, identity)) for entry in reversed(_entries(path))]
        elif type_ == "file" and path.suffix.lower() in _readable_suffixes():
            yield path
        else:
            ignored[_kind(path)] += 1


def _entries(folder: Path) -> list[tuple[Path, str]]:
    """Return the entries of ``folder`` in alphabetical order, each with its type: "folder", "file" or "other"."""
    with os.scandir(folder) as entries:
        return [(Path(entry.path), _type(entry)) for entry in sorted(entries, key=lambda entry: entry.name)]


def _type(entry: os.DirEntry[str]) -> str:
    """Return "other" for a hidden entry, and for one without contents, such as a named pipe."""
    if entry.name.startswith("."):
        return "other"
    with contextlib.suppress(OSError):  # a link to itself
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    return "other" if os.path.exists(entry.path) else "file"  # a broken link is reported when it is opened


@functools.cache
def _readable_suffixes() -> frozenset[str]:
    """Return the suffixes of the formats that are read."""
    extensions = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in extensions.items() if kind in (*formats(), "MPO"))  # a kind of JPEG


def _kind(path: Path) -> str:
    return "hidden" if path.name.startswith(".") else path.suffix.lower() or "without a suffix"


def by_kind(ignored: Counter[str]) -> str:
    """Format the counts of ignored files, such as "2 .txt, 1 hidden"."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(ignored.items()))


def _fingerprint(files: list[Path], resize: bool) -> str:
    # The text names the way of decoding, so that a cache from another way is not used.
    size = f"resized {RESIZING}, " if resize else ""
    digest = hashlib.sha256(f"upright, transparent over white, {size}Pillow {PIL.__version__}".encode())
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _read_cache(cache: Path, fingerprint: str, count: int) -> tuple[np.ndarray, int] | None:
    """Return the ``count`` cached images, and how many were resized.

    The result is None if there are none, the folder has changed, or the file is damaged.
    """
    try:
        with np.load(regular(cache), allow_pickle=False) as arrays:
            images = arrays["images"]
            if arrays["fingerprint"] != fingerprint or images.shape != (count, *SIZE, 3) or images.dtype != np.uint8:
                return None
            return images, int(arrays["resized"])
    except Exception:  # whatever is wrong with a cache, it is written again
        return None
