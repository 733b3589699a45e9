"""Images in folders, ``ROOT/train/CLASS/`` and ``ROOT/test/CLASS/`` and what is below them: decoded once, then cached.

The cache is one ``.npz`` beside ROOT. It carries a fingerprint of every file's path, size and
modification time, and is made again when that changes.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
from PIL import Image

from cifar_fast.recipe import IMAGE_SIZE
from cifar_fast.utils.errors import InputError
from cifar_fast.utils.files import atomic_write
from cifar_fast.utils.progress import LOGGER, progress_bar

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits per channel or less: RGB keeps them whole


def read_folder(root: Path) -> dict[str, np.ndarray]:
    """Arrays ``train_images``, ``train_labels``, ``test_images``, ``test_labels``, ``class_names``.

    Classes are numbered in alphabetical order, images taken in the order of their names. Raises
    :class:`InputError` that names the folder or file at fault.
    """
    root = root.resolve()
    left_out: Counter[str] = Counter()
    train, test = (_classes(root / split, left_out) for split in ("train", "test"))
    if unknown := sorted(set(test) - set(train)):
        raise InputError(
            f"{root / 'test' / unknown[0]}: {root / 'train'} has no such class; add it there, or take it out of test"
        )
    if left_out:
        LOGGER.info(
            f"left out {left_out.total()} files under {root} that are no images of a class: {by_kind(left_out)}"
        )
    names = list(train)
    files = [file for classes in (train, test) for found in classes.values() for file in found]
    labels = np.array(
        [names.index(name) for classes in (train, test) for name, found in classes.items() for _ in found], np.int64
    )
    n = sum(map(len, train.values()))

    cache = root.with_name(f"{root.name}.cifar_fast.npz")
    fingerprint = _fingerprint(root, files)
    images = _read_cache(cache, fingerprint)
    if images is None or len(images) != len(files):
        LOGGER.info(f"decoding {len(files)} images under {root}")
        images = _decode(files)
        try:
            with atomic_write(cache) as temporary, open(temporary, "wb") as file:
                np.savez(file, images=images, fingerprint=np.array(fingerprint))
            LOGGER.info(f"kept the decoded images in {cache}")
        except OSError as error:
            LOGGER.info(
                f"could not keep the decoded images in {cache} ({error.strerror}); the next start decodes them again"
            )
    return dict(
        train_images=images[:n],
        train_labels=labels[:n],
        test_images=images[n:],
        test_labels=labels[n:],
        class_names=np.array(names),
    )


def _classes(split: Path, left_out: Counter[str]) -> dict[str, list[Path]]:
    """The images of each class folder of ``split``, both in alphabetical order; ``left_out`` counts other files by
    their kind.
    """
    try:
        entries = sorted(split.iterdir())
        folders = [path for path in entries if path.is_dir() and not path.name.startswith(".")]
        left_out.update(_kind(path) for path in entries if path not in folders)
        classes = {folder.name: sorted(images_below(folder, left_out)) for folder in folders}
    except OSError as error:
        raise InputError(
            f"{error.filename}: {error.strerror}; --data-dir must name a folder with train/CLASS/ and test/CLASS/ in it"
        ) from None
    if not classes:
        raise InputError(
            f"{split}: no class folders in it; put the images of each class into a folder of its own there"
        )
    for name, found in classes.items():
        if not found:
            raise InputError(
                f"{split / name}: an empty class, no image that Pillow reads in it; add images or delete the folder"
            )
    return classes


def images_below(folder: Path, left_out: Counter[str]) -> Iterator[Path]:
    """The images in ``folder`` and those below it, links followed, as torchvision's ImageFolder finds them;
    ``left_out`` counts other files by their kind. Raises OSError.
    """

    def fail(error: OSError) -> NoReturn:
        raise error

    readable, seen = _readable_suffixes(), set[str]()
    for path, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        for file in map(Path(path).joinpath, files):
            if file.suffix.lower() in readable and not file.name.startswith("."):
                yield file
            else:
                left_out[_kind(file)] += 1


@functools.cache
def _readable_suffixes() -> frozenset[str]:
    """Those of the formats that Pillow decodes here, which depends on how it was built."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def _kind(path: Path) -> str:
    return "hidden" if path.name.startswith(".") else path.suffix.lower() or "without a suffix"


def by_kind(left_out: Counter[str]) -> str:
    """What :func:`images_below` has left out, for a line."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))


def _fingerprint(root: Path, files: list[Path]) -> str:
    digest = hashlib.sha256(b"transparent over white\0")  # how they are decoded, where that has changed
    for file in files:
        status = file.stat()
        digest.update(
            f"{file.relative_to(root)}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape")
        )
    return digest.hexdigest()


def _read_cache(cache: Path, fingerprint: str) -> np.ndarray | None:
    """The cached images; None where there are none, the folder has changed since, or the file is damaged."""
    try:
        with np.load(cache, allow_pickle=False) as arrays:
            return arrays["images"] if arrays["fingerprint"] == fingerprint else None
    except Exception:  # whatever is wrong with a cache, making it again is the cure
        return None


def _decode(files: list[Path]) -> np.ndarray:
    """The images, uint8 ``[len(files), 32, 32, 3]``.

    Decoded here, some 6,000 a second, and once: other processes would be a gain of seconds, and cannot be had in a
    worker of a pool, from standard input, or by a script without the main guard. Threads gain nothing.
    """
    images = np.empty((len(files), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    with progress_bar(len(files), "decoding", " images") as bar:
        for pixels, file in zip(images, files):
            pixels[:] = decode_image(file, str(file))
            bar.update()
    return images


def decode_image(
    file: Path | BinaryIO, name: str, fit: Callable[[Image.Image], Image.Image] | None = None
) -> np.ndarray:
    """The image in ``file`` as uint8 ``[32, 32, 3]``, what is transparent over white; ``name`` says in errors which one
    it is.

    ``fit`` makes one of another size, in RGB, 32 x 32; without it such an image is refused.
    """
    square = (IMAGE_SIZE, IMAGE_SIZE)
    frames, pixels = 1, None
    try:
        with Image.open(file) as opened:
            image: Image.Image = opened
            mode, size, frames = image.mode, image.size, getattr(image, "n_frames", 1)
            if (fit or size == square) and mode in MODES and frames == 1:
                if "A" in image.getbands() or "transparency" in image.info:
                    white = Image.new("RGBA", size, "white")
                    image = Image.alpha_composite(white, image.convert("RGBA"))
                image = image.convert("RGB")
                pixels = np.asarray(fit(image) if fit and size != square else image)
    except Exception as error:  # decoders raise what they like, SyntaxError and struct.error among it
        raise InputError(f"{name}: not a whole image ({error}); replace it or delete it") from None
    if frames > 1:
        raise InputError(f"{name}: holds {frames} images; save the one that is meant alone")
    if pixels is None:
        must = "have" if fit else f"be {IMAGE_SIZE} x {IMAGE_SIZE} with"
        raise InputError(f"{name}: {size[0]} x {size[1]} pixels, mode {mode}; images must {must} 8 bits per channel")
    return pixels
