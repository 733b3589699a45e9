"""Parts that the commands share: flags made from the options, and how errors and interrupts are reported."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from cifar_fast.data.options import DataOptions
from cifar_fast.data.sources import DATA_URL, DATASETS, is_dataset
from cifar_fast.recipe import Recipe, shipped_recipes
from cifar_fast.training.config import TrainConfig
from cifar_fast.utils.distributed import ReportedOnRank0, World
from cifar_fast.utils.errors import (
    Diverged,
    InputError,
    MissingRuns,
    did_you_mean,
    first_line,
    out_of_memory,
    visible,
    with_flags,
)
from cifar_fast.utils.files import check_writable
from cifar_fast.utils.progress import LOGGER, UNPRINTED, lines_to, tell_unprinted

READER_GONE = "the reader of the output is gone"
"""Begin of the line about an end by a closed pipe, as after ``| head -1``."""

SHARED = ("backend", "device", "dtype", "memory_format", "seed")
"""Options of a training that ``compare`` and ``profile`` have too."""


class Parser(argparse.ArgumentParser):
    """A parser that raises :class:`InputError` for wrong flags and accepts no abbreviations."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        hint = ""
        if choice := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            hint = did_you_mean(choice[1], [name.strip(" '") for name in choice[2].split(",")])
        elif flag := re.match(r"unrecognized arguments: .*?(--[\w-]+)", message):
            hint = did_you_mean(flag[1], [name for name in self._option_string_actions if name.startswith("--")])
        raise InputError(f"{message}{hint or '; --help lists the flags'}")


def command_parser(name: str, summary: str) -> Parser:
    """Return a parser without flags for the command ``cifar-fast NAME``."""
    return Parser(prog=f"cifar-fast {name}", description=f"{summary[0].upper()}{summary[1:]}.")


def run_command(
    command: Callable[[], int],
    argv: list[str] | None,
    on_interrupt: str = "interrupted",
    *,
    flags: bool = True,
    shared: bool = False,
) -> int:
    """Run ``command`` and return its exit code.

    An :class:`InputError` is printed in one line and gives 2; :class:`Diverged` and :class:`MissingRuns` give 1. Ctrl-C
    gives 130. A line that could not be printed turns 0 into 1. An error also shows its traceback if ``argv`` (default:
    ``sys.argv``) has --traceback. ``flags``: whether the options that an error names are flags of the command.
    ``shared``: processes may share the command's work, and it prints its lines inside :func:`joined`.
    """
    show_traceback = "--traceback" in (sys.argv if argv is None else argv)
    open_closed_streams()
    UNPRINTED.clear()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # lines go out as they come, escaped if the encoding lacks a letter
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        with debug_to_stderr(show_traceback), lines_to(None if shared else print_line):
            return command() or int(UNPRINTED.is_set())
    except ReportedOnRank0:
        return 2
    except (InputError, Diverged, MissingRuns) as error:
        if show_traceback:
            traceback.print_exc()
        print_error(error.message if flags else str(error))
        return 2 if isinstance(error, InputError) else 1
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        if show_traceback:
            traceback.print_exc()
        print_error(f"out of memory ({first_line(error)}); free memory, or use less data")
        return 2
    except KeyboardInterrupt as interrupt:
        print_to_stderr(str(interrupt) or on_interrupt)
        return 130
    finally:
        drop_unprinted()


def open_closed_streams() -> None:
    """Open the null device in place of each standard stream that is closed.

    Otherwise a file of ours would get its number, and all that libraries print there.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (until the process ends)


def drop_unprinted() -> None:
    """Drop what standard output and standard error still hold if it cannot be written. Python would fail at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """Join the processes that torchrun started, and yield their world. Inside the block only rank 0 prints lines.

    A command checks all that it can before. Without the others, as with variables that torchrun left, it would wait.
    """
    world = World.from_env()
    with contextlib.ExitStack() as stack:
        with lines_to(print_line):
            world.warn_if_alone()
            stack.enter_context(world.process_group())
        stack.enter_context(lines_to(None if world.rank else print_line))
        try:
            yield world
        except KeyboardInterrupt:
            if world.rank:
                raise SystemExit(130) from None  # rank 0 prints about it
            raise


