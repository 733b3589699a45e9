"""``python -m cifar_fast.train``: train the recipe, and write down what came of it."""

from __future__ import annotations

import argparse
import sys
import time

from cifar_fast.data import load_dataset
from cifar_fast.flags import Parser, add_run_flags, recipe_of, run_command
from cifar_fast.recipe import Recipe

HOW = ("backend", "device", "dtype", "memory_format", "seed")


def main(argv: list[str] | None = None) -> int:
    """Run the command with ``argv`` (default: the process's own); gives the exit code, 2 for bad input."""
    return run_command(lambda: _command(argv), "interrupted; the epochs that ended are in the output folder's metrics.jsonl")


def _command(argv: list[str] | None) -> int:
    args = _parser().parse_args(argv)
    recipe = recipe_of(args)
    if args.print_recipe:
        print(recipe.to_json())
        return 0
    return (_profile if args.profile else _train)(args, recipe)


def _train(args: argparse.Namespace, recipe: Recipe) -> int:
    from cifar_fast.trainer import check, fit  # imports torch, which takes seconds: not for --help or a mistyped flag

    how = {name: getattr(args, name) for name in (*HOW, "runs", "output", "overwrite")}
    how["output"] = args.output or time.strftime(f"runs/{args.dataset}-%Y%m%d-%H%M%S")
    check(**how)  # before the data, which may take long to come
    fit(recipe, load_dataset(args.dataset, args.data_dir), **how)
    print(f"written to {how['output']}")
    return 0


def _profile(args: argparse.Namespace, recipe: Recipe) -> int:
    """Train a few steps, and tell where their time goes."""
    import torch

    from cifar_fast.augment import draw_epoch
    from cifar_fast.backends import on
    from cifar_fast.model import CNN
    from cifar_fast.profile import profile
    from cifar_fast.trainer import check, set_up

    how = {name: getattr(args, name) for name in HOW}
    choice = check(**how, runs=1, output=None, overwrite=False)
    dataset = load_dataset(args.dataset, args.data_dir)
    dataset.steps_per_epoch(recipe.batch_size)
    torch.manual_seed(args.seed)
    with on(choice.device):
        trained = set_up(choice, recipe, dataset, print)
        trained.prepare(CNN(recipe, dataset.num_classes))
        profile(trained, draw_epoch(len(dataset.train_images), device=choice.device, recipe=recipe), args.profile)
    print(f"written to {args.profile}: trace.json for ui.perfetto.dev, and profile.json")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m cifar_fast.train", description="Train the reference CIFAR-10 recipe.", allow_abbrev=False)
    add_run_flags(parser)
    parser.add_argument("--runs", type=int, default=1, help="train that often; run i has the seed of the first, plus i (default: 1)")
    group = parser.add_argument_group("what is written")
    group.add_argument(
        "--output", metavar="DIR", help="folder for metrics.jsonl, summary.json, curves.png and model.pt (default: a new one under runs/)"
    )
    group.add_argument("--overwrite", action="store_true", help="replace the results that the output folder holds")
    group.add_argument(
        "--profile", metavar="DIR", help="do not train: trace a few steps, and write the trace and a table of where their time goes there"
    )
    group.add_argument("--print-recipe", action="store_true", help="print the recipe as JSON and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
