"""Progress of long work: lines on the logger ``cifar_fast``, and a bar on a terminal or in a notebook."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator

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


class _Thread(threading.local):
    quiet = False
    prefix = ""


_thread = _Thread()


def print_line(line: str) -> None:
    """Print ``line`` at once, also to a file."""
    print(line, flush=True)


class _LineHandler(logging.Handler):
    """Hands the lines of one thread to a function."""

    def __init__(self, log: LogFn) -> None:
        super().__init__(logging.INFO)
        self.log, self.thread = log, threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        """Pass this thread's lines. Python asks before it takes the handler's lock, so threads do not wait here."""
        return record.thread == self.thread

    def emit(self, record: logging.LogRecord) -> None:
        line = _thread.prefix + self.format(record)
        try:
            self.log(line)
        except UnicodeEncodeError:  # a path may hold letters that the output's encoding lacks
            self.log(line.encode("ascii", "backslashreplace").decode())


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


def progress_bar(total: int | None, what: str, unit: str) -> tqdm:
    """Return a bar that vanishes at its end, shown in a notebook or if standard error is a terminal.

    Bytes, unit "B", show as MB/s.
    """
    hidden = _thread.quiet or (False if NOTEBOOK else None)  # None: tqdm tests for a terminal
    file = sys.stdout if NOTEBOOK else sys.stderr  # a notebook shows standard error as an error
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        unit_scale=unit == "B",
        disable=hidden,
        file=file,
        leave=False,
        dynamic_ncols=True,
    )
