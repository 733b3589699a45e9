"""Data sets of the Hugging Face Hub: parquet files with a column of encoded images and a column of labels."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import numpy as np

from cifar_fast.data.image_folder import decode_images
from cifar_fast.utils.errors import InputError, first_line


def read_hub(repository: str) -> dict[str, np.ndarray]:
    """Read the data set ``repository``, "owner/name", as the arrays of ``ARRAYS`` and ``class_names`` if it has any.

    The labels are the column ``label``, else ``fine_label``, else the only column of integers. huggingface_hub caches
    the downloads and honors HF_ENDPOINT. A missing package or a data set that cannot be read is an InputError.
    """
    source = f"hf:{repository}"
    try:
        from huggingface_hub import HfApi, hf_hub_download
        from pyarrow import concat_tables, parquet
    except ImportError as error:
        raise InputError(f"{source} needs {error.name}: pip install 'cifar_fast[hf]'") from None
    try:
        files = [file.rfilename for file in HfApi().dataset_info(repository).siblings or ()]
        arrays: dict[str, np.ndarray] = {}
        for split in ("train", "test"):
            matches = [re.fullmatch(rf"(.*?)\b{split}[-_./\d].*\.parquet", file) for file in sorted(files)]
            shards = {match[0]: match[1] for match in matches if match}
            if not shards:
                raise InputError(f"{source}: no parquet file of the split {split!r} among its {len(files)} files")
            if len(configurations := set(shards.values())) > 1:
                raise InputError(f"{source}: has several configurations ({', '.join(sorted(configurations))})")
            paths = [hf_hub_download(repository, shard, repo_type="dataset") for shard in shards]
            table = concat_tables([parquet.read_table(path) for path in paths])
            arrays |= _split(source, split, table)
        return arrays
    except InputError:
        raise
    except Exception as error:  # huggingface_hub, sockets and pyarrow have types of their own
        raise InputError(
            f"{source}: cannot be read ({first_line(error)}); check the name, the network and HF_ENDPOINT"
        ) from None


def _split(source: str, split: str, table: Any) -> dict[str, np.ndarray]:
    from pyarrow import types

    columns = {field.name: field.type for field in table.schema}
    images = [name for name, kind in columns.items() if types.is_struct(kind) and kind.get_field_index("bytes") >= 0]
    integers = [name for name, kind in columns.items() if types.is_integer(kind)]
    labels = [name for name in ("label", "fine_label") if name in integers] or integers
    if len(images) != 1 or not labels or (len(labels) > 1 and labels[0] not in ("label", "fine_label")):
        raise InputError(f"{source}: one column of images and one of labels are needed, not {', '.join(columns)}")
    encoded = table[images[0]].combine_chunks().field("bytes").to_pylist()
    files = {f"{source}, {split} image {i}": io.BytesIO(data) for i, data in enumerate(encoded)}
    decoded = decode_images(files, f"decoding {split}")
    arrays = {f"{split}_images": decoded, f"{split}_labels": table[labels[0]].to_numpy()}
    metadata = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    names = metadata.get("info", {}).get("features", {}).get(labels[0], {}).get("names")
    if names:
        arrays["class_names"] = np.array(names)
    return arrays
