"""What ``cifar-fast predict`` does: finds images, decodes them, and tells what a trained network takes them for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from cifar_fast.data.dataset import check_images
from cifar_fast.data.eval_sets import read_npz
from cifar_fast.data.image_folder import by_kind, decode_image, images_below
from cifar_fast.inference.classifier import Classifier
from cifar_fast.recipe import IMAGE_SIZE
from cifar_fast.utils.errors import InputError
from cifar_fast.utils.files import atomic_write, os_error_as_input_error
from cifar_fast.utils.progress import LOGGER

HOW_RESIZED = f"to {IMAGE_SIZE} x {IMAGE_SIZE}: upright, the largest square in the middle, bicubic"


@dataclass(frozen=True, eq=False)
class Found:
    """An image that is to be told: a file, or number ``index`` of a .npz file with its ``pixels``, uint8
    ``[32, 32, 3]``. ``label`` is its class, None where that is not known.
    """

    path: Path
    label: int | None = None
    index: int | None = None
    pixels: np.ndarray | None = None

    def __str__(self) -> str:
        return str(self.path) if self.index is None else f"{self.path}[{self.index}]"

    def read(self) -> tuple[np.ndarray, bool]:
        """Its pixels, uint8 ``[32, 32, 3]``, and whether it was resized, see :data:`HOW_RESIZED`; :class:`InputError`
        where it cannot be decoded.
        """
        if self.pixels is not None:
            return self.pixels, False
        resized = []

        def fit(image: Image.Image) -> Image.Image:
            resized.append(image.size)
            upright = ImageOps.exif_transpose(image)  # as a camera was held
            return ImageOps.fit(upright, (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)

        return decode_image(self.path, str(self), fit), bool(resized)


@dataclass(frozen=True, eq=False)
class Prediction:
    """What an image was taken for: ``probabilities`` ``[classes]``, on the CPU."""

    image: Found
    resized: bool
    probabilities: torch.Tensor

    @property
    def right(self) -> bool:
        """Whether the likeliest class is the label, where there is one."""
        return int(self.probabilities.argmax()) == self.image.label


def find_images(paths: Iterable[str | Path], class_names: Sequence[str]) -> list[Found]:
    """The images at ``paths``: files, folders and what is below them in the order of their names, .npz files.

    The label of a file in a folder is the first folder on the way down to it that has the name of a class; those of a
    .npz file are its labels. Raises :class:`InputError` for a path that holds no images.
    """
    found: list[Found] = []
    for path in (Path(path).expanduser() for path in paths):
        if path.is_dir():
            found += _in_folder(path, class_names)
        elif path.suffix == ".npz":
            found += _in_npz(path, len(class_names))
        elif path.is_file():
            found.append(Found(path))
        else:
            raise InputError(f"{path}: no such file; name image files, folders of them, or .npz files")
    return found


def _in_folder(folder: Path, class_names: Sequence[str]) -> list[Found]:
    left_out: Counter[str] = Counter()
    try:
        files = sorted(images_below(folder, left_out))
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}; name folders that can be read") from None
    if not files:
        raise InputError(
            f"{folder}: no image that Pillow reads in it; name image files, folders of them, or .npz files"
        )
    if left_out:
        LOGGER.info(f"left out {left_out.total()} files under {folder} that are no images: {by_kind(left_out)}")
    numbers = {name: number for number, name in enumerate(class_names)}
    above = [file.relative_to(folder).parts[:-1] for file in files]
    return [
        Found(file, next((numbers[name] for name in names if name in numbers), None))
        for file, names in zip(files, above)
    ]


def _in_npz(path: Path, num_classes: int) -> list[Found]:
    images, labels = read_npz(path)
    check_images(str(path), images, np.zeros(images.shape[:1], int) if labels is None else labels)
    if labels is None:
        return [Found(path, None, index, pixels) for index, pixels in enumerate(images)]
    if labels.max() >= num_classes:
        raise InputError(f"{path}: its labels go up to {labels.max()}, but the model has {num_classes} classes")
    return [Found(path, label, index, pixels) for index, (label, pixels) in enumerate(zip(labels.tolist(), images))]


def predictions(
    model: Classifier,
    images: Sequence[Found],
    *,
    batch_size: int = 512,
    flip_average: bool = False,
    on_broken: Callable[[Found, str], None],
) -> Iterator[Prediction]:
    """What ``model`` takes each of ``images`` for, in their order; for one that cannot be decoded ``on_broken`` is
    called with the reason in a line.
    """
    for start in range(0, len(images), batch_size):
        read: list[tuple[Found, np.ndarray, bool]] = []
        for image in images[start : start + batch_size]:
            try:
                read.append((image, *image.read()))
            except InputError as error:
                on_broken(image, str(error))
        if read:
            pixels = np.stack([pixels for _, pixels, _ in read])
            found = model.predict(pixels, flip_average=flip_average, batch_size=batch_size).cpu()
            for (image, _, resized), probabilities in zip(read, found):
                yield Prediction(image, resized, probabilities)


def write_report(
    path: Path,
    names: Sequence[str],
    told: Sequence[Prediction],
    broken: Mapping[str, str],
    *,
    top: int,
    flip_average: bool,
) -> None:
    """The ``top`` classes of each prediction as JSON, see docs/outputs.md; ``names`` of all classes."""
    images = []
    for one in told:
        best = one.probabilities.topk(top)
        images.append(
            {
                "path": str(one.image.path),
                "index": one.image.index,
                "classes": [names[number] for number in best.indices.tolist()],
                "probabilities": best.values.tolist(),
                "label": None if one.image.label is None else names[one.image.label],
                "resized": one.resized,
            }
        )
    report: dict[str, Any] = {
        "class_names": list(names),
        "flip_average": flip_average,
        "accuracy": accuracy(told),
        "images": images,
        "broken": [{"path": name, "error": error} for name, error in broken.items()],
    }
    with os_error_as_input_error(f"--json {path}", "choose another file"), atomic_write(path) as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")


def accuracy(told: Sequence[Prediction]) -> float | None:
    """In %, over the images whose label is known; None where there is none."""
    right = [one.right for one in told if one.image.label is not None]
    return 100 * sum(right) / len(right) if right else None
