"""Images of any orientation, mode and size as uint8 ``[32, 32, 3]``, with the same steps for every use.

The steps are: take the first picture, rotate it upright, put white behind transparent pixels, convert it to RGB, scale.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cifar_fast.recipe import IMAGE_SIZE
from cifar_fast.utils.errors import InputError, option, plain
from cifar_fast.utils.files import regular
from cifar_fast.utils.progress import LOGGER, progress_bar

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # at most 8 bits per channel, so RGB loses nothing
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are read. Pillow knows more; some of them start other programs."""
MAX_PIXELS = 120_000_000
"""The largest image that is decoded. It takes less than 2 GiB, and its file may have some kilobytes."""
SIZE = (IMAGE_SIZE, IMAGE_SIZE)
RESIZING = (
    f"to {IMAGE_SIZE} x {IMAGE_SIZE}: rotated upright, cropped to the largest central square, bicubic with antialiasing"
)


def decode_images(files: Mapping[str, Path | BinaryIO], what: str, resize: bool = False) -> tuple[np.ndarray, int]:
    """Decode ``files`` to uint8 ``[len(files), 32, 32, 3]``. Also return how many were resized.

    The names of the files are for messages, ``what`` is for the bar.

    One process decodes about 6,000 images a second, once per data set. More processes would save only seconds, and they
    cannot start in a worker of a pool, from standard input, or in a script without the main guard. Threads do not help.
    """
    images, resized = np.empty((len(files), *SIZE, 3), np.uint8), 0
    with progress_bar(len(files), what, " images") as bar:
        for pixels, (name, file) in zip(images, files.items()):
            pixels[:], was_resized = decode_image(file, name, resize)
            resized += was_resized
            bar.update()
    return images, resized


def decode_image(file: Path | BinaryIO, name: str, resize: bool = False) -> tuple[np.ndarray, bool]:
    """Decode an image to uint8 ``[32, 32, 3]``. Also return whether it was resized (see :data:`RESIZING`).

    ``name`` is for messages. An image of another size is refused unless ``resize``.

    Raises:
        InputError: it is not a whole image, has several frames, the wrong size, or more than 8 bits per channel.
    """
    try:
        source = regular(file) if isinstance(file, Path) else file
        with _lenient(), Image.open(source, formats=formats()) as opened:
            # An MPO file is a photo and a further picture of it: a preview, another view, or a map of brightness.
            frames = 1 if opened.format == "MPO" else getattr(opened, "n_frames", 1)
            if problem := _problem(opened.size, opened.mode, frames, resize):
                raise InputError(f"{name}: {problem}")
            image = _upright(opened)
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), _as_mode(image, "RGBA"))
            image = _as_mode(image, "RGB")
            return np.asarray(_scaled(image)), image.size != SIZE
    except InputError:
        raise
    except MemoryError:
        raise InputError(f"{name}: too large for the memory of this machine; scale it down") from None
    except UnidentifiedImageError:
        raise InputError(
            f"{name}: not a whole image in a format that is read ({', '.join(formats())}); convert it to PNG or JPEG, "
            "or delete it"
        ) from None
    except Exception as error:  # decoders raise many types, even SyntaxError and struct.error
        raise InputError(f"{name}: not a whole image ({error}); replace or delete it") from None


@functools.cache
def formats() -> tuple[str, ...]:
    """Return those of :data:`FORMATS` that this build of Pillow decodes."""
    Image.init()
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)


@contextlib.contextmanager
def _lenient() -> Iterator[None]:
    """Let Pillow open images of any size, and say nothing about EXIF data or palettes.

    Otherwise it warns from 89 million pixels on, and refuses twice as many.
    """
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _problem(size: tuple[int, int], mode: str, frames: int, resize: bool) -> str:
    """Return why an image cannot be used, as far as its header tells; empty if it can."""
    shape = f"{size[0]} x {size[1]} pixels"
    if frames > 1:
        return f"holds {frames} images; save the intended one as a file of its own"
    if mode not in MODES:
        return f"{shape}, mode {mode}; images must have 8 bits per channel, in gray, RGB, CMYK or YCbCr"
    if size != SIZE and not resize:
        return f"{shape}; images must be {IMAGE_SIZE} x {IMAGE_SIZE}, or give {option('resize')} {IMAGE_SIZE}"
    if size[0] * size[1] > MAX_PIXELS:
        return f"{shape} are more than the {MAX_PIXELS:,} that are decoded; scale it down"
    return ""


def _upright(image: Image.Image) -> Image.Image:
    """Rotate an image as its EXIF data says, because cameras store the pixels as the sensor reads them."""
    image.load()  # before the rotation, so that an error of the pixels is not taken for one of the EXIF data
    try:
        ImageOps.exif_transpose(image, in_place=True)  # a copy would take as much memory again
    except MemoryError:
        raise
    except Exception:  # damaged EXIF data is no reason to refuse a whole image
        pass
    return image


def _as_mode(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)


def _scaled(image: Image.Image) -> Image.Image:
    return image if image.size == SIZE else ImageOps.fit(image, SIZE, Image.Resampling.BICUBIC)


def as_images(where: str, images: np.ndarray, resize: bool = False) -> tuple[np.ndarray, int]:
    """Return an array of images as uint8 ``[N, 32, 32, 3]``. Also return how many were resized.

    Gray images, ``[N, H, W]`` or ``[N, H, W, 1]``, get three equal channels, and a single image ``[H, W, 3]`` is an
    array of one. An array of another type or form is returned as it is.

    Args:
        where: file and name of the array, for messages.
        resize: scale images of other sizes (see :data:`RESIZING`). By default they are refused.
    """
    if images.dtype != np.uint8:
        return images, 0
    if images.ndim == 3:
        images = images[None] if images.shape[-1] == 3 else images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        return images, 0
    if images.shape[1:3] == SIZE:
        return (images if images.shape[-1] == 3 else images.repeat(3, axis=-1)), 0
    if not resize:
        height, width = images.shape[1:3]
        raise InputError(
            f"{where} are {width} x {height} pixels; images must be {IMAGE_SIZE} x {IMAGE_SIZE}, or give "
            f"{option('resize')} {IMAGE_SIZE}"
        )
    scaled = np.empty((len(images), *SIZE, 3), np.uint8)
    with progress_bar(len(images), "scaling", " images") as bar:
        for pixels, image in zip(scaled, images):
            pixels[:] = np.asarray(_scaled(Image.fromarray(image.repeat(3 // image.shape[-1], axis=-1))))
            bar.update()
    return scaled, len(images)


def tell_resized(resized: int, images: int, where: str = "") -> None:
    """Log how many of ``images`` were resized, if any were, and how."""
    if resized:
        LOGGER.info(f"{plain(where)}{': ' if where else ''}resized {resized} of {images} images {RESIZING}")
