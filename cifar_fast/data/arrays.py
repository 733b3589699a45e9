"""Files of arrays, as NumPy, MATLAB and published data sets write them: images with labels, and labels alone.

No file can run code when it is read.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cifar_fast.data.class_names import ClassNames
from cifar_fast.utils.errors import InputError, first_line, option, plain
from cifar_fast.utils.files import expand_home, regular
from cifar_fast.utils.progress import LOGGER

KEYS = (("images", "labels"), ("test_images", "test_labels"), ("data", "labels"))
"""Names of images and labels in an .npz file: in CIFAR-10.2, in this project's files, and in others."""
UNPACKED_BYTES, MOST_COMPRESSED = 1 << 30, 100
"""An .npz file may unpack to so many bytes, or to so many times its size."""
SUFFIXES = (".npz", ".npy", ".mat")
"""Files of images that :func:`read_images` reads."""
DIGITS = tuple("0123456789")


def load(path: Path, *keys: str) -> Any:
    """Return the array of a .npy file, which stays on disk until it is used, or the arrays of an .npz file by name.

    ``keys`` are the arrays of the .npz file to read, if they are there. By default all are read.
    """
    try:
        loaded = np.load(regular(path), mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            wanted = [key for key in loaded.files if not keys or key in keys]
            _refuse_bomb(path, loaded.zip, wanted)
            arrays = {key: loaded[key] for key in wanted}
        if other := [key for key, array in arrays.items() if not isinstance(array, np.ndarray)]:
            raise ValueError(f"{other[0]} is no array")
        return arrays
    except Exception as error:  # damaged files raise many different types
        raise InputError(f"{path}: cannot be read ({_reason(path, error)})") from None


def _refuse_bomb(path: Path, archive: zipfile.ZipFile, names: Sequence[str]) -> None:
    """Raise ValueError if the arrays ``names`` are far larger than their file, as no images are."""
    unpacked = sum(one.file_size for one in archive.infolist() if one.filename.removesuffix(".npy") in names)
    if unpacked > max(UNPACKED_BYTES, MOST_COMPRESSED * path.stat().st_size):
        raise ValueError(
            f"it unpacks to {unpacked:,} bytes, over {MOST_COMPRESSED} times its size; save it uncompressed"
        )


def _reason(path: Path, error: Exception) -> str:
    """Return why numpy cannot read a file. Its own reason may advise to read the file unsafely."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    with open(path, "rb") as file:
        start = file.read(6)
    if not start.startswith((b"\x93NUMPY", b"PK")):
        return "it is no .npy or .npz file" if start else "it is empty"
    if "ickle" in str(error) or "Python objects" in str(error):
        return "it holds pickled Python objects, which could run code; save arrays of numbers"
    if "mmap length" in str(error):
        return "it is cut off; copy it again"
    return first_line(error)


def read_images(path: Path) -> tuple[np.ndarray, np.ndarray | None, ClassNames | None]:
    """Return the images of a file, the labels or None, and the class names or None. All are unchecked.

    The file is one of

    * an .npz file with images and maybe labels, under one pair of :data:`KEYS`, and maybe ``class_names``;
    * a .npy file with images. Their labels are in ``NAME_labels.npy`` beside ``NAME_data.npy``, as in CIFAR-10.1, or in
      ``labels.npy`` beside it, as in CIFAR-10-C;
    * a .mat file of SVHN.
    """
    if path.suffix == ".mat":
        return (*read_mat(path), ClassNames(DIGITS))
    loaded = load(path)
    if isinstance(loaded, dict):
        return _from_npz(path, loaded)
    labels = next((file for file in _label_files(path) if file.is_file()), None)
    return loaded, None if labels is None else read_labels(labels, len(loaded), path), None


def _label_files(images: Path) -> list[Path]:
    name = images.name.removesuffix("_data.npy")
    own = [] if name == images.name else [images.with_name(f"{name}_labels.npy")]
    return [*own, images.with_name("labels.npy")]


def _from_npz(path: Path, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray | None, ClassNames | None]:
    found = [pair for pair in KEYS if pair[0] in arrays and pair[1] in arrays]
    found = found or [pair for pair in KEYS if pair[0] in arrays]
    if not found:
        raise InputError(f"{path}: holds {', '.join(arrays)}; it must hold images and labels")
    images, labels = found[0]
    for other in found[1:]:
        if not all(np.array_equal(arrays[a], arrays[b]) for a, b in zip(found[0], other) if b in arrays):
            raise InputError(f"{path}: holds {images} and {other[0]}, which differ; it must hold one test set")
    names = ClassNames(arrays["class_names"], str(path)) if "class_names" in arrays else None
    return arrays[images], as_labels(f"{path}: labels", arrays[labels]) if labels in arrays else None, names


def read_labels(path: Path, images: int, of: Path) -> np.ndarray:
    """Return the labels in the .npy file ``path``, one for each of the ``images`` in the file ``of``."""
    labels = load(path)
    if not isinstance(labels, np.ndarray):
        raise InputError(f"{path}: must be a .npy file with labels")
    if labels.shape[:1] != (images,):
        raise InputError(
            f"{of}: holds {images} images, but {path.name} labels of shape {labels.shape}; copy both files again"
        )
    return as_labels(f"{path}: labels", labels)


def read_mat(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return images ``[N, 32, 32, 3]`` and labels ``[N]`` of a .mat file of SVHN, which has 10 for the digit 0."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise InputError(f"{path}: needs scipy: pip install scipy") from None
    try:
        arrays = loadmat(regular(path), variable_names=["X", "y"])
    except NotImplementedError:  # scipy's answer to this format alone
        raise InputError(f"{path}: is in the format of MATLAB 7.3; save it again with -v7") from None
    except Exception as error:  # damaged files raise many different types
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{path}: not a readable .mat file ({reason})") from None
    if missing := [key for key in ("X", "y") if key not in arrays]:
        raise InputError(f"{path}: lacks {' and '.join(missing)}; a .mat file must hold X and y, as those of SVHN")
    images, labels = arrays["X"], arrays["y"].reshape(-1)
    if images.ndim == 3:  # MATLAB drops the dimension of a single image
        images = images[..., None]
    return np.moveaxis(images, -1, 0), np.where(labels == 10, 0, labels)


def count_in_mat(path: Path) -> int:
    """Return the number of images in a .mat file that :func:`read_mat` can read, without reading them."""
    from scipy.io import whosmat

    return next((shape[-1] for name, shape, _ in whosmat(path) if name == "X"), 0)


def as_labels(where: str, labels: np.ndarray) -> np.ndarray:
    """Return labels as numbers of classes ``[N]``.

    Published files have them as ``[N]``, as ``[N, 1]``, or as soft labels ``[N, classes]``, which are probabilities or
    counts of votes. The most probable class of a soft label is taken, the first one of several. A log line counts the
    rest.

    Raises:
        InputError: a row of soft labels is no distribution, such as several labels of one image.
    """
    if labels.ndim == 2 and labels.shape[1] == 1:
        return labels[:, 0]
    if labels.ndim != 2 or labels.dtype.kind not in "iuf" or not labels.size:
        return labels
    votes = labels.astype(np.float64)
    total = votes.sum(axis=1)
    counts = labels.dtype.kind != "f" and labels.max() > 1
    if not ((votes >= 0).all() and (total > 0).all() and (counts or np.abs(total - 1).max() < 0.01)):
        raise InputError(
            f"{where} of shape {labels.shape} must be a distribution over the classes for each image, probabilities or "
            "counts of votes; an image with several labels or none cannot be trained on"
        )
    top = votes.max(axis=1)
    ties = int(((votes == top[:, None]).sum(axis=1) > 1).sum())
    LOGGER.info(
        f"{plain(where)} are soft: the most probable class of each image is used, and the rest, "
        f"{100 * float((1 - top / total).mean()):.1f} % of the probability, is left out; {ties} images have several "
        "such classes and get the first"
    )
    return votes.argmax(axis=1)


def replaced_labels(given: str, name: str, labels: np.ndarray, classes: int) -> np.ndarray:
    """Return the labels in the file ``given``, in place of ``labels`` of the same images.

    Args:
        given: a .npy, .npz or .pt file, and after a colon the name of the array if it holds several. CIFAR-10N and
            CIFAR-10H are published so.
        name: the option that ``given`` is the value of.
        classes: number of classes of the data set.

    Raises:
        InputError: the file cannot be read, or its labels do not belong to these images.
    """
    path, key = split_key(given)
    where = f"{option(name)} {given}"
    arrays = _load_pt(path) if path.suffix in (".pt", ".pth") else load(path)
    if isinstance(arrays, dict):
        fitting = [each for each, array in arrays.items() if np.ndim(array) in (1, 2) and len(array) == len(labels)]
        if key not in arrays:
            if key or len(fitting) != 1:
                raise InputError(
                    f"{where}: holds {', '.join(map(str, arrays)) or 'nothing'}; name one of them, as {path}:NAME, "
                    f"with {len(labels)} labels"
                )
            key = fitting[0]
        clean, found = arrays.get("clean_label"), np.asarray(arrays[key])
        if clean is not None and not np.array_equal(np.asarray(clean), labels):
            raise InputError(
                f"{where}: its clean_label differs from the labels of the data set, so it is of other images or in "
                "another order"
            )
    else:
        found = np.asarray(arrays)
    found = as_labels(where, found)
    if found.dtype.kind not in "iu" or found.shape != labels.shape:
        raise InputError(
            f"{where}: must hold {len(labels)} integers, one per image, not {found.dtype} of shape {found.shape}"
        )
    if found.min() < 0 or found.max() >= classes:
        raise InputError(f"{where}: labels must lie in 0 to {classes - 1}, not {found.min()} to {found.max()}")
    differ = int((found != labels).sum())
    LOGGER.info(f"{plain(where)}: {differ} of {len(labels)} labels differ from those of the data set")
    return found.astype(np.int64)


def split_key(given: str) -> tuple[Path, str]:
    """Return the path and the name of the array in ``given``, PATH or PATH:NAME."""
    path = expand_home(given)
    if path.exists() or ":" not in given:
        return path, ""
    file, _, key = given.rpartition(":")
    return expand_home(file), key


def _load_pt(path: Path) -> Any:
    """Return what torch saved in ``path``: an array, or a dict of arrays."""
    import torch
    from numpy._core.multiarray import _reconstruct as rebuild

    kinds = (np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64, np.float32, np.float64)
    # NumPy's arrays of numbers are plain data, but torch refuses them by default.
    allowed: list[Any] = [np.ndarray, np.dtype, rebuild, (rebuild, "numpy.core.multiarray._reconstruct")]
    try:
        with torch.serialization.safe_globals([*allowed, *(type(np.dtype(kind)) for kind in kinds)]):
            return torch.load(regular(path), map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from None
    except Exception:  # a damaged file raises many types of errors, with torch's advice to trust the file
        raise InputError(f"{path}: damaged, or not written by torch.save with arrays of numbers") from None
