"""Prediction for files: find images, decode them, classify them with a trained network, write the results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cifar_fast.data.arrays import SUFFIXES, read_images
from cifar_fast.data.class_names import ClassNames
from cifar_fast.data.dataset import check_images
from cifar_fast.data.image_folder import by_kind, images_below
from cifar_fast.data.images import as_images, decode_image
from cifar_fast.inference.classifier import Classifier
from cifar_fast.utils.errors import InputError, option
from cifar_fast.utils.files import expand_home, write_json
from cifar_fast.utils.progress import LOGGER


@dataclass(frozen=True, eq=False)
class ImageRef:
    """An image to classify: the file ``path``, or image number ``index`` of the array file ``path``.

    ``pixels``, uint8 ``[32, 32, 3]``, and ``resized`` are only set for an image of an array file. ``label`` is None if
    unknown.
    """

    path: Path
    label: int | None = None
    index: int | None = None
    pixels: np.ndarray | None = None
    resized: bool = False

    def __str__(self) -> str:
        return str(self.path) if self.index is None else f"{self.path}[{self.index}]"

    def read(self) -> tuple[np.ndarray, bool]:
        """Return the pixels, uint8 ``[32, 32, 3]``, and whether they were resized.

        Raises:
            InputError: the file cannot be decoded.
        """
        if self.pixels is not None:
            return self.pixels, self.resized
        return decode_image(self.path, str(self), resize=True)


@dataclass(frozen=True, eq=False)
class Prediction:
    """The result for one image: ``probabilities`` ``[classes]``, on the CPU."""

    image: ImageRef
    resized: bool
    probabilities: torch.Tensor


def find_images(
    paths: Iterable[str | Path], model: Classifier, on_unreadable: Callable[[Path, str], None] | None = None
) -> list[ImageRef]:
    """Return the images in ``paths``: image files, folders with subfolders, and files of arrays.

    The images of a folder are in the order of their paths. The label of such an image comes from its path: the
    folder that is named after a class of ``model``. The labels of an array file are its own. They are compared by the
    file's class names, or by number if it has none. ``on_unreadable`` is called with each path that cannot be used, and
    a one-line reason.

    Raises:
        InputError: a path contains no images, or a label is not a class of ``model``. If
            ``on_unreadable`` is given, no path can be used.
    """
    images: list[ImageRef] = []
    unusable: list[tuple[Path, InputError]] = []
    for path in (expand_home(path) for path in paths):
        try:
            images += _images_of(path, model)
        except InputError as error:
            if on_unreadable is None:
                raise
            unusable.append((path, error))
    for path, reason in unusable:
        if not images:
            raise reason
        if on_unreadable:
            on_unreadable(path, reason.message)
    return images


def _images_of(path: Path, model: Classifier) -> list[ImageRef]:
    if path.is_dir():
        return _images_of_folder(path, model.class_names)
    if not path.is_file():
        raise InputError(f"{path}: no such file; give image files, folders of them, or files of arrays")
    return _images_of_arrays(path, model) if path.suffix in SUFFIXES else [ImageRef(path)]


def _images_of_folder(folder: Path, class_names: ClassNames) -> list[ImageRef]:
    ignored: Counter[str] = Counter()
    try:
        files = list(images_below(folder, ignored))
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}; give folders that can be read") from None
    if not files:
        raise InputError(f"{folder}: no image that Pillow reads; give image files, folders of them, or files of arrays")
    if ignored:
        LOGGER.info(f"ignored {ignored.total()} files under {folder} that are not images: {by_kind(ignored)}")
    return [ImageRef(file, _label_of_path(file, folder, class_names)) for file in files]


def _label_of_path(file: Path, folder: Path, class_names: ClassNames) -> int | None:
    """Return the number of the class that a folder of ``file`` below ``folder`` is named after, or None."""
    folders = map(class_names.number, file.relative_to(folder).parts[:-1])
    numbers = sorted({number for number in folders if number is not None})
    if len(numbers) > 1:
        names = " and ".join(class_names[number] for number in numbers)
        raise InputError(f"{file}: lies in folders of several classes, {names}; give the folder that holds the classes")
    return numbers[0] if numbers else None


def _images_of_arrays(path: Path, model: Classifier) -> list[ImageRef]:
    arrays, labels, names = read_images(path)
    images, resized = as_images(f"{path}: images", arrays, resize=True)
    check_images(str(path), images, np.zeros(images.shape[:1], int) if labels is None else labels)
    if labels is None:
        numbers: list[int | None] = [None] * len(images)
    elif model.recipe.classes and not names:
        raise InputError(
            f"{path}: has labels but no class_names, and the model was trained on some classes of its data, "
            f"{model.class_names}; add class_names, or remove the labels"
        )
    else:
        numbers = model.class_names.renumber(labels, names, str(path)).tolist()
    return [
        ImageRef(path, label, index, pixels, resized > 0) for index, (label, pixels) in enumerate(zip(numbers, images))
    ]


def classify(
    model: Classifier,
    images: Sequence[ImageRef],
    *,
    batch_size: int = 512,
    flip_average: bool = False,
    on_unreadable: Callable[[ImageRef, str], None],
) -> Iterator[Prediction]:
    """Yield the prediction of ``model`` for each image, in order.

    An image that cannot be decoded has no prediction. ``on_unreadable`` is called with it and a one-line reason.
    """
    for start in range(0, len(images), batch_size):
        decoded: list[tuple[ImageRef, np.ndarray, bool]] = []
        for image in images[start : start + batch_size]:
            try:
                decoded.append((image, *image.read()))
            except InputError as error:
                on_unreadable(image, error.message)
        if decoded:
            pixels = np.stack([pixels for _, pixels, _ in decoded])
            batch = model.predict(pixels, flip_average=flip_average, batch_size=batch_size).cpu()
            for (image, _, resized), probabilities in zip(decoded, batch):
                yield Prediction(image, resized, probabilities)


def accuracy(predictions: Sequence[Prediction]) -> float | None:
    """Return the accuracy in %, over the images with a label. Return None if there are none."""
    labeled = [(one.probabilities, one.image.label) for one in predictions if one.image.label is not None]
    correct = [int(probabilities.argmax()) == label for probabilities, label in labeled]
    return 100 * sum(correct) / len(correct) if correct else None


def write_predictions(
    path: Path,
    class_names: Sequence[str],
    predictions: Sequence[Prediction],
    unreadable: Mapping[str, str],
    *,
    top: int,
    flip_average: bool,
) -> None:
    """Write the ``top`` most probable classes of each image to ``path`` as JSON; docs/outputs.md describes the keys.

    ``unreadable`` has the reason for each image that could not be decoded, by its name. ``flip_average`` is whether
    each image was averaged with its mirror image.
    """
    images = []
    for prediction in predictions:
        best = prediction.probabilities.topk(top)
        image = prediction.image
        images.append(
            {
                "path": str(image.path),
                "index": image.index,
                "classes": [class_names[index] for index in best.indices.tolist()],
                "probabilities": best.values.tolist(),
                "label": None if image.label is None else class_names[image.label],
                "resized": prediction.resized,
            }
        )
    report = {
        "class_names": list(class_names),
        "flip_average": flip_average,
        "accuracy": accuracy(predictions),
        "images": images,
        "unreadable": [{"path": name, "error": error} for name, error in unreadable.items()],
    }
    write_json(path, report, f"{option('json')} {path}")
