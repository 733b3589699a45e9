"""Pickles of plain values and arrays of bytes, as CIFAR is published, read without running anything.

A pickle is a program that may call any function. This reader interprets its instructions itself. It builds lists, dicts
with text as keys, tuples, texts, numbers, and uint8 arrays. It refuses everything else, and calls nothing that a file
names.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cifar_fast.utils.errors import InputError, first_line

ARRAY = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
"""The function that a pickle names for an array, in the versions of numpy."""
DTYPE, BYTES, CLASS = "numpy dtype", "_codecs encode", "numpy ndarray"
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
VALUES = (
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES"),
    *("SHORT_BINBYTES", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT"),
)
"""Instructions that put their argument on the stack."""


@dataclass
class _Named:
    """A name in a pickle, or the result of a call: "array" or "dtype". An array has ``values`` in the end."""

    name: str
    values: np.ndarray | None = None


def read_pickle(data: bytes) -> Any:
    """Return the value that ``data`` holds. Texts of Python 2 are decoded as Latin-1.

    Raises:
        ValueError: it is damaged, or holds something else than plain values and uint8 arrays.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    try:
        for instruction, argument, _ in pickletools.genops(data):
            name: str = instruction.name
            if name == "STOP":
                return _finished(stack.pop())
            _execute(name, argument, stack, marks, memo)
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"damaged, {type(error).__name__}") from None
    raise ValueError("cut off")


def _execute(name: str, argument: Any, stack: list[Any], marks: list[int], memo: dict[int, Any]) -> None:
    def since_mark() -> list[Any]:
        items = stack[marks[-1] :]
        del stack[marks.pop() :]
        return items

    if name in VALUES:
        stack.append(argument)
    elif name in EMPTY:
        stack.append(EMPTY[name]())
    elif name in CONSTANTS:
        stack.append(CONSTANTS[name])
    elif name == "MARK":
        marks.append(len(stack))
    elif name == "TUPLE":
        stack.append(tuple(since_mark()))
    elif name == "LIST":
        stack.append(since_mark())
    elif name == "DICT":
        items = since_mark()
        stack.append({})
        _set_items(stack[-1], items)
    elif name in TUPLES:
        stack[-TUPLES[name] :] = [tuple(stack[-TUPLES[name] :])]
    elif name in ("APPENDS", "APPEND"):
        items = since_mark() if name == "APPENDS" else [stack.pop()]
        stack[-1].extend(items)
    elif name in ("SETITEMS", "SETITEM"):
        items = since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
        _set_items(stack[-1], items)
    elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
        memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
    elif name in ("GET", "BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name in ("GLOBAL", "STACK_GLOBAL"):
        stack.append(_Named(argument or " ".join((stack.pop(-2), stack.pop()))))
    elif name == "REDUCE":
        values = stack.pop()
        stack.append(_call(stack.pop().name, values))
    elif name == "BUILD":
        state = stack.pop()
        _set_state(stack[-1], state)
    elif name not in ("PROTO", "FRAME"):
        raise ValueError(f"the instruction {name} is not allowed")


def _set_items(target: dict[str, Any], items: Sequence[Any]) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is not str:
            raise ValueError(f"a key is no text but {type(key).__name__}")
        target[key] = value


def _call(name: str, arguments: Any) -> Any:
    """Return what calling the function ``name`` would return, if it is one of an array's."""
    if name in ARRAY:
        return _Named("array")
    if name == DTYPE and arguments[0] == "u1":
        return _Named("dtype")
    if name == BYTES and arguments[1] == "latin1":
        return arguments[0].encode("latin1")
    raise ValueError(f"it names {name}, which is not allowed")


def _set_state(target: _Named, state: Any) -> None:
    if target.name == "array":
        _, shape, dtype, column_major, data = state
        if dtype.name != "dtype" or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError("an array is not of bytes")
        values = np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, np.uint8)
        target.values = values.reshape(shape, order="F" if column_major else "C")
    elif target.name != "dtype":
        raise ValueError(f"it sets the state of {target.name}, which is not allowed")


def _finished(value: Any) -> Any:
    """Return ``value`` with its arrays in place. They are values of a dict, or the value itself."""
    if isinstance(value, dict):
        return {key: _finished(one) if isinstance(one, _Named) else one for key, one in value.items()}
    return value.values if isinstance(value, _Named) else value


def read_batches(files: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Return images ``[N, 32, 32, 3]`` and labels ``[N]`` in pickles of CIFAR, for CIFAR-100 its fine labels.

    Raises:
        InputError: a file holds something else.
    """
    images, labels = [], []
    for path in files:
        batch = _read_dict(path)
        data, own = batch.get("data"), batch.get("labels", batch.get("fine_labels"))
        if not (isinstance(data, np.ndarray) and data.shape[1:] == (3072,)):
            raise _wrong(path, "no images of 3072 bytes")
        if not (isinstance(own, list) and len(own) == len(data) and all(type(one) is int for one in own)):
            raise _wrong(path, f"no list of {len(data)} labels")
        images.append(data)
        labels += own
    return np.concatenate(images).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.array(labels)


def read_names(path: Path, key: str) -> list[str]:
    """Return the class names under ``key`` in a pickle of CIFAR.

    Raises:
        InputError: it holds something else.
    """
    names = _read_dict(path).get(key)
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise _wrong(path, f"no list of class names {key}")
    return names


def _read_dict(path: Path) -> dict[str, Any]:
    try:
        value = read_pickle(path.read_bytes())
    except ValueError as error:
        raise _wrong(path, first_line(error)) from None
    if not isinstance(value, dict):
        raise _wrong(path, "no dict")
    return value


def _wrong(path: Path, why: str) -> InputError:
    return InputError(f"{path}: is no file of CIFAR ({why}); get the published one")
