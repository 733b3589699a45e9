"""``cifar-fast train``."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from typing import Any

from cifar_fast.cli import profile
from cifar_fast.cli.flags import (
    Parser,
    add_run_flags,
    interruptible,
    name_and_path,
    recipe_of,
    run_command,
    sentence,
)
from cifar_fast.data.sources import read_dataset
from cifar_fast.utils.distributed import World
from cifar_fast.utils.errors import InputError
from cifar_fast.utils.progress import LOGGER

SUMMARY = "train the recipe, and write down what came of it"


def main(argv: list[str] | None = None) -> int:
    """``cifar-fast train``, and ``python -m cifar_fast.train``."""
    return run_command(lambda: run(argv), argv, "interrupted before there was anything to go on from")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="cifar-fast train", description=sentence(SUMMARY))
    add_run_flags(parser)
    parser.add_argument(
        "--runs", type=int, default=1, help="train that often; run i has the seed of the first, plus i (default: 1)"
    )
    for name, what in (("init", "initial weights"), ("order", "order"), ("augment", "augmentation")):
        parser.add_argument(
            f"--{name}-seed",
            type=int,
            metavar="SEED",
            help=f"of the {what} alone, and the same in all runs; weights, order and augmentation then have a stream "
            "each, of --seed where none is given (default: one stream of --seed for all three, as the reference)",
        )
    group = parser.add_argument_group("what is written")
    group.add_argument(
        "--output",
        metavar="DIR",
        help="folder for metrics.jsonl, summary.json, curves.png and model.pt (default: a new one under runs/)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace the results that the output folder holds")
    group.add_argument(
        "--resume",
        metavar="DIR",
        help="in the place of --output: go on with the training in that folder where it stopped, with the flags "
        "that it was given; --runs may grow",
    )
    group.add_argument(
        "--checkpoint-every",
        type=int,
        default=1,
        metavar="N",
        help="epochs from a checkpoint to the next; each run leaves one at its end, with 0 that one alone (default: 1)",
    )
    group.add_argument(
        "--save-logits", action="store_true", help="keep each run's logits of the test images, in logits.npz"
    )
    group.add_argument(
        "--log",
        choices=("none", "tensorboard"),
        default="none",
        help="write each epoch's loss, accuracies and learning rate for TensorBoard too, under tensorboard/ in the "
        "output folder (default: none)",
    )
    group.add_argument(
        "--profile", metavar="DIR", help="do not train: the profile command, which writes to that folder"
    )
    group.add_argument("--print-recipe", action="store_true", help="print the recipe as JSON and stop")
    group.add_argument(
        "--also-test",
        type=name_and_path,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="also tell the accuracy at the end of each run on another test set: CIFAR-10.1, CIFAR-10.2, CIFAR-10-C as "
        "published, or a .npz file with images and labels; may be given several times",
    )
    return parser


def run(argv: list[str] | None) -> int:
    with World.stated().joined() as world:
        return run_in(world, argv)


def run_in(world: World, argv: list[str] | None) -> int:
    with world.together():
        parser = make_parser()
        args = parser.parse_args(argv)
        output: Any = None
        if args.resume:
            from cifar_fast.training.run_folder import Output

            if args.output or args.overwrite:
                raise InputError("--resume stands in the place of --output, without --overwrite; give one of them")
            output = Output(args.resume, resume=True)
            parser.set_defaults(**output.checkpoint.flags(args))
            args = parser.parse_args(argv)
        recipe = recipe_of(args)
        if args.print_recipe:
            LOGGER.info(recipe.to_json())
            return 0
        if args.profile:
            if world.size > 1:
                raise InputError("--profile is of one process; leave torchrun out")
            args.output = args.profile
            return profile.run(args)

        from cifar_fast.backends.select import resolve_backend
        from cifar_fast.training.fit import check, fit_shared, nothing_to_do
        from cifar_fast.training.run_folder import Output
        from cifar_fast.utils.device import tune_malloc
        from cifar_fast.utils.seeds import Seeds

        # Whatever can be refused is refused before the data, which may take long to come.
        plan = (output.checkpoint.plan if output else resolve_backend)(
            args.backend, args.device, args.dtype, args.memory_format
        )
        plan = world.own_device(plan, args.device)
        seeds = Seeds(args.seed, args.init_seed, args.order_seed, args.augment_seed)
        check(plan, seeds, args.runs, checkpoint_every=args.checkpoint_every)
        also_test = dict(args.also_test)
        if len(also_test) < len(args.also_test):
            raise InputError("--also-test: two test sets have one name; give each its own")
        if output is None:
            output = Output(args.output or default_output(args.dataset), args.overwrite, new=not args.output)
        elif output.checkpoint.nothing_left(output.name, recipe, plan, seeds, args.runs, also_test, args.save_logits):
            LOGGER.info(nothing_to_do(output))
            return 0
        if args.log == "tensorboard":
            from cifar_fast.training.tensorboard import TensorBoard

            output.tensorboard = TensorBoard(recipe)
    if plan.device.type == "cpu":
        tune_malloc()
    with interruptible() as on_step:
        try:
            dataset = world.first_before_others(
                lambda: read_dataset(args.dataset, args.data_dir, data_url=args.data_url)
            )
            how: dict[str, Any] = dict(checkpoint_every=args.checkpoint_every, also_test=also_test)
            how |= dict(save_logits=args.save_logits, seeds=seeds, runs=args.runs, output=output, on_step=on_step)
            result = fit_shared(world, recipe, dataset, plan, **how)
        except KeyboardInterrupt:
            if not output.resumable:
                raise
            go_on = shlex.join(["cifar-fast", "train", "--resume", str(output.path)])
            raise KeyboardInterrupt(f"interrupted; to go on: {go_on}") from None
    LOGGER.info(f"written to {output.path}")
    unwritten = result.unwritten if result else ()
    for line in unwritten:
        print(f"error: {line}", file=sys.stderr)
    return 1 if unwritten else 0


def default_output(dataset: str) -> str:
    """A name for a new folder for results on the data set of that name, which may have slashes in it."""
    return time.strftime(f"runs/{dataset.replace('/', '-').replace(':', '-')}-%Y%m%d-%H%M%S")
