"""``cifar-fast profile``."""

from __future__ import annotations

import argparse

from cifar_fast.cli.flags import add_run_flags, command_parser, config_of, data_options_of, print_line, run_command
from cifar_fast.data.sources import read_dataset
from cifar_fast.utils.files import check_writable, expand_home

SUMMARY = "train a few steps, and write a trace and a table of where the time goes"


def main(argv: list[str] | None = None) -> int:
    """Run ``cifar-fast profile``; return 0, or 2 for bad input."""
    return run_command(lambda: run(make_parser().parse_args(argv)), argv)


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("profile", SUMMARY)
    add_run_flags(parser)
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for trace.json and profile.json")
    return parser


def run(args: argparse.Namespace) -> int:
    from cifar_fast.backends.select import build_backend
    from cifar_fast.data.augment import draw_epoch
    from cifar_fast.data.tensors import device_data
    from cifar_fast.diagnostics.profile import profile
    from cifar_fast.training.fit import seeds_of, settle_backend
    from cifar_fast.utils.device import device_guard, tune_malloc
    from cifar_fast.utils.torch_defaults import torch_defaults

    options = config_of(args)
    recipe, config = options.recipe, settle_backend(options)
    check_writable(expand_home(args.output), f"--output {args.output}")
    if config.device.type == "cpu":
        tune_malloc()
    dataset = read_dataset(args.dataset, args.data_dir, args.data_url, data_options_of(args)).for_recipe(recipe)
    dataset.check_trainable(recipe.batch_size)
    weights, order, augmentation = seeds_of(options).for_run(0).generators(config.device)
    with device_guard(config.device), torch_defaults(config.device):
        backend, _ = build_backend(config, recipe, device_data(dataset, config.device))
        backend.reset(backend.new_model(weights))
        n = len(dataset.train_images)
        draws = draw_epoch(n, device=config.device, recipe=recipe, generator=augmentation, order=order)
        profile(backend, draws, args.output)
    print_line(f"written to {args.output}: trace.json for ui.perfetto.dev, and profile.json")
    return 0
