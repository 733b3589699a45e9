"""Exceptions whose message is one line for the person who started the work. The commands print it."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Any

_OPTION = re.compile("\0(\\w+)\0")
_CONTROL = re.compile("[\x01-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")  # all but NUL, which marks options


def option(name: str) -> str:
    """Mark ``name`` in the message of an :class:`InputError` as an option of the project.

    Python shows it as an argument, such as ``batch_size``. The commands show it as a flag, with dashes.
    """
    return f"\0{name}\0"  # no path and no command line can hold the marks


def with_flags(text: str) -> str:
    """Return ``text`` with marked options written as flags of the commands."""
    return _OPTION.sub(lambda match: f"--{match[1].replace('_', '-')}", text)


def plain(text: str) -> str:
    """Return ``text`` with marked options written as arguments in Python."""
    return _OPTION.sub(r"\1", text)


def visible(text: str) -> str:
    """Return ``text`` as one line, with control characters escaped.

    A terminal obeys them, and names of files and classes may hold some.
    """
    return _CONTROL.sub(lambda one: ascii(one[0])[1:-1], text)


OTHER_NAMES = {
    "lr": ("lr_values",),
    "learning_rate": ("lr_values",),
    "wd": ("weight_decay",),
    "bs": ("batch_size",),
    "half": ("float16",),
    "fp16": ("float16",),
    "bf16": ("bfloat16",),
    "float": ("float32",),
    "fp32": ("float32",),
    "nchw": ("contiguous_format",),
    "nhwc": ("channels_last",),
    "gpu": ("cuda",),
    "triton": ("fused",),
    "inductor": ("compiled",),
}
"""What people call an option or a value elsewhere, and its names here."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return "; did you mean A or B?" with the names of ``choices`` that are near ``name``, or an empty text."""

    def bare(text: str) -> str:
        return text.lower().lstrip("-").replace("-", "_")

    names = {bare(choice): choice for choice in choices}
    near = [one for one in (bare(name), *OTHER_NAMES.get(bare(name), ())) if one in names]
    near = near or difflib.get_close_matches(bare(name), names)
    return f"; did you mean {' or '.join(names[one] for one in near)}?" if near else ""


class UserError(Exception):
    """An error whose message is one line for a person, with options marked by :func:`option`."""

    def __init__(self, message: object = "") -> None:
        super().__init__(visible(str(message)))

    def __str__(self) -> str:
        return plain(self.message)

    @property
    def message(self) -> str:
        """The message with its marks, for another error that quotes it."""
        return super().__str__()


class InputError(UserError, ValueError):
    """An input is wrong: a file, an option, a value. The message says where and what to do. The exit code is 2."""


class Diverged(UserError, ArithmeticError):
    """The loss is no longer finite. The message names ``step``, counted from 1 over the run, and its ``epoch``."""

    step: int | None = None
    epoch: int | None = None

    @classmethod
    def at(cls, step: int | None, epoch: int | None) -> Diverged:
        """Return the error for the first step with a loss that is not finite."""
        where = "" if step is None else f" at step {step} (epoch {epoch})"
        hint = f"try smaller {option('lr_values')}, or {option('dtype')} float32"
        error = cls(f"the loss is not finite{where}; {hint}")
        error.step, error.epoch = step, epoch
        return error


class StopTraining(Exception):
    """Raised by a callback of :func:`cifar_fast.fit` to end the run early. The run counts as finished."""


class MissingRuns(UserError, RuntimeError):
    """Runs of a training are missing: they failed, or a process died or could not write them. The exit code is 1."""


def require_instance(name: str, value: Any, kind: type | tuple[type, ...], expected: str) -> None:
    """Raise :class:`InputError` unless ``value`` is a ``kind``. The message says that ``name`` must be ``expected``."""
    if not isinstance(value, kind):
        raise InputError(f"{name} must be {expected}, not {type_shown(value)}")


def type_shown(value: Any) -> str:
    """Return what ``value`` is, for a message about its type."""
    return f"the text {value!r}" if isinstance(value, (str, bytes)) else type(value).__name__


def first_cause(error: BaseException) -> BaseException:
    """Return the error at the start of the chain that led to ``error``; compilers wrap it in their own."""
    while cause := getattr(error, "inner_exception", None) or error.__cause__:
        error = cause
    return error


def out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` reports that memory ran out, on a GPU or on a CPU."""
    kind, text = type(error).__name__, str(error)
    words = ("can't allocate memory", "bad_alloc")  # torch's allocator, and C++ elsewhere
    return "OutOfMemory" in kind or isinstance(error, MemoryError) or any(word in text for word in words)


@contextlib.contextmanager
def oom_hint(what: str, hint: str) -> Iterator[None]:
    """Raise :class:`InputError` "out of memory WHAT; HINT" if memory runs out inside the block."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise InputError(f"out of memory {what}; {hint}") from error


def write_reason(error: BaseException) -> str:
    """Return why a file could not be written, for a person: without error numbers, and without paths."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "inline_container" in str(error):  # torch.save, which does not say why
        return "not all bytes could be written; the disk may be full"
    return first_line(error)


def first_line(error: BaseException) -> str:
    """Return the first line of the message of ``error``, or its type if there is no message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
