"""``cifar-fast train``: train the recipe, and write the results to a folder."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from typing import TYPE_CHECKING, Any

from cifar_fast.cli import profile
from cifar_fast.cli.flags import (
    READER_GONE,
    add_config_flags,
    add_run_flags,
    command_parser,
    config_of,
    data_options_of,
    interruptible,
    joined,
    name_and_path,
    print_error,
    print_line,
    print_to_stderr,
    recipe_of,
    run_command,
)
from cifar_fast.data.sources import check_named, place_of, read_dataset
from cifar_fast.training.config import TrainConfig
from cifar_fast.utils.distributed import World
from cifar_fast.utils.errors import InputError
from cifar_fast.utils.progress import LOGGER, heartbeat, lines_to
from cifar_fast.utils.provenance import command_line

if TYPE_CHECKING:
    from cifar_fast.training.results import Result

RESUMED_AUTO = ("backend", "device", "dtype", "memory_format")
"""Options of which ``auto`` keeps the earlier choice on a resume."""

SUMMARY = "train the recipe, and write the results to a folder"


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code: 1 if a run diverged or a file could not be written, 2 for bad input."""
    return run_command(lambda: run(argv), argv, "interrupted before there was anything to resume", shared=True)


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("train", SUMMARY)
    add_run_flags(parser)
    add_config_flags(
        parser, ("validation", "validation_seed", "runs", "init_seed", "order_seed", "augment_seed", "threads")
    )
    group = parser.add_argument_group("results")
    group.add_argument(
        "--output",
        metavar="DIR",
        help="folder for metrics.jsonl, summary.json, curves.png and model.pt (default: a new one under runs/)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace the results in the output folder")
    group.add_argument(
        "--resume",
        metavar="DIR",
        help="continue the training in that folder, with the flags that it was started with; --runs may grow",
    )
    group.add_argument(
        "--like",
        metavar="DIR",
        help="train as in that folder, from the start: its flags are the defaults, also of data, device and threads",
    )
    add_config_flags(group, ("checkpoint_every", "verify_every", "save_logits", "tta"))
    group.add_argument(
        "--log",
        choices=("none", "tensorboard"),
        default="none",
        help=f"tensorboard: {TrainConfig.help('tensorboard')} (default: none)",
    )
    group.add_argument(
        "--profile", metavar="DIR", help="do not train, but run the profile command, which writes to that folder"
    )
    group.add_argument("--print-recipe", action="store_true", help="print the recipe as JSON and stop")
    group.add_argument(
        "--also-test",
        type=name_and_path,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help=TrainConfig.help("also_test"),
    )
    return parser


def run(argv: list[str] | None) -> int:
    """Check everything that needs neither the other processes nor the data, and then train."""
    parser = make_parser()
    typed = args = parser.parse_args(argv)
    folder: Any = None
    if args.like and args.resume:
        raise InputError("give --like or --resume: one trains again from the start, the other continues")
    if args.resume:
        if args.output or args.overwrite:
            raise InputError("give --resume alone, without --output and --overwrite")
        from cifar_fast.training.run_folder import RunFolder

        folder = RunFolder(args.resume, resume=True)
        parser.set_defaults(**flags_of(folder.earlier, typed))
        args = parser.parse_args(argv)
    paths: dict[str, str] = {}
    if args.like:
        from cifar_fast.training.results import RunReader

        like = RunReader(args.like, f"--like {args.like}").training()
        if like.model:
            raise InputError(f"--like {args.like}: its model {like.model} exists in Python only; train it there by fit")
        how = {name: getattr(like.config, name) for name in RESUMED_AUTO}
        parser.set_defaults(**flags_of(like, typed), **how)
        args, paths = parser.parse_args(argv), like.paths
    if args.print_recipe:
        print_line(recipe_of(args).to_json())
        return 0
    if args.profile:
        if World.from_env().size > 1:
            raise InputError("--profile runs in one process; start it without torchrun, RANK and WORLD_SIZE")
        if (folder or paths) and not typed.data_dir:
            args.data_dir = place_of(args.dataset, args.data_dir, paths or folder.earlier.paths)
        args.output = args.profile
        with lines_to(print_line):
            return profile.run(args)
    if len(dict(args.also_test)) < len(args.also_test):
        raise InputError("--also-test: two test sets have the same name; give them different names")
    args.also_test, args.tensorboard = dict(args.also_test), args.log == "tensorboard"
    config = config_of(args)
    config.check_runs_differ()
    data_options_of(args)
    check_named(args.dataset, args.data_dir)
    with joined() as world:
        command = command_line("train", sys.argv[1:] if argv is None else argv)
        return train_in(world, args, config, folder, typed, paths, command)


