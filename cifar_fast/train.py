"""``python -m cifar_fast.train``: train the recipe, and write down what came of it."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from typing import NoReturn

from cifar_fast.data import DATASETS, load_dataset
from cifar_fast.errors import InputError
from cifar_fast.recipe import Recipe


def main(argv: list[str] | None = None) -> int:
    """Run the command with ``argv`` (default: the process's own); gives the exit code, 2 for bad input."""
    try:
        args = _parser().parse_args(argv)
        recipe = recipe_of(args)
        if args.print_recipe:
            print(recipe.to_json())
            return 0
        return _train(args, recipe)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the epochs that ended are in the output folder's metrics.jsonl", file=sys.stderr)
        return 130


def _train(args: argparse.Namespace, recipe: Recipe) -> int:
    from cifar_fast.trainer import check, fit  # imports torch, which takes seconds: not for --help or a mistyped flag

    how = {name: getattr(args, name) for name in ("backend", "device", "dtype", "seed", "runs", "output", "overwrite")}
    how["output"] = args.output or time.strftime(f"runs/{args.dataset}-%Y%m%d-%H%M%S")
    check(**how)  # before the data, which may take long to come
    fit(recipe, load_dataset(args.dataset, args.data_dir), **how)
    print(f"written to {how['output']}")
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists the flags")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m cifar_fast.train", description="Train the reference CIFAR-10 recipe.", allow_abbrev=False)
    add_run_flags(parser)
    group = parser.add_argument_group("what is written")
    group.add_argument(
        "--output", metavar="DIR", help="folder for metrics.jsonl, summary.json, curves.png and model.pt (default: a new one under runs/)"
    )
    group.add_argument("--overwrite", action="store_true", help="replace the results that the output folder holds")
    group.add_argument("--print-recipe", action="store_true", help="print the recipe as JSON and stop")
    return parser


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what is trained, on what and how; a flag for each constant of the recipe among them."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset", choices=DATASETS, default="cifar10", help="; ".join(f"{name}: {what}" for name, what in DATASETS.items())
    )
    group.add_argument("--data-dir", metavar="PATH", help="where the data set is, or for cifar10 goes (default for cifar10: data)")

    group = parser.add_argument_group("how it runs")
    backends = ("auto", "eager", "compiled", "fused")
    group.add_argument(
        "--backend", choices=backends, default="auto", help="eager is the reference; compiled is torch.compile; auto is the fastest here"
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    dtypes = ("auto", "float16", "bfloat16", "float32")
    group.add_argument(
        "--dtype", choices=dtypes, default="auto", help="float16 and float32 hold everything, bfloat16 keeps float32 weights (autocast)"
    )
    group.add_argument("--seed", type=int, default=0, help="seed of the first run (default: 0)")
    group.add_argument("--runs", type=int, default=1, help="train that often; run i has seed + i (default: 1)")

    group = parser.add_argument_group("the recipe")
    group.add_argument("--recipe", metavar="FILE", help="recipe to start from, JSON as --print-recipe gives it (default: the reference's)")
    for field in dataclasses.fields(Recipe):
        flag, default = f"--{field.name.replace('_', '-')}", field.default
        if isinstance(default, bool):
            group.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=None, help=f"{field.metadata['help']} (default: {default})"
            )
            continue
        several = isinstance(default, tuple)
        shown = " ".join(f"{value:g}" for value in default) if several else f"{default:g}"
        group.add_argument(
            flag,
            type=type(default[0] if several else default),
            nargs="+" if several else None,
            metavar="N" if isinstance(default, int) or (several and isinstance(default[0], int)) else "X",
            help=f"{field.metadata['help']} (default: {shown})",
        )


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe that the flags of :func:`add_run_flags` state."""
    recipe = Recipe.load(args.recipe) if args.recipe else Recipe()
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)}
    return dataclasses.replace(recipe, **{name: value for name, value in given.items() if value is not None})


if __name__ == "__main__":
    sys.exit(main())
