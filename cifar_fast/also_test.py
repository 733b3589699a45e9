"""Other test sets, in the forms in which they are published: CIFAR-10.1, CIFAR-10.2, CIFAR-10-C, and ``.npz`` files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cifar_fast.backends import Backend, make_model
from cifar_fast.data import Dataset, check_images, new_labels
from cifar_fast.errors import InputError, first_line

KEYS = (("images", "labels"), ("test_images", "test_labels"), ("data", "labels"))
"""Names of a published .npz file's arrays; of CIFAR-10.2, of this project's own, and of others."""


@dataclass(frozen=True, eq=False)
class ExtraTestSet:
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


def read_test_sets(
    paths: Mapping[str, str | Path], num_classes: int, classes: tuple[int, ...] = ()
) -> list[ExtraTestSet]:
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


def _read(name: str, path: Path) -> list[ExtraTestSet]:
    if path.is_dir():
        return _read_folder(name, path)
    if path.suffix == ".npz":
        images, labels = read_npz(path)
        if labels is None:
            raise InputError(f"{path}: holds images without labels; it must hold images and labels")
        return [ExtraTestSet(name, images, labels)]
    if not path.name.endswith("_data.npy"):
        raise InputError(f"{path}: must be a .npz file, a *_data.npy file or a folder of .npy files")
    return [ExtraTestSet(name, _load(path), _labels(_load(_labels_of(path))))]


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


def _read_folder(name: str, folder: Path) -> list[ExtraTestSet]:
    shared = folder / "labels.npy"
    if shared.is_file():
        labels = _labels(_load(shared))
        files = sorted(file for file in folder.glob("*.npy") if file != shared)
        sets = [ExtraTestSet(f"{name}/{file.stem}", _load(file), labels) for file in files]
    else:
        files = sorted(folder.glob("*_data.npy"))
        sets = [
            ExtraTestSet(f"{name}/{file.stem.removesuffix('_data')}", _load(file), _labels(_load(_labels_of(file))))
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


@torch.no_grad()
def plain_logits(
    backend: Backend,
    dataset: Dataset,
    normalization: tuple[torch.Tensor, torch.Tensor],
    images: np.ndarray,
    places: np.ndarray | None = None,
) -> torch.Tensor:
    """Logits ``[N, classes]`` of ``images``, uint8 ``[N, 32, 32, 3]``, or of those at ``places``, by the plain model in
    the dtype of ``backend``, with the weights that it holds; on its device.

    ``normalization``: mean and deviation of the training images, as :func:`cifar_fast.backends.channel_statistics`.
    """
    recipe, device, dtype = backend.recipe, backend.device, backend.dtype
    model = make_model(recipe, dataset, device, dtype, backend.own_model).to(memory_format=backend.memory_format)
    model.load_state_dict(backend.state_dict())
    model.eval()
    mean, std = normalization
    places = np.arange(len(images)) if places is None else places
    logits = []
    for start in range(0, len(places), recipe.batch_size):
        batch = images[places[start : start + recipe.batch_size]]
        batch = torch.tensor(np.ascontiguousarray(batch), device=device)
        batch = ((batch - mean) / std).to(dtype).permute(0, 3, 1, 2).contiguous(memory_format=backend.memory_format)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False):
            logits.append(model(batch))
    return torch.cat(logits)


def accuracy(
    backend: Backend, dataset: Dataset, normalization: tuple[torch.Tensor, torch.Tensor], test: ExtraTestSet
) -> float:
    """The accuracy in % on ``test`` by :func:`plain_logits`."""
    logits = plain_logits(backend, dataset, normalization, test.images, test.places)
    right = logits.argmax(dim=1).cpu().numpy() == test.labels[test.places]
    return 100 * int(right.sum()) / len(right)
