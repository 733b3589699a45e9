"""The commands: ``cifar-fast train | predict | sweep | report | compare | profile | check``. Torch, which takes
seconds, is imported when one begins its work.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cifar_fast import __version__
from cifar_fast.data import load_dataset
from cifar_fast.distributed import World
from cifar_fast.errors import InputError
from cifar_fast.files import check_writable
from cifar_fast.flags import (
    Parser,
    add_device_flags,
    add_run_flags,
    add_traceback_flag,
    interruptible,
    name_and_path,
    recipe_of,
    run_command,
    say,
)
from cifar_fast.recipe import Recipe


def main(argv: list[str] | None = None) -> int:
    """Run a command with ``argv`` (default: the process's own); gives its exit code, 2 for bad input."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        lines = [f"  {name:9} {what}" for name, (_, what) in COMMANDS.items()]
        end = "\ncifar-fast COMMAND --help lists the flags; --version tells the version."
        print("usage: cifar-fast COMMAND [flags]\n", *lines, end, sep="\n")
        return 0
    if command == "--version":
        print(f"cifar-fast {__version__}")
        return 0
    if command not in COMMANDS:
        print(f"error: there is no command {command!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return COMMANDS[command][0](rest)


def _parser(command: str) -> Parser:
    _, what = COMMANDS[command]
    return Parser(prog=f"cifar-fast {command}", description=f"{what[0].upper()}{what[1:]}.")


# -- train


def train(argv: list[str] | None = None) -> int:
    """``cifar-fast train``, and ``python -m cifar_fast.train``."""
    return run_command(lambda: _train(argv), argv, "interrupted before there was anything to go on from")


def train_parser() -> argparse.ArgumentParser:
    parser = _parser("train")
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


def _train(argv: list[str] | None) -> int:
    with World.stated().joined() as world:
        return _train_in(world, argv)


def _train_in(world: World, argv: list[str] | None) -> int:
    tell = world.log(say)
    with world.together():
        parser = train_parser()
        args = parser.parse_args(argv)
        output: Any = None
        if args.resume:
            from cifar_fast.output import Output

            if args.output or args.overwrite:
                raise InputError("--resume stands in the place of --output, without --overwrite; give one of them")
            output = Output(args.resume, resume=True)
            parser.set_defaults(**output.checkpoint.flags(args))
            args = parser.parse_args(argv)
        recipe = recipe_of(args)
        if args.print_recipe:
            tell(recipe.to_json())
            return 0
        if args.profile:
            if world.size > 1:
                raise InputError("--profile is of one process; leave torchrun out")
            args.output = args.profile
            return _profile(args)

        from cifar_fast.augment import Seeds
        from cifar_fast.backends import keep_freed_memory
        from cifar_fast.output import Output
        from cifar_fast.plan import resolve
        from cifar_fast.runs import fit_shared, nothing_to_do
        from cifar_fast.trainer import check

        # Whatever can be refused is refused before the data, which may take long to come.
        plan = (output.checkpoint.plan if output else resolve)(
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
            tell(nothing_to_do(output))
            return 0
        if args.log == "tensorboard":
            from cifar_fast.tensorboard import TensorBoard

            output.tensorboard = TensorBoard(recipe)
    if plan.device.type == "cpu":
        keep_freed_memory()
    with interruptible() as on_step:
        try:
            dataset = world.first_before_others(
                lambda: load_dataset(args.dataset, args.data_dir, data_url=args.data_url, log=tell)
            )
            how: dict[str, Any] = dict(checkpoint_every=args.checkpoint_every, also_test=also_test, log=tell)
            how |= dict(save_logits=args.save_logits, seeds=seeds, runs=args.runs, output=output, on_step=on_step)
            result = fit_shared(world, recipe, dataset, plan, **how)
        except KeyboardInterrupt:
            if not output.resumable:
                raise
            go_on = shlex.join(["cifar-fast", "train", "--resume", str(output.path)])
            raise KeyboardInterrupt(f"interrupted; to go on: {go_on}") from None
    tell(f"written to {output.path}")
    unwritten = result.unwritten if result else ()
    for line in unwritten:
        print(f"error: {line}", file=sys.stderr)
    return 1 if unwritten else 0


def default_output(dataset: str) -> str:
    """A name for a new folder for results on the data set of that name, which may have slashes in it."""
    return time.strftime(f"runs/{dataset.replace('/', '-').replace(':', '-')}-%Y%m%d-%H%M%S")


# -- predict


def predict(argv: list[str] | None = None) -> int:
    """``cifar-fast predict``; gives 0, 1 where an image could not be decoded, 2 for bad input."""
    return run_command(lambda: _predict(predict_parser().parse_args(argv)), argv)


def predict_parser() -> argparse.ArgumentParser:
    parser = _parser("predict")
    parser.add_argument("model", metavar="MODEL", help="model.pt of a training, or the training's folder")
    parser.add_argument(
        "images",
        metavar="IMAGES",
        nargs="+",
        help="image files; folders of them, walked down; .npz files with images, uint8 [N, 32, 32, 3]. With labels, or "
        "folders named as the classes are, the last line tells the accuracy",
    )
    parser.add_argument("--top", type=int, default=1, metavar="K", help="tell the K likeliest classes (default: 1)")
    parser.add_argument("--flip-average", action="store_true", help="average the logits of each image and its mirror")
    parser.add_argument("--batch-size", type=int, default=512, metavar="N", help="images at a time (default: 512)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the predictions there too")
    add_device_flags(parser, dtype=False)
    return parser


def _predict(args: argparse.Namespace) -> int:
    check_json(args.json)
    if args.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, not {args.batch_size}")

    from cifar_fast.classifier import load_model
    from cifar_fast.plan import resolve
    from cifar_fast.predict import HOW_RESIZED, Found, accuracy, find_images, predictions, write_report
    from cifar_fast.trainer import naming_the_batch_size

    device = resolve("eager", args.device, "float32").device
    model = load_model(args.model).to(device)
    names = model.class_names
    if not 1 <= args.top <= len(names):
        raise InputError(f"--top must be from 1 to {len(names)}, the number of classes, not {args.top}")
    images = find_images(args.images, names, say)
    broken: dict[str, str] = {}

    def on_broken(image: Found, reason: str) -> None:
        broken[str(image)] = reason
        print(f"error: {reason}", file=sys.stderr)

    told = []
    size, flip = args.batch_size, args.flip_average
    with naming_the_batch_size("prediction", size):
        for one in predictions(model, images, batch_size=size, flip_average=flip, on_broken=on_broken):
            told.append(one)
            best = one.probabilities.topk(args.top)
            classes = (f"{names[i]} {100 * p:.2f} %" for p, i in zip(best.values.tolist(), best.indices.tolist()))
            say("  ".join((str(one.image), *classes)))
    if args.json:
        write_report(args.json, names, told, broken, top=args.top, flip_average=args.flip_average)
    if resized := sum(one.resized for one in told):
        say(f"resized {resized} of {len(told)} images {HOW_RESIZED}")
    if args.flip_average:
        say("--flip-average: each image was averaged with its mirror")
    if (percent := accuracy(told)) is not None:
        labelled = sum(one.image.label is not None for one in told)
        say(f"accuracy {percent:.2f} % of {labelled} images whose class is known")
    return 1 if broken else 0


# -- sweep


def sweep(argv: list[str] | None = None) -> int:
    """``cifar-fast sweep``; gives 0, 1 where a variant diverged or a file could not be written, 2 for bad input."""
    return run_command(lambda: _sweep(argv), argv)


def sweep_parser() -> argparse.ArgumentParser:
    parser = _parser("sweep")
    parser.add_argument("spec", metavar="SPEC", help="TOML file that states the variants, see docs/experiments.md")
    parser.add_argument("--dry-run", action="store_true", help="list the variants, and where each run stands, and stop")
    add_traceback_flag(parser)
    return parser


def _sweep(argv: list[str] | None) -> int:
    with World.stated().joined() as world:
        return _sweep_in(world, argv)


def _sweep_in(world: World, argv: list[str] | None) -> int:
    tell = world.log(say)
    with world.together():
        args = sweep_parser().parse_args(argv)

        from cifar_fast.backends import keep_freed_memory
        from cifar_fast.sweep import Sweep, fit_sweep, outline, plan_of

        wanted = Sweep.load(args.spec)
        if args.dry_run:
            for line in outline(wanted):
                tell(line)
            return 0
        on_cpu = plan_of(wanted).device.type == "cpu"
    if on_cpu:
        keep_freed_memory()
    with interruptible() as on_step:
        try:
            results = fit_sweep(wanted, world=world, log=tell, on_step=on_step)
        except KeyboardInterrupt:
            go_on = shlex.join(["cifar-fast", "sweep", args.spec])
            raise KeyboardInterrupt(f"interrupted; to go on: {go_on}") from None
    if world.rank:
        return 0
    unwritten = [line for result in results.values() for line in result.unwritten]
    for line in unwritten:
        print(f"error: {line}", file=sys.stderr)
    say(f"written to {wanted.output}; to see it: {shlex.join(['cifar-fast', 'report', wanted.output])}")
    return 1 if unwritten or len(results) < len(wanted.variants) else 0


# -- report


def report(argv: list[str] | None = None) -> int:
    """``cifar-fast report``."""
    return run_command(lambda: _report(report_parser().parse_args(argv)), argv)


def report_parser() -> argparse.ArgumentParser:
    parser = _parser("report")
    parser.add_argument(
        "folders", metavar="DIR", nargs="+", help="folder that train --output wrote, or sweep, for all its variants"
    )
    parser.add_argument(
        "--baseline", metavar="NAME", help="the variant that the others differ from (default: the first)"
    )
    parser.add_argument(
        "--metric",
        default="test_accuracy",
        metavar="NAME",
        help="test_accuracy, train_accuracy, train_loss, or the name of a set of --also-test",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder for report.md, report.json, report-variants.png and report-curves.png too",
    )
    add_traceback_flag(parser)
    return parser


def _report(args: argparse.Namespace) -> int:
    from cifar_fast.report import make_report, read_results, welch

    welch()
    if args.output:
        check_writable(Path(args.output).expanduser(), f"--output {args.output}")
    results, left_out = read_results(args.folders)
    for line in left_out:
        print(line, file=sys.stderr)
    found = make_report(results, baseline=args.baseline, metric=args.metric)
    if args.output:
        found.write(args.output)
    say(found.markdown().rstrip())
    return 0


# -- profile


def profile(argv: list[str] | None = None) -> int:
    """``cifar-fast profile``."""
    return run_command(lambda: _profile(profile_parser().parse_args(argv)), argv)


def profile_parser() -> argparse.ArgumentParser:
    parser = _parser("profile")
    add_run_flags(parser)
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for trace.json and profile.json")
    return parser


def _profile(args: argparse.Namespace) -> int:
    from cifar_fast.augment import Seeds, draw_epoch
    from cifar_fast.backends import device_guard, keep_freed_memory
    from cifar_fast.isolation import isolated
    from cifar_fast.model import CNN
    from cifar_fast.plan import resolve, set_up
    from cifar_fast.profile import profile
    from cifar_fast.trainer import check

    recipe = recipe_of(args)
    plan = resolve(args.backend, args.device, args.dtype, args.memory_format)
    apart = [getattr(args, name, None) for name in ("init_seed", "order_seed", "augment_seed")]  # train's alone
    seeds, _ = check(plan, Seeds(args.seed, *apart))
    check_writable(Path(args.output).expanduser(), f"--output {args.output}")
    if plan.device.type == "cpu":
        keep_freed_memory()
    dataset = load_dataset(args.dataset, args.data_dir, data_url=args.data_url, log=say).for_recipe(recipe)
    dataset.steps_per_epoch(recipe.batch_size)
    weights, order, augmentation = seeds.of_run(0).generators(plan.device)
    with device_guard(plan.device), isolated(plan.device):
        backend, _ = set_up(plan, recipe, dataset, say)
        backend.reset(CNN(recipe, dataset.num_classes, weights))
        n, drawn = len(dataset.train_images), dict(generator=augmentation, order=order)
        draws = draw_epoch(n, device=plan.device, recipe=recipe, **drawn)
        profile(backend, draws, args.output, log=say)
    say(f"written to {args.output}: trace.json for ui.perfetto.dev, and profile.json")
    return 0


# -- compare


def compare(argv: list[str] | None = None) -> int:
    """``cifar-fast compare``, and ``python -m cifar_fast.compare``; gives 0, 1 past the tolerance, 2 for bad input."""
    return run_command(lambda: _compare(compare_parser().parse_args(argv)), argv)


def compare_parser() -> argparse.ArgumentParser:
    parser = _parser("compare")
    add_run_flags(parser)
    parser.set_defaults(backend="fused")
    group = parser.add_argument_group("the comparison")
    group.add_argument(
        "--against", choices=("eager", "compiled", "fused"), default="eager", help="the other backend (default: eager)"
    )
    group.add_argument("--steps", type=int, default=4, metavar="K", help="steps of training (default: 4)")
    group.add_argument("--drift", action="store_true", help="let the sides go their own ways after the first step")
    group.add_argument(
        "--tolerance", type=float, default=3.0, metavar="X", help="allowed times eager's own difference (default: 3)"
    )
    group.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    return parser


def _compare(args: argparse.Namespace) -> int:
    recipe = recipe_of(args)
    if args.steps < 1:
        raise InputError(f"--steps must be at least 1, not {args.steps}")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed must lie between 0 and 2^63, not {args.seed}")
    if not args.tolerance > 0:
        raise InputError(f"--tolerance must be above 0, not {args.tolerance:g}")
    check_json(args.json)

    _interpret_without_a_gpu(args.device)

    from cifar_fast.compare import Comparison, compare, write_report
    from cifar_fast.plan import resolve

    first, second = (
        resolve(backend, args.device, args.dtype, args.memory_format) for backend in (args.backend, args.against)
    )
    dataset = load_dataset(args.dataset, args.data_dir, data_url=args.data_url, log=say)
    comparison = Comparison(first, second, tolerance=args.tolerance)
    say(comparison.heading())
    if first.device.type == "cpu" and "fused" in (*first.backends, *second.backends):
        say("no GPU: the kernels run in Triton's interpreter, slowly; narrow --widths and a small --batch-size help")
    for step in compare(recipe, dataset, first, second, seed=args.seed, steps=args.steps, drift=args.drift, log=say):
        say(comparison.add(step))
    if args.json:
        write_report(args.json, comparison, recipe, dataset, seed=args.seed, drift=args.drift)
    say(comparison.verdict())
    return 0 if comparison.within else 1


def _interpret_without_a_gpu(device: str) -> None:
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


# -- check


def check(argv: list[str] | None = None) -> int:
    """``cifar-fast check``; gives 0, 1 where something that ``auto`` needs does not work, 2 for bad input."""
    return run_command(lambda: _check(check_parser().parse_args(argv)), argv)


def check_parser() -> argparse.ArgumentParser:
    parser = _parser("check")
    add_device_flags(parser)
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="images per step (default: 64 on a GPU, 8 on a CPU)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the lines there")
    return parser


def _check(args: argparse.Namespace) -> int:
    check_json(args.json)

    _interpret_without_a_gpu(args.device)

    from cifar_fast.augment import Seeds
    from cifar_fast.backends import keep_freed_memory
    from cifar_fast.check import BATCH_SIZE, SMALLEST, Check
    from cifar_fast.plan import resolve
    from cifar_fast.trainer import check

    plan, reference = (resolve(backend, args.device, args.dtype) for backend in ("auto", "eager"))
    check(plan, Seeds())
    size = BATCH_SIZE[plan.device.type] if args.batch_size is None else args.batch_size
    if size < SMALLEST:
        raise InputError(f"--batch-size must be at least {SMALLEST} for a check, not {size}")
    if plan.device.type == "cpu":
        keep_freed_memory()
    recipe = Recipe(batch_size=size)
    if plan.device.type == "cpu":  # where no kernel is compiled for these widths
        recipe = dataclasses.replace(recipe, widths=tuple(width // 4 for width in recipe.widths))
    found = Check(plan, reference, recipe, say)
    found.run()
    if args.json:
        found.write(args.json)
    return 0 if found.fine else 1


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (train, "train the recipe, and write down what came of it"),
    "predict": (predict, "tell what a trained network takes images for: a line each, class and probability"),
    "sweep": (sweep, "train several variants of the recipe in turn, as a file states them, or go on with them"),
    "report": (report, "set trainings beside each other: means, intervals, differences"),
    "compare": (compare, "run two backends in lockstep, and tell how far apart each layer is"),
    "profile": (profile, "train a few steps, and write a trace and a table of where their time goes"),
    "check": (check, "tell whether all that training needs works on this machine, in two minutes"),
}
"""Each command and what it does, in the order of --help."""


if __name__ == "__main__":
    sys.exit(main())