@contextlib.contextmanager
def debug_to_stderr(enabled: bool) -> Iterator[None]:
    """Write debug records, the tracebacks of failed backends, to standard error inside the block if ``enabled``."""
    handler, level = logging.StreamHandler(), LOGGER.level
    handler.addFilter(lambda record: record.levelno == logging.DEBUG)
    if enabled:
        LOGGER.addHandler(handler)
        LOGGER.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)


@contextlib.contextmanager
def signals_to(call: Callable[[int], None]) -> Iterator[None]:
    """Call ``call`` in another thread with the number of each signal that comes inside the block.

    Python's own handlers run in the main thread, which may be in a long call of C code.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def listen() -> None:
        with open(reader, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                call(number[0])

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        listener.join()


@contextlib.contextmanager
def interruptible(quiet: bool = False) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each step, which raises KeyboardInterrupt if Ctrl-C or SIGTERM has come.

    Once the function was called, the first signal waits for its next call, and a line says so at once unless ``quiet``.
    A second signal, or one before the first call, interrupts at once. The caller's signal handlers are restored
    afterwards.
    """
    asked = stepping = answered = False

    def answer(number: int) -> None:
        nonlocal answered
        if number in before and stepping and not (answered or quiet):
            answered = True
            again = "; to stop at once, press Ctrl-C again" if number == signal.SIGINT else ""
            line = f"finishing this step{again}\n"
            with contextlib.suppress(OSError):
                os.write(2, f"\n{line}".encode() if os.isatty(2) else line.encode())  # a bar may be there

    def handle(*signal_and_frame: object) -> None:
        nonlocal asked
        if asked or not stepping:
            raise KeyboardInterrupt
        asked = True

    def on_step() -> None:
        nonlocal stepping
        stepping = True
        if asked:
            raise KeyboardInterrupt

    before: dict[int, Any] = {}
    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            stack.enter_context(signals_to(answer))
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # ignored under nohup
                    before[number] = signal.signal(number, handle)
                    stack.callback(signal.signal, number, before[number])
        yield on_step


def print_line(text: str) -> None:
    """Print ``text``. Control characters other than line breaks are escaped.

    End the command quietly if the reader of its output is gone, as after ``| head -1``.

    Other errors, such as a full disk, end nothing: nobody asked for an end.
    Raise SystemExit and not the OSError: callers turn an OSError into an error about a file that they write.
    """
    try:
        print("\n".join(map(visible, text.split("\n"))), flush=True)
    except BrokenPipeError:
        if threading.current_thread() is threading.main_thread():  # it prints the next line, and ends the command then
            raise SystemExit(128 + signal.SIGPIPE) from None
    except OSError as error:
        tell_unprinted(error)


def print_error(message: str) -> None:
    """Print ``message`` on standard error, with marked options as flags."""
    print_to_stderr(f"error: {with_flags(message)}")


def print_to_stderr(line: str) -> None:
    """Print ``line`` on standard error, without control characters. A failure changes no exit code."""
    with contextlib.suppress(OSError):
        print(visible(line), file=sys.stderr, flush=True)


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the data set: its name, and where it is."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        type=_dataset,
        default="cifar10",
        metavar="NAME",
        help=with_flags("; ".join(f"{name}: {what}" for name, what in DATASETS.items())),
    )
    group.add_argument(
        "--data-dir",
        metavar="PATH",
        help="where the data set is; cifar10 and cifar100 are downloaded there (default for these: data)",
    )
    group.add_argument(
        "--data-url",
        metavar="URL",
        help=f"URL or file of the archive of cifar10 or cifar100, instead of public sources (default: ${DATA_URL})",
    )
    for field in dataclasses.fields(DataOptions):
        add_flag(group, field, field.default)


