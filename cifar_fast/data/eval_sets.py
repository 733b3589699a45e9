"""Other test sets, in the forms in which they are published: CIFAR-10.1, CIFAR-10.2, CIFAR-10-C, and ``.npz`` files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cifar_fast.data.dataset import check_images, new_labels
from cifar_fast.utils.errors import InputError, first_line

KEYS = (("images", "labels"), ("test_images", "test_labels"), ("data", "labels"))
"""Names of a published .npz file's arrays; of CIFAR-10.2, of this project's own, and of others."""


@dataclass(frozen=True, eq=False)
class EvalSet:
    """Labelled images under a name; uint8 ``[N, 32, 32, 3]``, left on disk until they are used, and int64 ``[N]``, -1
    for those of classes that are not trained on.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray

    @property
    def places(self) -> np.ndarray:
        """Those of the images of the classes that are trained on."""
        return np.flatnonzero(self.labels >= 0)


def read_eval_sets(paths: Mapping[str, str | Path], num_classes: int, classes: tuple[int, ...] = ()) -> list[EvalSet]:
    """The test sets at ``paths``, of which ``classes`` are used where some are given; each of which is one of

    * a ``.npz`` file with ``images`` and ``labels``, as CIFAR-10.2's, or ``test_images`` and ``test_labels``;
    * a ``*_data.npy`` file with its ``*_labels.npy`` beside it, as CIFAR-10.1's;
    * a folder of such pairs, or of files of images and one ``labels.npy`` for all, as CIFAR-10-C's: a set each, named
      NAME/FILE.

    Raises :class:`InputError` that names the file at fault.
    """
    found = [test_set for name, path in paths.items() for test_set in _read(str(name), Path(path).expanduser())]
    for one in found:
        check_images(f"--also-test {one.name}", one.images, one.labels)
        if one.labels.max() >= num_classes:
            raise InputError(
                f"--also-test {one.name}: its labels go up to {one.labels.max()}, but the training images have "
                f"{num_classes} classes"
            )
    if not classes:
        return found
    found = [dataclasses.replace(one, labels=new_labels(one.labels, classes)) for one in found]
    for one in found:
        if not len(one.places):
            raise InputError(f"--also-test {one.name}: has no image of --classes {' '.join(map(str, classes))}")
    return found


def _read(name: str, path: Path) -> list[EvalSet]:
    if path.is_dir():
        return _read_folder(name, path)
    if path.suffix == ".npz":
        images, labels = read_npz(path)
        if labels is None:
            raise InputError(f"{path}: holds images without labels; it must hold images and labels")
        return [EvalSet(name, images, labels)]
    if not path.name.endswith("_data.npy"):
        raise InputError(f"{path}: must be a .npz file, a *_data.npy file or a folder of .npy files")
    return [EvalSet(name, _load(path), _labels(_load(_labels_of(path))))]


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The images of a published .npz file, as they are there, and its labels, None where it has none."""
    arrays = _load(path)
    for images, labels in KEYS:
        if images in arrays and labels in arrays:
            return arrays[images], _labels(arrays[labels])
    for images, _ in KEYS:
        if images in arrays:
            return arrays[images], None
    raise InputError(f"{path}: holds {', '.join(arrays)}; it must hold images and labels")


def _read_folder(name: str, folder: Path) -> list[EvalSet]:
    shared = folder / "labels.npy"
    if shared.is_file():
        labels = _labels(_load(shared))
        files = sorted(file for file in folder.glob("*.npy") if file != shared)
        sets = [EvalSet(f"{name}/{file.stem}", _load(file), labels) for file in files]
    else:
        files = sorted(folder.glob("*_data.npy"))
        sets = [
            EvalSet(f"{name}/{file.stem.removesuffix('_data')}", _load(file), _labels(_load(_labels_of(file))))
            for file in files
        ]
    if not sets:
        raise InputError(f"{folder}: no *_data.npy with its *_labels.npy, and no labels.npy beside other .npy files")
    return sets


def _labels_of(file: Path) -> Path:
    return file.with_name(file.name.removesuffix("_data.npy") + "_labels.npy")


def _load(path: Path) -> Any:
    try:
        loaded = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
        if path.suffix == ".npy":
            return loaded
        with loaded:
            return dict(loaded)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from None
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        raise InputError(f"{path}: cannot be read ({first_line(error)})") from None


def _labels(labels: np.ndarray) -> np.ndarray:
    """As int64 where they are whole numbers of another type; anything else is left for the check."""
    return labels.astype(np.int64) if labels.dtype.kind in "iu" else labels
