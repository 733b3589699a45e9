"""Progress of long work: lines on the logger ``cifar_fast``, and a bar on a terminal or in a notebook."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator

from cifar_fast.utils.errors import visible

with warnings.catch_warnings():
    # In a notebook, tqdm warns that it guesses the front end and that ipywidgets is missing.
    warnings.simplefilter("ignore")
    from tqdm.autonotebook import tqdm

NOTEBOOK = "ipykernel.zmqshell" in sys.modules
"""Whether output goes to a notebook, by tqdm's own test. Its bar is a widget if ipywidgets is installed."""

LOGGER = logging.getLogger("cifar_fast")
"""INFO: what a person reads. DEBUG: tracebacks of backends that failed before another was used."""
if LOGGER.level == logging.NOTSET:
    LOGGER.setLevel(logging.INFO)

LogFn = Callable[[str], None]
"""A function that takes one line of text for a person, such as ``print``."""

SILENT_SECONDS = 50.0
"""Longest time without a line inside :func:`heartbeat`."""

UNPRINTED = threading.Event()
"""Set when a line could not be printed, such as on a full disk."""


class _Thread(threading.local):
    quiet = False
    prefix = ""
    speaks_for: int | None = None  # the thread whose lines these are, if another


_thread = _Thread()


def print_line(line: str) -> None:
    """Print ``line`` at once, also to a file."""
    print(line, flush=True)


def tell_unprinted(error: OSError) -> None:
    """Say on standard error, once, that lines cannot be printed.

    Lines are no results: work of hours continues without them, and its files are written.
    """
    if not UNPRINTED.is_set():
        UNPRINTED.set()
        line = f"error: lines cannot be printed ({error.strerror or error}); the work continues without them"
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr)


class _LineHandler(logging.Handler):
    """Hands the lines of one thread to a function."""

    def __init__(self, log: LogFn) -> None:
        super().__init__(logging.INFO)
        self.log, self.thread = log, threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        """Pass this thread's lines. Python asks before it takes the handler's lock, so threads do not wait here."""
        return (_thread.speaks_for or record.thread) == self.thread

    def emit(self, record: logging.LogRecord) -> None:
        line = visible(_thread.prefix + self.format(record))
        try:
            try:
                self.log(line)
            except UnicodeEncodeError:  # a path may hold letters that the output's encoding lacks
                self.log(line.encode("ascii", "backslashreplace").decode())
        except OSError as error:
            tell_unprinted(error)


@contextlib.contextmanager
def lines_to(log: LogFn | None) -> Iterator[None]:
    """Pass this thread's log lines to ``log`` inside the block. None passes nothing and hides progress bars too.

    Handlers that the caller has added to the logger get the lines in either case.
    """
    before, _thread.quiet = _thread.quiet, log is None
    handler = _LineHandler(log) if log else logging.NullHandler()
    LOGGER.addHandler(handler)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        _thread.quiet = before


@contextlib.contextmanager
def prefix_lines(prefix: str) -> Iterator[None]:
    """Put ``prefix`` before this thread's log lines inside the block."""
    before, _thread.prefix = _thread.prefix, prefix
    try:
        yield
    finally:
        _thread.prefix = before


@contextlib.contextmanager
def heartbeat(line: Callable[[], str]) -> Iterator[None]:
    """Log ``line()`` for this thread each time when it has logged nothing for most of a minute inside the block.

    Nothing is logged where a person sees a bar.
    """
    if NOTEBOOK or all(stream and stream.isatty() for stream in (sys.stdout, sys.stderr)):
        yield
        return
    said, ended = time.monotonic(), threading.Event()

    def note(line: str) -> None:
        nonlocal said
        said = time.monotonic()

    def beat(thread: int, prefix: str) -> None:
        _thread.speaks_for, _thread.prefix = thread, prefix
        while not ended.wait(max(0.0, said + SILENT_SECONDS - time.monotonic())):
            if time.monotonic() >= said + SILENT_SECONDS:
                note(text := line())
                LOGGER.info(text)

    handler = _LineHandler(note)
    LOGGER.addHandler(handler)
    beating = threading.Thread(target=beat, args=(threading.get_ident(), _thread.prefix), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        LOGGER.removeHandler(handler)


def duration(seconds: float) -> str:
    """Return a time for a person, such as "45 s", "3 min", "2 h 05 min" or "3 d 4 h"."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def progress_bar(total: int | None, what: str, unit: str) -> tqdm:
    """Return a bar that vanishes at its end, shown in a notebook or if standard error is a terminal.

    Bytes, unit "B", show as MB/s. The prefix of this thread's lines is before ``what``.
    """
    hidden = _thread.quiet or (False if NOTEBOOK else None)  # None: tqdm tests for a terminal
    file = sys.stdout if NOTEBOOK else sys.stderr  # a notebook shows standard error as an error
    return tqdm(
        total=total,
        desc=_thread.prefix + what,
        unit=unit,
        unit_scale=unit == "B",
        disable=hidden,
        file=file,
        leave=False,
        dynamic_ncols=True,
    )
