"""Additional test sets in their published formats: CIFAR-10.1, CIFAR-10.2, CIFAR-10-C, and ``.npz`` files."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cifar_fast.data.arrays import SUFFIXES, read_images
from cifar_fast.data.class_names import ClassNames
from cifar_fast.data.dataset import check_images, new_labels
from cifar_fast.data.images import as_images, tell_resized
from cifar_fast.utils.errors import InputError, option
from cifar_fast.utils.files import expand_home

IMAGES_AT_ONCE = 5000
"""Number of images that are read from disk at once for a digest."""


EXTRA_CORRUPTIONS = ("gaussian_blur", "saturate", "spatter", "speckle_noise")
"""Corruptions of CIFAR-10-C that its authors keep for validation. The usual mean is over the other fifteen."""
SEVERITIES = 5
"""The number of severities in a file of CIFAR-10-C, one after another with the same labels."""


@dataclass(frozen=True, eq=False)
class EvalSet:
    """A named test set: uint8 images ``[N, 32, 32, 3]`` and int64 labels ``[N]``, -1 for a class not trained on.

    ``class_names`` are the names of the classes in its file, if it has any. ``group`` is the name of the folder of
    corruptions that it is from, if any. The images of such a set are in equal parts of ``severities`` 1, 2, 3, ...

    Images of a .npy file stay on disk until they are used.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    class_names: ClassNames | None = None
    group: str = ""
    severities: int = 1

    @property
    def in_mean(self) -> bool:
        """Whether it counts in the mean over corruptions: those of CIFAR-10-C for validation do not."""
        return bool(self.group) and self.name.removeprefix(f"{self.group}/") not in EXTRA_CORRUPTIONS

    @property
    def indices(self) -> np.ndarray:
        """Indices of the images to evaluate. These are the images whose class is in the training data."""
        return np.flatnonzero(self.labels >= 0)

    def digest(self, class_names: Sequence[str]) -> str:
        """Return the SHA-256 of the evaluated images and their classes in hexadecimal, whatever their file.

        ``class_names`` are the names of the labels. Two numberings of the same classes have the same digest.
        """
        digest, indices = hashlib.sha256(), self.indices
        used = sorted(class_names[label] for label in np.unique(self.labels[indices]))
        number = {name: k for k, name in enumerate(used)}
        numbers = np.array([number.get(name, -1) for name in class_names])
        digest.update(repr((len(indices), used)).encode())
        digest.update(numbers[self.labels[indices]].tobytes())
        for start in range(0, len(indices), IMAGES_AT_ONCE):
            digest.update(self.images[indices[start : start + IMAGES_AT_ONCE]].tobytes())
        return digest.hexdigest()


def read_eval_sets(
    paths: Mapping[str, str | Path], class_names: Sequence[str], classes: tuple[int, ...] = (), resize: bool = False
) -> list[EvalSet]:
    """Read the test sets at ``paths``. Each path is one of

    * a file that :func:`cifar_fast.data.arrays.read_images` reads, with labels, as CIFAR-10.1, CIFAR-10.2 and SVHN are
      published; the ``class_names`` of a .npz file are compared with those of the training data;
    * a folder of pairs ``*_data.npy`` and ``*_labels.npy``, or of files of images with one ``labels.npy`` for all, as
      in CIFAR-10-C. Each file is a test set, NAME/FILE.

    ``class_names`` are those of the whole training data. ``classes`` are the numbers of the classes that are trained
    on; empty means all. ``resize`` scales images of other sizes. An InputError names a test set that cannot be used.
    """
    eval_sets = []
    for eval_set in (one for name, path in paths.items() for one in _read(str(name), expand_home(path))):
        name = f"{option('also_test')} {eval_set.name}"
        images, resized = as_images(f"{name}: images", eval_set.images, resize)
        check_images(name, images, eval_set.labels)
        tell_resized(resized, len(images), name)
        labels = ClassNames(class_names).renumber(eval_set.labels, eval_set.class_names, f"test set {eval_set.name}")
        if classes:
            labels = new_labels(labels, classes)
            if (labels < 0).all():
                chosen = " ".join(class_names[number] for number in classes)
                raise InputError(f"{name}: has no image of {option('classes')} {chosen}")
        eval_sets.append(dataclasses.replace(eval_set, images=images, labels=labels))
    return eval_sets


def _read(name: str, path: Path) -> list[EvalSet]:
    if path.is_dir():
        return _read_folder(name, path)
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: must be a .npz, .npy or .mat file, or a folder of .npy files")
    return [_read_file(name, path)]


def _read_file(name: str, path: Path) -> EvalSet:
    images, labels, class_names = read_images(path)
    if labels is None:
        where = "beside it, in NAME_labels.npy for NAME_data.npy or in labels.npy" if path.suffix == ".npy" else "too"
        raise InputError(f"{path}: holds images without labels; they must be there {where}")
    return EvalSet(name, images, labels, class_names)


def _read_folder(name: str, folder: Path) -> list[EvalSet]:
    shared = folder / "labels.npy"
    files = sorted(folder.glob("*.npy" if shared.is_file() else "*_data.npy"))
    sets = [_read_file(f"{name}/{file.stem.removesuffix('_data')}", file) for file in files if file != shared]
    if sets and shared.is_file():
        parts = np.split(sets[0].labels, SEVERITIES) if len(sets[0].labels) % SEVERITIES == 0 else []
        severities = SEVERITIES if parts and all(np.array_equal(part, parts[0]) for part in parts) else 1
        sets = [dataclasses.replace(one, group=name, severities=severities) for one in sets]
    if not sets:
        raise InputError(f"{folder}: no *_data.npy with its *_labels.npy, and no labels.npy beside other .npy files")
    return sets
