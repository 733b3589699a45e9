"""The :class:`Dataset` value and what a recipe makes of it."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cifar_fast.recipe import IMAGE_SIZE, Recipe
from cifar_fast.utils.errors import InputError
from cifar_fast.utils.files import atomic_write

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


MAX_CLASSES = 1000


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images, checked when made: a data set that exists is sound, else :class:`InputError` is raised.

    ``*_images`` are uint8 ``[N, 32, 32, 3]``, ``*_labels`` int64 ``[N]`` from 0 to the number of classes
    less one; each class has a training image. They may be given in any layout and any integer type of labels,
    and are held C-contiguous, writable and in native byte order: copied where they are not. ``source`` says
    in errors where the data came from, ``notes`` what :meth:`for_recipe` has made of it, a line each.
    """

    name: str
    source: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            images, labels = np.asarray(getattr(self, f"{split}_images")), np.asarray(getattr(self, f"{split}_labels"))
            check_images(self.source, images, labels, f"{split}_")
            # torchvision's arrays are transposed views, OpenCV's reversed ones: torch refuses some layouts and computes
            # in others, so that every later step would have to know them.
            layout: Any = ["C_CONTIGUOUS", "ALIGNED", "WRITEABLE", "ENSUREARRAY"]
            object.__setattr__(self, f"{split}_images", np.require(images, np.uint8, layout))
            object.__setattr__(self, f"{split}_labels", np.require(labels, np.int64, layout))
        names = map(_text, self.class_names) if len(self.class_names) else range(self.train_labels.max() + 1)
        object.__setattr__(self, "class_names", tuple(map(str, names)))
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
        if self.test_labels.max() >= self.num_classes:
            raise InputError(
                f"{self.source}: test_labels has class {self.test_labels.max()}, which train_labels lacks; "
                "take it out or add it there"
            )

    def steps_per_epoch(self, batch_size: int) -> int:
        """Steps of whole batches in an epoch; :class:`InputError` where there is none."""
        n = len(self.train_images)
        if n < batch_size:
            raise InputError(
                f"{self.source}: {n} training images are fewer than one batch of {batch_size}; give a smaller "
                "--batch-size"
            )
        return n // batch_size

    def for_recipe(self, recipe: Recipe) -> Dataset:
        """What ``recipe`` trains and tests on: its classes, its subset of the training images, its noise on their
        labels. The same in every run, whatever its seed.
        """
        dataset = self
        if recipe.classes:
            dataset = _only_classes(dataset, recipe.classes)
        if recipe.train_subset:
            dataset = _subset(dataset, recipe.train_subset)
        if recipe.label_noise:
            dataset = _with_label_noise(dataset, recipe.label_noise, recipe.label_noise_seed)
        return dataset

    def save(self, path: str | Path) -> None:
        """Write the arrays and class names to the .npz file ``path``, which ``load_dataset("npz", path)`` reads."""
        arrays = {name: getattr(self, name) for name in ARRAYS}
        with atomic_write(Path(path)) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays, class_names=np.array(self.class_names))

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def metadata(self) -> dict[str, Any]:
        """What a summary says of the data."""
        return {
            "name": str(self.name),
            "digest": self.digest,
            "train_images": len(self.train_images),
            "test_images": len(self.test_images),
            "class_names": list(self.class_names),
        }

    @cached_property
    def digest(self) -> str:
        """SHA-256 over shapes and bytes of the four arrays, in hexadecimal: equal for equal data, wherever it came
        from.
        """
        digest = hashlib.sha256()
        for array in (getattr(self, name) for name in ARRAYS):
            digest.update(repr(array.shape).encode())
            digest.update(array)
        return digest.hexdigest()