def _dataset(name: str) -> str:
    if not is_dataset(name):
        raise argparse.ArgumentTypeError(f"invalid choice: {name!r} (choose from {', '.join(DATASETS)})")
    return name


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that ``train``, ``compare`` and ``profile`` share: data, options, recipe."""
    add_data_flags(parser)
    group = parser.add_argument_group("how it runs")
    add_config_flags(group, SHARED)
    add_traceback_flag(group)
    group = parser.add_argument_group("the recipe")
    group.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        help=f"recipe to start from: {', '.join(shipped_recipes())}; or a file, JSON as --print-recipe writes it, or "
        "summary.json of a training (default: reference)",
    )
    for field in dataclasses.fields(Recipe):
        add_flag(group, field, None)


def add_config_flags(group: Any, names: tuple[str, ...]) -> None:
    """Add a flag for each option of :class:`TrainConfig` in ``names``, with the field's help, to a parser or group."""
    for field in dataclasses.fields(TrainConfig):
        if field.name in names:
            add_flag(group, field, field.default)


def add_flag(group: Any, field: dataclasses.Field[Any], default: Any) -> None:
    """Add the flag of a field of a class of options, with ``default`` if it is left out."""
    value, shown = field.default, str(field.default)
    settings: dict[str, Any] = {}
    if isinstance(value, bool):
        settings["action"] = argparse.BooleanOptionalAction
    elif isinstance(value, str):
        choices = field.metadata["choices"] or None
        settings["choices"] = ("auto", *choices) if choices and value == "auto" else choices
    elif isinstance(value, tuple):
        item = field.metadata["item"]
        shown = " ".join(f"{one:g}" for one in value) or "all"
        kinds = {int: "N", float: "X", tuple: "CLASS"}
        kind = number_or_name if isinstance(item, tuple) else type(item)
        settings.update(type=kind, nargs="+", metavar=kinds[type(item)])
    elif field.type == "int | float":
        settings.update(type=number, metavar="N")
    elif isinstance(value, float):
        shown = f"{value:g}"
        settings.update(type=float, metavar="X")
    else:
        kind = field.metadata.get("kind", int)
        settings.update(type=kind, metavar={int: "N", float: "X", str: "FILE"}[kind])
    text = field.metadata["help"] if value is None else f"{field.metadata['help']} (default: {shown})"
    group.add_argument(f"--{field.name.replace('_', '-')}", default=default, help=text, **settings)


def number(text: str) -> int | float:
    """Return the value of a flag that takes a number or a fraction."""
    return int(text) if text.isdecimal() else float(text)


def number_or_name(text: str) -> int | str:
    """Return a value of --classes: the integer that ``text`` is, or else ``text``."""
    return int(text) if text.removeprefix("-").isdecimal() else text


def add_device_flags(group: Any, dtype: bool = True) -> None:
    """Add --device, --dtype if wanted, and --traceback to a parser or group."""
    add_config_flags(group, ("device", "dtype") if dtype else ("device",))
    add_traceback_flag(group)


def add_traceback_flag(group: Any) -> None:
    """Add the flag that :func:`run_command` reads, to a parser or group."""
    group.add_argument("--traceback", action="store_true", help="show the traceback of an error")


def name_and_path(text: str) -> tuple[str, str]:
    """Return the value of a flag NAME=PATH."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, path


def recipe_of(args: argparse.Namespace) -> Recipe:
    """Return the recipe of the flags of :func:`add_run_flags`."""
    recipe = Recipe.load(args.recipe) if args.recipe else Recipe()
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)}
    return dataclasses.replace(recipe, **{name: value for name, value in given.items() if value is not None})


def data_options_of(args: argparse.Namespace) -> DataOptions:
    """Return the options of reading the data of the flags of :func:`add_data_flags`."""
    return DataOptions(**{name: getattr(args, name) for name in DataOptions.names()})


def config_of(args: argparse.Namespace) -> TrainConfig:
    """Return the config of the flags, with defaults for options that the command has no flag for."""
    options = {name: getattr(args, name) for name in TrainConfig.names() if hasattr(args, name)}
    return TrainConfig(recipe=recipe_of(args), **options)


def check_json(path: Path | None) -> None:
    """Raise :class:`InputError` if ``--json`` names a file that cannot be written."""
    if path:
        if not path.parent.is_dir() or path.is_dir():
            raise InputError(f"--json {path}: must name a file in an existing folder")
        check_writable(path.parent, f"--json {path}", "choose another file")