def train_in(
    world: World,
    args: argparse.Namespace,
    config: TrainConfig,
    folder: Any,
    typed: argparse.Namespace,
    paths: dict[str, str],
    command: str,
) -> int:
    """Train with the processes of ``world``.

    ``folder`` is that of the training to resume, or None. ``typed`` has the flags without those of an earlier training,
    and ``paths`` the absolute paths of the one that is repeated.
    """
    with world.all_or_none():
        from cifar_fast.training.fit import Training, train_all
        from cifar_fast.training.run_folder import RunFolder
        from cifar_fast.utils.device import tune_malloc

        # Check everything possible before the data is loaded, because loading may take long.
        if folder is None:
            folder = RunFolder(args.output or default_output(args.dataset), args.overwrite, new=not args.output)
        training = Training(config, folder, command=command, world=world)
        training.paths |= paths
        # Data that is named is compared first.
        if not (typed.data_dir or typed.also_test) and (finished := training.finished()):
            return exit_code(finished, world)
        data_dir = typed.data_dir or place_of(args.dataset, args.data_dir, training.paths)
        options = data_options_of(args).relocated(training.paths)
    if training.device.type == "cpu":
        tune_malloc()
    with interruptible(quiet=world.rank > 0) as on_step:
        try:
            with heartbeat(lambda: f"reading the data set {args.dataset}"):
                dataset = world.rank0_first(lambda: read_dataset(args.dataset, data_dir, args.data_url, options))
            with world.all_or_none():
                training.prepare(dataset)
                del dataset  # the training may hold copies of some of its images
                if finished := training.finished():
                    return exit_code(finished, world)
            results = train_all([training], world, on_step=on_step)
        except (KeyboardInterrupt, SystemExit) as stop:
            if not folder.resumable:
                raise
            resume = f"to resume: {shlex.join(['cifar-fast', 'train', '--resume', str(folder.path)])}"
            if isinstance(stop, SystemExit):
                print_to_stderr(f"{READER_GONE}; {resume}")
                raise
            raise KeyboardInterrupt(f"interrupted; {resume}") from None
    if folder.resumable:  # something was trained
        LOGGER.info(f"written to {folder.path}")
    return exit_code(results[0] if results else None, world)


def exit_code(result: Result | None, world: World) -> int:
    """Return 1 if a run diverged or a file could not be written, with a line for each, else 0, as on other ranks."""
    problems = result.problems() if result and world.rank == 0 else []
    for line in problems:
        print_error(line)
    return 1 if problems else 0


def flags_of(earlier: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags that the training ``earlier`` was started with, as defaults for those left out of ``args``."""
    config = earlier.config
    flags = {name: getattr(config, name) for name in TrainConfig.names() if name not in RESUMED_AUTO}
    flags["also_test"] = [] if args.also_test else [*config.also_test.items()]  # the flag adds to its default
    flags |= {"dataset": earlier.dataset["name"], "data_dir": earlier.dataset["source"]} | earlier.dataset["options"]
    flags["log"] = "tensorboard" if flags.pop("tensorboard") else "none"
    return flags if args.recipe else flags | dataclasses.asdict(config.recipe)


def default_output(dataset: str) -> str:
    """Return a name for a new folder for results on a data set, whose name may contain slashes."""
    return time.strftime(f"runs/{dataset.replace('/', '-').replace(':', '-')}-%Y%m%d-%H%M%S")
