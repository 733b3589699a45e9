"""Data sets that people have in Python, as a :class:`Dataset`: torchvision's, Hugging Face's, arrays and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cifar_fast.data.arrays import as_labels
from cifar_fast.data.class_names import ClassNames
from cifar_fast.data.dataset import Dataset, check_images
from cifar_fast.data.images import as_images
from cifar_fast.data.options import VALIDATION
from cifar_fast.data.split import stratified_split
from cifar_fast.recipe import IMAGE_CHANNELS, IMAGE_SIZE
from cifar_fast.utils.errors import InputError, first_line, type_shown
from cifar_fast.utils.progress import LOGGER

TEST_FRACTION = 1 / 6
"""Fraction of the images of each class that is held out if there is no test split. It is that of CIFAR-10."""
FORMS = (
    "a Dataset as load_dataset returns it, a torchvision or Hugging Face data set of 32 x 32 images, a pair (images, "
    "labels) of arrays or tensors, or a pair (train, test) of such"
)
Split = tuple[np.ndarray, np.ndarray, tuple[str, ...]]
"""Images, labels and class names. The names are empty if the split has none."""


def as_dataset(given: Any) -> Dataset:
    """Return ``given`` as a :class:`Dataset`, with a test split.

    Args:
        given: a Dataset; one split, from which a test split is held out; a pair of splits (train, test); or a mapping
            with the splits ``train`` and ``test``, such as a DatasetDict. A split is a pair (images, labels), a
            Hugging Face Dataset, or a sequence of pairs (image, label) such as torchvision's data sets.

    Raises:
        InputError: it has another form, or its images are not 32 x 32 bytes in three channels.
    """
    if isinstance(given, Dataset):
        return given
    name, train, test = _splits(given)
    train_images, train_labels, names = train
    if test is None:
        kept, held_out = stratified_split(train_labels, TEST_FRACTION, seed=0)
        note = f"{name} has no test split: {len(held_out)} of its {len(train_labels)} images are held out for testing"
        parts = train_images[kept], train_labels[kept], train_images[held_out], train_labels[held_out]
        return Dataset(name, name, *parts, names, notes=(note,))
    test_images, test_labels, test_names = test
    if names and test_names:
        test_labels = ClassNames(names, name).renumber(test_labels, ClassNames(test_names, name), f"{name}, test")
    return Dataset(name, name, train_images, train_labels, test_images, test_labels, names or test_names)


def as_whole_dataset(given: Any, split: str) -> Dataset:
    """Return ``given`` as a :class:`Dataset` for one ``split``, with nothing held out.

    If there is one split only, it is both the training split and the test split.
    """
    if isinstance(given, Dataset):
        return given
    name, train, test = _splits(given)
    if test is None:
        if split == "test":
            raise InputError(
                f"{name} has one split, and test images are normalized with the statistics of the training images; "
                "give the pair (train, test)"
            )
        return Dataset(name, name, *train[:2], *train[:2], train[2])
    return as_dataset(given)


def _splits(given: Any) -> tuple[str, Split, Split | None]:
    """Return the name of ``given``, its training split, and its test split if it has one."""
    if isinstance(given, Mapping) and "train" in given:
        found = [name for name in ("test", *VALIDATION) if name in given]
        test = given[found[0]] if found else None
        for name in found[1:]:
            LOGGER.info(f"the split {name} is left out; the split {found[0]} is tested on")
        name = _name(given["train"])
        return name, _read(given["train"], name), None if test is None else _read(test, f"{name}, test")
    if isinstance(given, (tuple, list)) and len(given) == 2 and not _is_labels(given[1]):
        name = _name(given[0])
        return name, _read(given[0], f"{name}, train"), _read(given[1], f"{name}, test")
    name = _name(given)
    return name, _read(given, name), None


def _name(split: Any) -> str:
    return "arrays" if isinstance(split, (tuple, list)) else type(split).__name__


def _is_labels(value: Any) -> bool:
    """Return whether ``value`` holds labels: a number, or the probability of each class, for each image."""
    if hasattr(value, "dtype"):
        return len(value.shape) in (1, 2)
    return isinstance(value, (list, range)) and all(hasattr(one, "__index__") for one in value[:1])


def _read(split: Any, name: str) -> Split:
    if isinstance(split, (tuple, list)) and len(split) == 2 and _is_labels(split[1]):
        return *_checked(_array(split[0]), _array(split[1]), name), ()
    if hasattr(split, "features") and hasattr(split, "with_format") and hasattr(split, "__len__"):
        from cifar_fast.data.huggingface import read_table

        return read_table(name, split)
    is_sequence = hasattr(split, "__getitem__") and hasattr(split, "__len__")
    if isinstance(split, (str, bytes, type, Mapping)) or hasattr(split, "shape") or not is_sequence:
        hint = f"; load_dataset({split!r}) returns one" if isinstance(split, str) else ""
        raise InputError(f"dataset must be {FORMS}, not {type_shown(split)}{hint}")
    return *_checked(*_read_pairs(split, name), name), _class_names(split)


def _class_names(split: Any) -> tuple[str, ...]:
    """Return the names in the attribute ``classes``, also of the data set that a subset is of."""
    names = getattr(split, "classes", None)
    if names is None and hasattr(split, "indices"):
        return _class_names(split.dataset)
    return tuple(names) if isinstance(names, (list, tuple)) else ()


def _read_pairs(split: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Read a sequence of pairs (image, label). Arrays of all images and labels are read at once if it has them."""
    if hasattr(split, "indices") and hasattr(split, "dataset"):  # torch's Subset
        images, labels = _read_pairs(split.dataset, name)
        return images[list(split.indices)], labels[list(split.indices)]
    all_labels = getattr(split, "targets", getattr(split, "labels", None))
    transformed = any(getattr(split, f"{what}transform", None) is not None for what in ("", "target_"))
    if hasattr(split, "data") and all_labels is not None and not transformed:
        return _array(split.data), _array(all_labels)
    try:
        pairs = [(image, int(label)) for image, label in (split[i] for i in range(len(split)))]
    except Exception as error:  # the caller's data set may raise anything
        why = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{name}: its items cannot be read as pairs (image, label) ({why})") from error
    return _array([image for image, _ in pairs]), np.array([label for _, label in pairs], np.int64)


def _array(values: Any) -> np.ndarray:
    """Return an array, a tensor on any device, or a list of images as one array."""
    if hasattr(values, "shape"):
        return np.asarray(values.cpu() if hasattr(values, "cpu") else values)
    arrays = [np.asarray(one.cpu() if hasattr(one, "cpu") else one) for one in values]
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) > 1:
        raise InputError(f"dataset has images of different shapes: {shapes[0]} and {shapes[1]}")
    return np.array(arrays)


def _checked(images: np.ndarray, labels: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images with their channels last, and the labels."""
    if images.shape[1:] == (IMAGE_CHANNELS, IMAGE_SIZE, IMAGE_SIZE):
        images = images.transpose(0, 2, 3, 1)
    if images.dtype.kind == "f":
        raise InputError(
            f"{name}: images must be bytes (uint8), not {images.dtype}; leave out the transform that scales them"
        )
    images, labels = as_images(name, images)[0], as_labels(f"{name}: labels", labels)
    check_images(name, images, labels)
    return images, labels
