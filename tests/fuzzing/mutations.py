"""Random damage to a valid file: to its bytes, inside its compression, or to its values."""

import contextlib
import gzip
import io
import json
import os
import pickle
import random
import struct
import zipfile
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import torch

NUMBERS = (None, True, -1, 0, 1, 7, 2**31, 2**63, -(2**70), 0.5, -0.0, 1e308, float("nan"), float("inf"))
VALUES = (*NUMBERS, "", "a", "\x1b[2J\n", [], {}, [[1]], {"a": 1}, [None] * 20, "9" * 5000)
DTYPES = ("<f4", ">i8", "u1", "<U3", "b1", "c8", "<i4")


class Bomb:
    """Makes the folder ``place``, which is outside of the folder that is read, if it is unpickled."""

    place = ""

    def __reduce__(self):
        return os.mkdir, (self.place,)


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Return ``data`` with one to four damages."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 4) if out else 0):
        at, size = draw.randrange(len(out) + 1), draw.choice((1, 2, 4, 8, 64, 1024))
        part = out[at : at + size]
        number = draw.choice((0, 1, 2**15, 2**30, 2**31 - 1, 2**32 - 1))
        new = draw.choice(
            (
                bytes(byte ^ 1 << draw.randrange(8) for byte in part[:1]) + part[1:],
                draw.choice((b"\0", b"\xff", b"\x7f", b"\x80", b"\n")) * len(part),
                draw.randbytes(len(part)),
                struct.pack(draw.choice("<>") + "I", number),
                part + part,
                b"",
            )
        )
        out[at : at + max(size, 4 if len(new) == 4 else 0)] = new
        if draw.random() < 0.1:
            del out[at:]
    return bytes(out)


def changed(value, draw: random.Random, more: tuple = ()):
    """Return a tree of values with one of its branches or leaves changed. ``more`` are further values for a leaf."""
    is_tree = isinstance(value, (dict, list, tuple)) and len(value) and draw.random() < 0.85
    if is_tree and isinstance(value, dict):
        key = draw.choice(list(value))
        new, others = changed(value[key], draw, more), {name: one for name, one in value.items() if name != key}
        return draw.choice((value | {key: new}, value | {key: new}, others, others | {"other": new}))
    if is_tree:
        at = draw.randrange(len(value))
        new = [*value[:at], changed(value[at], draw, more), *value[at + 1 :]]
        return type(value)(draw.choice((new, new, value[:at], [*value, *value])))
    if isinstance(value, (np.ndarray, torch.Tensor)) and draw.random() < 0.7:
        array = np.atleast_1d(np.asarray(value))
        flat, kind = array.reshape(-1), draw.choice(DTYPES)
        new = draw.choice((array[..., None], flat, flat[:3], array[:0], array[None], flat[0], array.astype(kind)))
        return torch.from_numpy(new.copy()) if isinstance(value, torch.Tensor) and new.dtype.kind in "fiu" else new
    return draw.choice((*VALUES, *more))


@mock.patch("time.time", lambda: 1e9)  # zip and gzip write it
def mutated(name: str, data: bytes, draw: random.Random) -> bytes:
    """Return a mutation of the valid file ``data``, whose kind its ``name`` tells."""
    kind = DEEP.get(Path(name).suffix)
    if kind and draw.random() < 0.6:
        with contextlib.suppress(TypeError, ValueError, RuntimeError, AttributeError, OverflowError):
            return draw.choice(kind)(data, draw)
    return damaged(data, draw)


def _json(data, draw):
    lines = data.splitlines() if data.count(b"\n{") else [data]  # .jsonl has a value in each line
    return b"\n".join(json.dumps(changed(json.loads(line), draw)).encode() for line in lines)


def _pickle(data, draw):
    return pickle.dumps(changed(pickle.loads(data), draw, (Bomb(),)), draw.choice((0, 2, 4)))


def _npz(data, draw):
    file, arrays = io.BytesIO(), dict(np.load(io.BytesIO(data)))
    np.savez(file, **changed(arrays, draw, (np.array([Bomb()], dtype=object),)))
    return file.getvalue()


def _pt(data, draw):
    file, tree = io.BytesIO(), torch.load(io.BytesIO(data), weights_only=False)
    torch.save(changed(tree, draw, (Bomb(), torch.zeros(2, 3))), file)
    return file.getvalue()


def _zip(data, draw):
    """Damage one member of a zip file, and make its checksum right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        chosen = draw.choice(old.namelist())
        for name in old.namelist():
            new.writestr(name, damaged(old.read(name), draw) if name == chosen else old.read(name))
    return out.getvalue()


def _png(data, draw):
    """Damage one chunk of a PNG, and make its checksum right."""
    out, at, chosen = data[:8], 8, draw.randrange(4)
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        chunk = data[at + 8 : at + 8 + size]
        chunk = damaged(chunk, draw) if chosen == 0 else chunk
        out += struct.pack(">I", len(chunk)) + kind + chunk + struct.pack(">I", zlib.crc32(kind + chunk))
        at, chosen = at + 12 + size, chosen - 1
    return out


def _gz(data, draw):
    return gzip.compress(damaged(gzip.decompress(data), draw), 1)


DEEP = {".json": (_json,), ".jsonl": (_json,), "": (_pickle,), ".meta": (_pickle,), ".npz": (_npz, _npz, _zip)}
DEEP |= {".pt": (_pt, _pt, _zip), ".png": (_png,), ".gz": (_gz,)}
"""Ways to mutate more than the bytes of a file, by its suffix."""
