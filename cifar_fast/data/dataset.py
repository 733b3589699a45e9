"""The :class:`Dataset` value, its checks, and the changes that a recipe makes to it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cifar_fast.data.class_names import ClassNames
from cifar_fast.data.options import DataOptions
from cifar_fast.data.split import stratified_split
from cifar_fast.recipe import IMAGE_SIZE, Recipe
from cifar_fast.utils.errors import InputError, option
from cifar_fast.utils.files import as_path, atomic_write

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
VALIDATION_ARRAYS = ("validation_images", "validation_labels")
MAX_CLASSES = 1000


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labeled images for training and testing. The constructor checks them.

    Images may have any memory layout and labels any integer type. The data set holds C-contiguous, writable arrays in
    native byte order. It copies an array only if that array is not in this form.

    Args:
        name: name of the data set, for reports.
        source: file or address of the data, for error messages.
        train_images, test_images: uint8 ``[N, 32, 32, 3]``.
        train_labels, test_labels: integers ``[N]``, from 0 to the number of classes minus 1. Each class needs at least
            one training image.
        class_names: names of the classes in the order of their numbers, or a mapping as for :class:`ClassNames`;
            their numbers by default.
        notes: lines that say what :meth:`for_recipe` changed.
        options: how :func:`cifar_fast.load_dataset` read the data.
        validation_images, validation_labels: images that are not trained on, to choose between trainings; None if there
            are none.

    Raises:
        InputError: an array is not as described.
    """

    name: str
    source: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    options: DataOptions = dataclasses.field(default=DataOptions())
    validation_images: np.ndarray | None = None
    validation_labels: np.ndarray | None = None
    _held_out: dict[tuple[float, int], Dataset] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        evaluated = ("validation", "test") if self.validation_images is not None else ("test",)
        for split in ("train", *evaluated):
            images, labels = np.asarray(getattr(self, f"{split}_images")), np.asarray(getattr(self, f"{split}_labels"))
            check_images(self.source, images, labels, f"{split}_")
            # torchvision's arrays are transposed views and OpenCV's are reversed ones. torch refuses some such layouts
            # and keeps others, so every later step would have to handle them.
            layout: Any = ["C_CONTIGUOUS", "ALIGNED", "WRITEABLE", "ENSUREARRAY"]
            object.__setattr__(self, f"{split}_images", np.require(images, np.uint8, layout))
            object.__setattr__(self, f"{split}_labels", np.require(labels, np.int64, layout))
        names = ClassNames(self.class_names, self.source) or ClassNames(range(self.train_labels.max() + 1))
        object.__setattr__(self, "class_names", names)
        if not 2 <= self.num_classes <= MAX_CLASSES:
            raise InputError(f"{self.source}: {self.num_classes} class(es); there must be 2 to {MAX_CLASSES}")
        if self.train_labels.max() >= self.num_classes:
            raise InputError(
                f"{self.source}: train_labels go up to {self.train_labels.max()}, but only {self.num_classes} "
                "classes are named"
            )
        counts = np.bincount(self.train_labels, minlength=self.num_classes)
        if not counts.all():
            raise InputError(
                f"{self.source}: class {self.class_names[counts.argmin()]} has no training image; number the "
                "classes from 0 without gaps"
            )
        for name in (f"{split}_labels" for split in evaluated):
            if (highest := getattr(self, name).max()) >= self.num_classes:
                raise InputError(
                    f"{self.source}: {name} has class {highest}, which train_labels lacks; remove it or add training "
                    "images of it"
                )

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return the number of whole batches in an epoch."""
        return len(self.train_images) // batch_size

    def check_trainable(self, batch_size: int) -> None:
        """Raise :class:`InputError` if there is no whole batch, or if a channel is constant."""
        n = len(self.train_images)
        if n < batch_size:
            raise InputError(
                f"{self.source}: {n} training images are fewer than one batch of {batch_size}; give a smaller "
                f"{option('batch_size')}"
            )
        # Reduce over the images first. numpy is many times slower if it reduces over images and pixels at once, because
        # the three channels are then the innermost dimension.
        lowest, highest = self.train_images.min(axis=0), self.train_images.max(axis=0)
        if (lowest.min(axis=(0, 1)) == highest.max(axis=(0, 1))).any():
            raise InputError(
                f"{self.source}: a channel of train_images has the same value everywhere; it cannot be normalized"
            )

    def for_recipe(self, recipe: Recipe, validation: int | float = 0, validation_seed: int = 0) -> Dataset:
        """Return the data that ``recipe`` trains and tests on.

        Select its classes, hold out the validation images, select the subset of the others, and apply the label noise
        to it. The result is the same in every run. It does not depend on the seed of the training.

        Args:
            validation: number or fraction of the training images to hold out, see :func:`stratified_split`.
        """
        dataset = self
        if recipe.classes:
            dataset = _only_classes(dataset, dataset.class_numbers(recipe.classes))
        if validation:
            key = validation, validation_seed
            if key not in dataset._held_out:  # the variants of a sweep share the images
                dataset._held_out[key] = _with_validation(dataset, *key)
            dataset = dataset._held_out[key]
        if recipe.train_subset:
            dataset = _subset(dataset, recipe.train_subset)
        if recipe.label_noise:
            dataset = _with_label_noise(dataset, recipe.label_noise, recipe.label_noise_seed)
        lines = [dataset._lacking(split) for split in ("validation", "test") if f"{split}_labels" in dataset.arrays]
        notes = (*dataset.notes, *(line for line in lines if line and line not in dataset.notes))
        return dataset if notes == dataset.notes else dataclasses.replace(dataset, notes=notes)

    def _lacking(self, split: str) -> str:
        """Return a line about the classes without an image in ``split``; empty if there are none."""
        lacking = lacking_classes(getattr(self, f"{split}_labels"), self.class_names)
        return lacking and f"{split} images: {lacking}, so the {split} accuracy does not cover all classes"

    def class_numbers(self, classes: Sequence[int | str]) -> tuple[int, ...]:
        """Return the numbers of ``classes``, which are names and numbers; see :meth:`ClassNames.choose`."""
        return ClassNames(self.class_names).choose(classes, str(self.source))

    def save(self, path: str | Path) -> None:
        """Write the arrays and class names to the .npz file ``path``. ``load_dataset("npz", path)`` reads it."""
        arrays = {name: getattr(self, name) for name in self.arrays}
        with atomic_write(as_path(path, "path")) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays, class_names=np.array(self.class_names))

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of the arrays that the data set has."""
        return ARRAYS if self.validation_images is None else (*ARRAYS, *VALIDATION_ARRAYS)

    @property
    def evaluated_count(self) -> int:
        """Number of images that are not trained on: test images, and validation images if there are any."""
        return len(self.test_images) + (0 if self.validation_images is None else len(self.validation_images))

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def metadata(self) -> dict[str, Any]:
        """Return the description of the data that ``summary.json`` holds."""
        return {
            "name": str(self.name),
            "digest": self.digest,
            "train_images": len(self.train_images),
            "validation_images": 0 if self.validation_images is None else len(self.validation_images),
            "test_images": len(self.test_images),
            "class_names": list(self.class_names),
            "options": self.options.given(),
        }

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the shapes and bytes of the arrays, in hexadecimal, whatever their source."""
        digest = hashlib.sha256()
        for name in self.arrays:
            array = getattr(self, name)
            digest.update(repr(array.shape).encode())
            digest.update(array)
        return digest.hexdigest()


def _only_classes(dataset: Dataset, classes: tuple[int, ...]) -> Dataset:
    names = tuple(dataset.class_names[old] for old in classes)
    arrays: dict[str, Any] = {}
    for of_images, of_labels in zip(dataset.arrays[::2], dataset.arrays[1::2]):
        labels = new_labels(getattr(dataset, of_labels), classes)
        chosen = labels >= 0
        arrays |= {of_images: getattr(dataset, of_images)[chosen], of_labels: labels[chosen]}
    return dataclasses.replace(
        dataset,
        **arrays,
        class_names=names,
        notes=(*dataset.notes, f"classes: {', '.join(names)}, of {dataset.num_classes}"),
    )


def new_labels(labels: np.ndarray, classes: tuple[int, ...]) -> np.ndarray:
    """Return the index in ``classes`` of each of ``labels``, or -1 if it is not among them."""
    table = np.full(MAX_CLASSES, -1)
    table[list(classes)] = range(len(classes))
    return table[labels]


def _with_validation(dataset: Dataset, held_out: int | float, seed: int) -> Dataset:
    """Move training images to the validation images, with the same share of each class."""
    if dataset.validation_images is not None:
        raise InputError(f"{dataset.source}: has validation images already; leave {option('validation')} out")
    try:
        kept, chosen = stratified_split(dataset.train_labels, held_out, seed)
    except InputError as error:
        raise InputError(f"{dataset.source}: {option('validation')} {error.message}") from None
    n, images, labels = len(dataset.train_images), dataset.train_images, dataset.train_labels
    note = f"validation: {len(chosen)} of {n} training images held out, the same share of each class, seed {seed}"
    return dataclasses.replace(
        dataset,
        train_images=images[kept],
        train_labels=labels[kept],
        validation_images=images[chosen],
        validation_labels=labels[chosen],
        notes=(*dataset.notes, note),
    )


def _subset(dataset: Dataset, count: int) -> Dataset:
    """Keep ``count`` training images in their order, balanced over the classes.

    If the classes do not divide ``count``, the first ones have one more image. Smaller subsets are part of larger ones.
    """
    n, k, labels = len(dataset.train_images), dataset.num_classes, dataset.train_labels
    order = np.random.RandomState(0).permutation(n)
    by_class = [order[labels[order] == label] for label in range(k)]
    largest = k * min(map(len, by_class))
    if not k <= count <= largest:
        raise InputError(
            f"{dataset.source}: {option('train_subset')} must lie in {k} to {largest}, not {count}, so that the "
            "subset is balanced over the classes"
        )
    chosen = np.sort(np.concatenate([by_class[label][: count // k + (label < count % k)] for label in range(k)]))
    return dataclasses.replace(
        dataset,
        train_images=dataset.train_images[chosen],
        train_labels=labels[chosen],
        notes=(*dataset.notes, f"train_subset: {count} of {n} training images, balanced over the classes"),
    )


def _with_label_noise(dataset: Dataset, fraction: float, seed: int) -> Dataset:
    """Replace a ``fraction`` of the training labels by other classes, uniformly at random.

    A larger fraction replaces the labels that a smaller one with the same seed replaces, and more.
    """
    n, k = len(dataset.train_labels), dataset.num_classes
    random = np.random.RandomState(seed)
    chosen, shift = random.permutation(n)[: round(fraction * n)], random.randint(1, k, n)
    labels = dataset.train_labels.copy()
    labels[chosen] = (labels[chosen] + shift[chosen]) % k
    note = f"label_noise: {len(chosen)} of {n} training labels replaced by another class"
    return dataclasses.replace(dataset, train_labels=labels, notes=(*dataset.notes, note))


def lacking_classes(labels: np.ndarray, class_names: Sequence[str]) -> str:
    """Return which classes have no image among ``labels``, for a person; empty if each has one."""
    counts = np.bincount(labels, minlength=len(class_names))
    lacking = [name for name, count in zip(class_names, counts) if not count]
    return f"none of class {ClassNames(lacking)}, {len(lacking)} of {len(class_names)} classes" if lacking else ""


def check_images(source: str, images: np.ndarray, labels: np.ndarray, prefix: str = "") -> None:
    """Raise :class:`InputError` unless ``images`` are uint8 ``[N, 32, 32, 3]`` and ``labels`` integers ``[N]``, N >= 1.

    The message starts with ``source``, and ``prefix`` precedes the name of the array.
    """
    shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
    if images.dtype != np.uint8 or images.shape[1:] != shape:
        raise InputError(
            f"{source}: {prefix}images must be uint8 of shape (N, 32, 32, 3), not {images.dtype} of "
            f"shape {images.shape}"
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise InputError(
            f"{source}: {prefix}labels must be integers of shape {images.shape[:1]}, one per image, not {labels.dtype} "
            f"of shape {labels.shape}"
        )
    if len(images) == 0:
        raise InputError(f"{source}: {prefix}images holds no image; give at least one")
    if labels.min() < 0 or labels.max() >= MAX_CLASSES:
        raise InputError(
            f"{source}: {prefix}labels must lie in 0 to {MAX_CLASSES - 1}, not {labels.min()} to {labels.max()}"
        )
