"""Data sets of the Hugging Face Hub: parquet files with a column of encoded images and a column of labels.

Nothing is guessed. The data set's card, or else the exact names of the files, tell which files make up a split.
"""

from __future__ import annotations

import io
import json
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from cifar_fast.data.class_names import ClassNames
from cifar_fast.data.dataset import check_images
from cifar_fast.data.images import decode_images, tell_resized
from cifar_fast.data.options import VALIDATION, DataOptions
from cifar_fast.utils.errors import InputError, first_line, option
from cifar_fast.utils.progress import LOGGER

SPLITS = ("train", "test", *VALIDATION)
LABELS = ("label", "fine_label")
"""Names of a column of labels, for a table with several columns that could be one."""
SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(?:-[0-9a-f]{16})?")
"""Name of one of several files of a split, without its suffix."""


def read_hub(repository: str, options: DataOptions) -> dict[str, Any]:
    """Read the data set ``repository``, "owner/name", as arrays of its splits, and ``class_names`` if it has any.

    The splits are train and the one to test on, if the data set has one.

    huggingface_hub caches the downloads and honors HF_ENDPOINT. A missing package is an InputError, and so is a data
    set that cannot be read or could be read in several ways.
    """
    source = f"hf:{repository}"
    try:
        from fsspec.utils import glob_translate  # noqa: F401  (a part of huggingface_hub's requirements)
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.repocard import metadata_load
        from pyarrow import concat_tables, parquet
    except ImportError as error:
        raise InputError(f"{source} needs {error.name}: pip install 'cifar_fast[hf]'") from None

    def download(file: str) -> str:
        return hf_hub_download(repository, file, repo_type="dataset")

    try:
        files = sorted(file.rfilename for file in HfApi().dataset_info(repository).siblings or ())
        card = (metadata_load(download("README.md")) if "README.md" in files else None) or {}
        config = _config(source, card)
        splits = _splits(source, files, config, options)
        tables = {
            split: concat_tables([parquet.read_table(download(file)) for file in of]) for split, of in splits.items()
        }
        columns = _columns(source, tables["train"].schema)
        names = {split: _class_names(source, table.schema, columns[1]) for split, table in tables.items()}
        known = names["train"] or _names_of_card(source, card, config, columns[1]) or [*names.values()][-1]
        arrays: dict[str, Any] = {"class_names": known} if known else {}
        for split, table in tables.items():
            images, labels = _read_columns(source, split, table, columns, options.resize is not None)
            if known:
                labels = known.renumber(labels, names[split] or known, f"{source}, {split}")
            arrays |= {f"{split}_images": images, f"{split}_labels": labels}
        return arrays
    except InputError:
        raise
    except Exception as error:  # huggingface_hub, sockets and pyarrow have types of their own
        raise InputError(
            f"{source}: cannot be read ({first_line(error)}); check the name, the network and HF_ENDPOINT"
        ) from None


def read_table(source: str, dataset: Any) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Read images, labels and class names of ``dataset``, a ``datasets.Dataset`` of the library datasets."""
    schema = dataset.features.arrow_schema
    columns = _columns(source, schema)
    images, labels = _read_columns(source, "", dataset.with_format("arrow")[:], columns, resize=False)
    return images, labels, tuple(_class_names(source, schema, columns[1]) or ())


def _config(source: str, card: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration to read of those in ``card``, empty if there are none."""
    configs = card.get("configs") or [{}]
    if not isinstance(configs, list) or not all(isinstance(config, dict) for config in configs):
        raise InputError(f"{source}: configs in its README.md must be a list of mappings")
    default = [config for config in configs if config.get("default") is True]
    default = default or [config for config in configs if config.get("config_name") == "default"]
    if len(configs) > 1 and len(default) != 1:
        names = ", ".join(str(config.get("config_name")) for config in configs)
        raise InputError(f"{source}: its README.md has several configurations ({names}), none of them the default")
    return default[0] if default else configs[0]