def _only_classes(dataset: Dataset, classes: tuple[int, ...]) -> Dataset:
    if max(classes) >= dataset.num_classes:
        raise InputError(
            f"{dataset.source}: classes must lie in 0 to {dataset.num_classes - 1}, not {' '.join(map(str, classes))}"
        )
    train_labels, test_labels = (new_labels(labels, classes) for labels in (dataset.train_labels, dataset.test_labels))
    in_train, in_test = train_labels >= 0, test_labels >= 0
    names = tuple(dataset.class_names[old] for old in classes)
    return dataclasses.replace(
        dataset,
        train_images=dataset.train_images[in_train],
        train_labels=train_labels[in_train],
        test_images=dataset.test_images[in_test],
        test_labels=test_labels[in_test],
        class_names=names,
        notes=(*dataset.notes, f"classes: {', '.join(names)}, of {dataset.num_classes}"),
    )


def new_labels(labels: np.ndarray, classes: tuple[int, ...]) -> np.ndarray:
    """Where in ``classes`` each of ``labels`` stands, -1 where it does not."""
    table = np.full(MAX_CLASSES, -1)
    table[list(classes)] = range(len(classes))
    return table[labels]


def _subset(dataset: Dataset, count: int) -> Dataset:
    """``count`` training images in their order, as many of each class; of what is left over the first have one more."""
    n, k, labels = len(dataset.train_images), dataset.num_classes, dataset.train_labels
    order = np.random.RandomState(0).permutation(n)
    shares = [count // k + (label < count % k) for label in range(k)]
    of_class = [order[labels[order] == label] for label in range(k)]
    most = k * min(map(len, of_class))
    if not k <= count <= most:
        raise InputError(
            f"{dataset.source}: train_subset must lie in {k} to {most}, for as many images of each class, not {count}"
        )
    chosen = np.sort(np.concatenate([found[:share] for found, share in zip(of_class, shares)]))
    images, labels = dataset.train_images[chosen], labels[chosen]
    note = f"train_subset: {count} of {n} training images, as many of each class"
    return dataclasses.replace(dataset, train_images=images, train_labels=labels, notes=(*dataset.notes, note))


def _with_label_noise(dataset: Dataset, share: float, seed: int) -> Dataset:
    """A ``share`` of the training labels replaced; of one seed, those of a smaller share are among them."""
    n, k = len(dataset.train_labels), dataset.num_classes
    random = np.random.RandomState(seed)
    chosen, shift = random.permutation(n)[: round(share * n)], random.randint(1, k, n)
    labels = dataset.train_labels.copy()
    labels[chosen] = (labels[chosen] + shift[chosen]) % k
    note = f"label_noise: {len(chosen)} of {n} training labels are of another class"
    return dataclasses.replace(dataset, train_labels=labels, notes=(*dataset.notes, note))


def check_images(source: str, images: np.ndarray, labels: np.ndarray, prefix: str = "") -> None:
    """Raise :class:`InputError` unless ``images`` are uint8 ``[N, 32, 32, 3]`` and ``labels`` whole numbers ``[N]``, N
    at least 1; ``source`` and ``prefix``, before the arrays' names, say which they are.
    """
    shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
    if images.dtype != np.uint8 or images.shape[1:] != shape:
        raise InputError(
            f"{source}: {prefix}images must be uint8 of shape (N, 32, 32, 3), not {images.dtype} of "
            f"shape {images.shape}"
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        must = f"whole numbers of shape {images.shape[:1]}, one per image"
        raise InputError(f"{source}: {prefix}labels must be {must}, not {labels.dtype} of shape {labels.shape}")
    if len(images) == 0:
        raise InputError(f"{source}: {prefix}images holds no image; there must be at least one")
    if labels.min() < 0 or labels.max() >= MAX_CLASSES:
        raise InputError(
            f"{source}: {prefix}labels must lie in 0 to {MAX_CLASSES - 1}, not {labels.min()} to {labels.max()}"
        )


def _text(name: Any) -> str:
    """A class name, which Python 2's pickles and numpy's "S" arrays have as bytes."""
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)
