"""Additional test sets in their published formats: CIFAR-10.1, CIFAR-10.2, CIFAR-10-C, and ``.npz`` files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cifar_fast.data.dataset import check_images, new_labels
from cifar_fast.utils.errors import InputError, first_line, option

KEYS = (("images", "labels"), ("test_images", "test_labels"), ("data", "labels"))
"""Names of images and labels in an .npz file: in CIFAR-10.2, in this project's files, and in others."""


@dataclass(frozen=True, eq=False)
class EvalSet:
    """A named test set: uint8 images ``[N, 32, 32, 3]`` and int64 labels ``[N]``, -1 for a class not trained on.

    Images of a .npy file stay on disk until they are used.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray

    @property
    def indices(self) -> np.ndarray:
        """Indices of the images to evaluate. These are the images whose class is in the training data."""
        return np.flatnonzero(self.labels >= 0)


def read_eval_sets(paths: Mapping[str, str | Path], num_classes: int, classes: tuple[int, ...] = ()) -> list[EvalSet]:
    """Read the test sets at ``paths``. Each path is one of

    * a ``.npz`` file with ``images`` and ``labels``, as in CIFAR-10.2, or ``test_images`` and ``test_labels``;
    * a ``*_data.npy`` file with its ``*_labels.npy`` in the same folder, as in CIFAR-10.1;
    * a folder of such pairs, or of files of images with one ``labels.npy`` for all, as in CIFAR-10-C. Each file is a
      test set, NAME/FILE.

    ``num_classes`` is the number of classes of the whole training data. ``classes`` are the classes that are trained
    on; empty means all. An InputError names a test set that cannot be used.
    """
    eval_sets = []
    for eval_set in (one for name, path in paths.items() for one in _read(str(name), Path(path).expanduser())):
        name = f"{option('also_test')} {eval_set.name}"
        check_images(name, eval_set.images, eval_set.labels)
        labels = eval_set.labels.astype(np.int64)
        if labels.max() >= num_classes:
            raise InputError(
                f"{name}: its labels go up to {labels.max()}, but the training data has {num_classes} classes"
            )
        if classes:
            labels = new_labels(labels, classes)
            if (labels < 0).all():
                raise InputError(f"{name}: has no image of {option('classes')} {' '.join(map(str, classes))}")
        eval_sets.append(dataclasses.replace(eval_set, labels=labels))
    return eval_sets


def _read(name: str, path: Path) -> list[EvalSet]:
    if path.is_dir():
        return _read_folder(name, path)
    if path.suffix == ".npz":
        images, labels = read_npz(path)
        if labels is None:
            raise InputError(f"{path}: holds images without labels; it must hold both")
        return [EvalSet(name, images, labels)]
    if not path.name.endswith("_data.npy"):
        raise InputError(f"{path}: must be a .npz file, a *_data.npy file or a folder of .npy files")
    return [_read_pair(name, path)]


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the images of an .npz file in a published format, and its labels or None, both unchecked."""
    arrays = _load(path)
    for images, labels in KEYS:
        if images in arrays and labels in arrays:
            return arrays[images], arrays[labels]
    for images, _ in KEYS:
        if images in arrays:
            return arrays[images], None
    raise InputError(f"{path}: holds {', '.join(arrays)}; it must hold images and labels")


def _read_folder(name: str, folder: Path) -> list[EvalSet]:
    shared = folder / "labels.npy"
    if shared.is_file():
        labels = _load(shared)
        files = sorted(file for file in folder.glob("*.npy") if file != shared)
        sets = [EvalSet(f"{name}/{file.stem}", _load(file), labels) for file in files]
    else:
        files = sorted(folder.glob("*_data.npy"))
        sets = [_read_pair(f"{name}/{file.stem.removesuffix('_data')}", file) for file in files]
    if not sets:
        raise InputError(f"{folder}: no *_data.npy with its *_labels.npy, and no labels.npy beside other .npy files")
    return sets


def _read_pair(name: str, data: Path) -> EvalSet:
    """Read the images of a ``*_data.npy`` file and the labels of its ``*_labels.npy``."""
    labels = data.with_name(data.name.removesuffix("_data.npy") + "_labels.npy")
    return EvalSet(name, _load(data), _load(labels))


def _load(path: Path) -> Any:
    try:
        loaded = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
        if path.suffix == ".npy":
            return loaded
        with loaded:
            return dict(loaded)
    except Exception as error:  # damaged files raise many different types
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', '') or first_line(error)})") from None