def _splits(source: str, files: list[str], config: dict[str, Any], options: DataOptions) -> dict[str, list[str]]:
    """Return the parquet files of train and of the split to test on, if there is one.

    They are those that ``config`` names, else those that are named after a split.
    """
    folder = posixpath.normpath(str(config.get("data_dir") or ".")).strip("/")
    if "data_files" in config:
        splits = _named_by_card(source, files, folder, config["data_files"])
    else:
        splits = _named_after_splits(source, [file for file in files if file.endswith(".parquet")], folder)
    found = [split for split in ("test", *VALIDATION) if splits.get(split)]
    held_out = not found and options.test_fraction is not None
    for split in ("train", *([] if found or held_out else ["test"])):
        if not splits.get(split):
            given = ", ".join(sorted(splits)) or "none"
            raise InputError(
                f"{source}: no parquet file of the split {split!r} among its {len(files)} files (splits: {given}); "
                f"name it {split}.parquet, {split}-00000-of-00001.parquet or {split}/NAME.parquet, or list it in "
                "data_files in its README.md"
                + (f"; or hold out training images with {option('test_fraction')}" if split == "test" else "")
            )
    test = options.test_split(found, source)
    splits = {split: splits[split] for split in ("train", *([test] if test else []))}
    for split in splits:
        if others := [file for file in splits[split] if not file.endswith(".parquet")]:
            raise InputError(f"{source}: {others[0]}, of the split {split!r}, is not a parquet file")
        _check_shards(source, splits[split])
    if both := sorted(set(splits["train"]) & set(splits.get(test or "", ()))):
        raise InputError(f"{source}: {both[0]} belongs to both splits, train and {test}")
    used = {file for of in splits.values() for file in of}
    if left := [file for file in files if file.endswith(".parquet") and file not in used]:
        shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        LOGGER.info(
            f"{source}: these parquet files are not in the split train or {test or 'test'}, and are left out: {shown}"
        )
    return splits


def _named_by_card(source: str, files: list[str], folder: str, data_files: Any) -> dict[str, list[str]]:
    """Return the files of each split that ``data_files`` of a card names: one path, a list, or a mapping."""
    from fsspec.utils import glob_translate

    if isinstance(data_files, str) or (
        isinstance(data_files, list) and all(isinstance(one, str) for one in data_files)
    ):
        data_files = {"train": data_files}
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": paths} for split, paths in data_files.items()]
    splits: dict[str, list[str]] = defaultdict(list)
    for entry in data_files if isinstance(data_files, list) else [None]:
        if not isinstance(entry, dict) or not {"split", "path"} <= set(entry):
            raise InputError(f"{source}: each of data_files in its README.md must have a split and a path")
        for path in [entry["path"]] if isinstance(entry["path"], str) else entry["path"]:
            pattern = re.compile(glob_translate(posixpath.normpath(posixpath.join(folder, path))))
            found = [file for file in files if pattern.match(file)]
            if not found:
                raise InputError(f"{source}: its README.md names {path!r} in data_files, which is none of its files")
            splits[str(entry["split"])] += [file for file in found if file not in splits[str(entry["split"])]]
    return {split: sorted(found) for split, found in splits.items()}


def _named_after_splits(source: str, files: Iterable[str], folder: str) -> dict[str, list[str]]:
    """Return the files of each split, which are named exactly after it, or lie in a folder that is."""
    found: dict[str, dict[str, list[str]]] = {split: defaultdict(list) for split in SPLITS}
    for file in files:
        if folder != "." and not file.startswith(f"{folder}/"):
            continue
        *parents, name = file.removesuffix(".parquet").split("/")
        shard = SHARD.fullmatch(name)
        parts = [*parents, shard[1] if shard else name]
        of = [split for split in SPLITS if split in parts]
        if len(of) > 1:
            raise InputError(f"{source}: {file} is named after both splits, {of[0]} and {of[1]}")
        if of:
            place = parts.index(of[0])
            whole = "/".join([*parts[:place], "SPLIT"])
            inside = place < len(parents)
            found[of[0]][f"{whole}/" if inside else f"{whole}-N-of-{shard[3]}" if shard else whole].append(file)
    for split, forms in found.items():
        if len(forms) > 1:
            names = ", ".join(form.replace("SPLIT", split) for form in sorted(forms))
            raise InputError(
                f"{source}: has several configurations ({names}); choose one in data_files in its README.md"
            )
    splits = {split: next(iter(forms.values())) for split, forms in found.items() if forms}
    folders = {form.partition("SPLIT")[0] for forms in found.values() for form in forms}
    if len(folders) > 1:
        raise InputError(f"{source}: has its splits in several folders ({', '.join(sorted(folders))})")
    return splits


