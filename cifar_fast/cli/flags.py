"""What the commands share: the flags that say what is trained and how, and how a mistake is told."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from cifar_fast.data.sources import DATA_URL, DATASETS, is_dataset
from cifar_fast.recipe import BACKENDS, DTYPES, MEMORY_FORMATS, Recipe
from cifar_fast.utils.distributed import World
from cifar_fast.utils.errors import Diverged, InputError, MissingRuns, with_flags
from cifar_fast.utils.files import check_writable
from cifar_fast.utils.progress import lines_to


class Parser(argparse.ArgumentParser):
    """Raises :class:`InputError` for flags that are wrong, and takes none by its beginning alone."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists the flags")


def run_command(command: Callable[[], int], argv: list[str] | None, on_interrupt: str = "interrupted") -> int:
    """The exit code of ``command``: its own; 2 for :class:`InputError`, 1 for :class:`Diverged` and
    :class:`MissingRuns`, told in a line; 130 for Ctrl-C, which of torchrun's processes the first one tells.

    With --traceback in ``argv`` (None: the process's own) an error also shows where it came from.
    """
    show_traceback = "--traceback" in (sys.argv if argv is None else argv)
    if show_traceback:
        logging.getLogger("cifar_fast").setLevel(logging.DEBUG)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # lines go out as they come, escaped where the encoding lacks a letter
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        with lines_to(None if World.stated().rank else say):
            return command()
    except (InputError, Diverged, MissingRuns) as error:
        if show_traceback:
            traceback.print_exc()
        message = error.with_flags() if isinstance(error, InputError) else error
        print(f"error: {message}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt as interrupt:
        if World.stated().rank == 0:
            print(str(interrupt) or on_interrupt, file=sys.stderr)
        return 130


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Gives a function to call after each step, which raises KeyboardInterrupt where Ctrl-C or SIGTERM has come.

    Either waits for that call once there was a first; a second one, or one before, ends at once. For commands: a
    process has one set of handlers, which are the caller's again afterwards.
    """
    asked = stepping = False

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

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # as under nohup
                before[number] = signal.signal(number, handle)
    try:
        yield on_step
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(line: str) -> None:
    """Print ``line``. End the command quietly if the reader of its output is gone, as after ``| head -1``.

    That is an exit and no error, because code between here and the command would blame one of its own files.
    """
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        raise SystemExit(128 + signal.SIGPIPE) from None


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which data set, and where it is."""
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
        help="where the data set is, or for cifar10 and cifar100 goes (their default: data)",
    )
    group.add_argument(
        "--data-url",
        metavar="URL",
        help="source of the archive of cifar10 or cifar100, a URL or a file, in place of public ones "
        f"(default: ${DATA_URL})",
    )


def _dataset(name: str) -> str:
    if not is_dataset(name):
        raise argparse.ArgumentTypeError(f"invalid choice: {name!r} (choose from {', '.join(DATASETS)})")
    return name


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what is trained, on what and how; a flag for each constant of the recipe among them."""
    add_data_flags(parser)
    group = parser.add_argument_group("how it runs")
    group.add_argument(
        "--backend",
        choices=("auto", *BACKENDS),
        default="auto",
        help="eager: the reference; compiled: torch.compile; fused: our kernels in one CUDA graph; auto: the "
        "fastest here",
    )
    group.add_argument(
        "--memory-format",
        choices=("auto", *MEMORY_FORMATS),
        default="auto",
        help="of the batches; contiguous_format (NCHW) is the reference script's; auto: that for eager, else "
        "channels_last",
    )
    group.add_argument(
        "--seed", type=int, default=0, help="of the weights, the order and the augmentation (default: 0)"
    )
    add_device_flags(group)

    group = parser.add_argument_group("the recipe")
    group.add_argument(
        "--recipe",
        metavar="FILE",
        help="recipe to start from, JSON as --print-recipe gives it (default: the reference's)",
    )
    for field in dataclasses.fields(Recipe):
        flag = f"--{field.name.replace('_', '-')}"
        default: Any = field.default
        if isinstance(default, bool):
            group.add_argument(
                flag,
                action=argparse.BooleanOptionalAction,
                default=None,
                help=f"{field.metadata['help']} (default: {default})",
            )
            continue
        if choices := field.metadata["choices"]:
            group.add_argument(flag, choices=choices, help=f"{field.metadata['help']} (default: {default})")
            continue
        several = isinstance(default, tuple)
        one = field.metadata["item"] if several else default
        shown = " ".join(f"{value:g}" for value in default) or "all" if several else f"{default:g}"
        group.add_argument(
            flag,
            type=type(one),
            nargs="+" if several else None,
            metavar="N" if isinstance(one, int) else "X",
            help=f"{field.metadata['help']} (default: {shown})",
        )


def add_device_flags(group: Any, dtype: bool = True) -> None:
    """The flags of how it runs that every command has, ``--dtype`` where it has one, to a parser or a group of one."""
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    if dtype:
        group.add_argument(
            "--dtype",
            choices=("auto", *DTYPES),
            default="auto",
            help="float16 and float32 hold everything, bfloat16 keeps float32 weights (autocast)",
        )
    add_traceback_flag(group)


def add_traceback_flag(group: Any) -> None:
    """The flag that :func:`run_command` reads, to a parser or a group of one."""
    group.add_argument("--traceback", action="store_true", help="show where an error came from")


def name_and_path(text: str) -> tuple[str, str]:
    """The value of a flag NAME=PATH."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, path


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe that the flags of :func:`add_run_flags` state."""
    recipe = Recipe.load(args.recipe) if args.recipe else Recipe()
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)}
    return dataclasses.replace(recipe, **{name: value for name, value in given.items() if value is not None})


def sentence(summary: str) -> str:
    """``summary`` with a capital letter and a full stop."""
    return f"{summary[0].upper()}{summary[1:]}."


def interpret_without_gpu(device: str) -> None:
    """Have Triton interpret kernels where ``--device`` is no GPU; before anything imports it."""
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def check_json(path: Path | None) -> None:
    """Raise :class:`InputError` where ``--json`` names a file that cannot be written."""
    if path:
        if not path.parent.is_dir() or path.is_dir():
            raise InputError(f"--json {path}: must name a file in a folder that is there")
        check_writable(path.parent, f"--json {path}", "choose another file")