def _check_shards(source: str, files: list[str]) -> None:
    """Raise :class:`InputError` if some of the numbered files of a split are missing, or there twice."""
    numbers: dict[tuple[str, int], list[int]] = defaultdict(list)
    for file in files:
        if shard := SHARD.fullmatch(file.removesuffix(".parquet")):
            numbers[shard[1], int(shard[3])].append(int(shard[2]))
    for (name, count), there in numbers.items():
        if sorted(there) != list(range(count)):
            raise InputError(f"{source}: {name}-*-of-* must be {count} files, but has the numbers {sorted(there)}")


def _features(schema: Any) -> dict[str, Any]:
    """Return what the library datasets stored about the columns of a table."""
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    return {
        name: feature for name, feature in about.get("info", {}).get("features", {}).items() if name in schema.names
    }


def _columns(source: str, schema: Any) -> tuple[str, str]:
    """Return the names of the columns of images and labels, with a log line if other columns could be labels."""
    from pyarrow import types

    images = [
        field.name for field in schema if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
    ]
    integers = [field.name for field in schema if types.is_integer(field.type)]
    classes = [name for name in integers if _features(schema).get(name, {}).get("_type") == "ClassLabel"]
    labels = classes or [name for name in integers if len(schema.names) == 2 or name in LABELS]
    if len(labels) > 1:
        labels = [name for name in LABELS if name in labels]
    if len(images) != 1 or len(labels) != 1:
        raise InputError(
            f"{source}: one column of images and one of labels are needed, not {', '.join(schema.names)}; labels are "
            f"integers, declared as ClassLabel or called {' or '.join(LABELS)}"
        )
    if others := [name for name in integers if name != labels[0]]:
        LOGGER.info(f"{source}: the labels are the column {labels[0]!r}, not {', '.join(map(repr, others))}")
    return images[0], labels[0]


def _class_names(source: str, schema: Any, label: str) -> ClassNames | None:
    names = _features(schema).get(label, {}).get("names")
    return ClassNames(names, source) if names else None


def _names_of_card(source: str, card: dict[str, Any], config: dict[str, Any], label: str) -> ClassNames | None:
    """Return the class names of the column ``label`` in ``dataset_info`` of the card."""
    infos = card.get("dataset_info") or []
    infos = infos if isinstance(infos, list) else [infos]
    name = config.get("config_name")
    for info in infos if len(infos) == 1 else [info for info in infos if info.get("config_name") == name]:
        for feature in info.get("features") or ():
            if feature.get("name") == label and isinstance(feature.get("dtype"), dict):
                names = feature["dtype"].get("class_label", {}).get("names")
                return ClassNames(names, source) if names else None
    return None


def _read_columns(
    source: str, split: str, table: Any, columns: tuple[str, str], resize: bool
) -> tuple[np.ndarray, np.ndarray]:
    image, label = columns
    if missing := [name for name in columns if name not in table.schema.names]:
        raise InputError(f"{source}: the split {split!r} lacks the column {missing[0]!r}")
    where = f"{source}, {split}" if split else source
    files: dict[str, Path | io.BytesIO] = {}
    for i, one in enumerate(table[image].to_pylist()):
        if (
            split and one["bytes"] is None
        ):  # its path is of another machine, and would be a file of any name on this one
            raise InputError(f"{where} image {i}: is not in the parquet file")
        files[f"{where} image {i}"] = Path(one["path"]) if one["bytes"] is None else io.BytesIO(one["bytes"])
    images, resized = decode_images(files, f"decoding {split or 'images'}", resize)
    tell_resized(resized, len(images), where)
    labels = table[label].to_numpy()
    check_images(source, images, labels, f"{split}_" if split else "")
    return images, labels
