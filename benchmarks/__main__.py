"""Measure, predict and count: python -m benchmarks run | report | tune | compile | instructions | inductor | floors
| launches | growth
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from benchmarks import compile as compiling
from benchmarks import growth, instructions, launches
from benchmarks.parts import PARTS, Bench
from benchmarks.report import RESULTS, pivot, write_report
from benchmarks.rows import floor_rows, floor_table
from benchmarks.run import run
from benchmarks.tune import predicting, time_case, tune
from cifar_fast import InputError, Recipe, load_dataset
from cifar_fast.backends.select import resolve_backend
from cifar_fast.cli.flags import Parser, add_data_flags, add_traceback_flag, run_command
from cifar_fast.diagnostics.kernel_cases import IMAGES
from cifar_fast.diagnostics.roofline import copy_bandwidth, layer_costs, matmul_flops
from cifar_fast.kernels.batch_norm_act import ACTIVATIONS
from cifar_fast.kernels.launch import interpreted
from cifar_fast.recipe import DTYPES
from cifar_fast.utils.device import short_name, tune_malloc
from cifar_fast.utils.files import os_error_as_input_error, write_json


def main(argv: list[str] | None = None) -> int:
    """Run a command; return 0, 1 if a part failed or a result is wrong, 2 for bad input."""

    def command() -> int:
        args = _parser().parse_args(argv)
        return args.run(args)

    return run_command(command, argv, "interrupted; run the same command again to resume")


def rate(text: str) -> float:
    """Parse a positive number, such as bytes/s or FLOP/s."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    def add(function: Callable[[argparse.Namespace], int], what: str, dtype: bool = False) -> argparse.ArgumentParser:
        command = commands.add_parser(function.__name__.strip("_"), help=what)
        command.set_defaults(run=function)
        add_traceback_flag(command)
        if dtype:
            command.add_argument("--dtype", default="float16", choices=DTYPES)
        return command

    run = add(_run, "measure everything side by side; can resume")
    add_data_flags(run)
    run.set_defaults(dataset=None)  # cifar10 if the flags say where it is, else synthetic
    run.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the results")
    run.add_argument("--minutes", type=rate, default=9, metavar="M", help="start no part after M minutes (default: 9)")
    run.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"only these of {', '.join(PARTS)}")
    run.add_argument("--reference-script", type=Path, metavar="PATH", help="the reference's script, to time it too")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    for flag, nargs in (("--batch-size", None), ("--widths", "+")):
        what = f"{flag[2:].replace('-', ' ')} of the recipe (default: the reference's)"
        run.add_argument(flag, type=int, nargs=nargs, metavar="N", help=what)

    add(_report, "make results.md and pictures from every results.json again")

    tune = add(_tune, "choose the launch parameters in kernels/launch.json on this GPU", dtype=True)
    tune.add_argument(
        "--predict", choices=instructions.CARDS, metavar="ARCH", help="predict for a GPU that need not be here"
    )
    tune.add_argument("--write", action="store_true", help="write the best entries to kernels/launch.json")

    compile_ = add(_compile, "compile every kernel for GPUs that need not be here", dtype=True)
    targets = compiling.TARGETS
    compile_.add_argument("--targets", nargs="+", choices=targets, default=targets, help="(default: all)")

    count = add(_instructions, "count what each kernel issues in its compiled code", dtype=True)
    what = "in the norms; several are compared with the first (default: celu)"
    count.add_argument("--activation", nargs="+", choices=ACTIVATIONS, default=["celu"], metavar="NAME", help=what)
    count.add_argument("--arch", default="sm_90", choices=targets, help="target to compile for (default: sm_90)")
    count.add_argument("--batch-size", type=int, default=Recipe().batch_size, metavar="N", help="default: 512")
    count.add_argument("--card", dest="name", metavar="NAME", help="name of the card (default: that of --arch)")
    count.add_argument("--multiprocessors", type=int, metavar="N", help="of the card")
    count.add_argument("--clock", type=rate, metavar="X", help="of the card, in Hz")
    count.add_argument("--bandwidth", type=rate, metavar="X", help="of the card, in bytes/s, reads and writes together")
    count.add_argument("--cache", type=rate, metavar="X", help="bytes of its second-level cache")
    count.add_argument("--json", type=Path, metavar="FILE", help="also write every figure to this file")

    add(_inductor, "predict the time of torch.compile's norm kernels and of ours; needs a GPU")

    floors = add(_floors, "compute the cost of a step and its minimum time")
    floors.add_argument("--device", default="auto", help="where to measure rates that are not given")
    floors.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    floors.add_argument("--bandwidth", type=rate, metavar="X", help="bytes/s of a copy, reads and writes together")
    floors.add_argument("--flops", type=rate, metavar="Y", help="FLOP/s of a matrix product in the dtype")

    many = add(_growth, "measure whether the cost of a run, a row or a result depends on how many came before")
    many.add_argument("--share", type=rate, default=1.0, metavar="X", help="share of the repetitions (default: 1)")

    logs = add(_launches, "list the launches of a captured step and of an evaluation")
    what = "log that a GPU simulator wrote during a training with the fused backend (default: profile this GPU)"
    logs.add_argument("log", nargs="?", type=Path, metavar="LOG", help=what)
    return parser


def _run(args: argparse.Namespace) -> int:
    begun = time.perf_counter()
    if args.reference_script and not args.reference_script.is_file():
        raise InputError(f"--reference-script {args.reference_script}: no such file")
    config = resolve_backend("auto", args.device)
    if config.device.type == "cpu":
        tune_malloc()
    changes = {name: getattr(args, name) for name in ("batch_size", "widths") if getattr(args, name)}
    recipe = dataclasses.replace(Recipe(), **changes)
    name = args.dataset or ("cifar10" if args.data_dir or args.data_url else "synthetic")
    dataset = load_dataset(name, args.data_dir, data_url=args.data_url)
    dataset.check_trainable(recipe.batch_size)
    with os_error_as_input_error(f"--output {args.output}"):
        args.output.mkdir(parents=True, exist_ok=True)
    settings = dict(recipe=dataclasses.asdict(recipe), dtype=short_name(config.dtype), dataset=dataset.metadata())
    real, deadline = name != "synthetic", begun + 60 * args.minutes
    bench = Bench(recipe, dataset, real, config, deadline, args.reference_script, [])
    return run(args.output, bench, settings, args.only or list(PARTS))


def _report(args: argparse.Namespace) -> int:
    for file in sorted(RESULTS.glob("*/results.json")):
        write_report(file.parent)
        print(f"written to {file.parent}")
    return 0


def _require_compiler() -> None:
    if interpreted():
        raise InputError("TRITON_INTERPRET is set, so nothing is compiled; unset it")


def _tune(args: argparse.Namespace) -> int:
    if not (args.predict or torch.cuda.is_available()):
        raise InputError("tuning needs a CUDA GPU; --predict uses the compiled code instead")
    _require_compiler()
    tune(getattr(torch, args.dtype), args.write, predicting(args.predict) if args.predict else time_case)
    return 0


def _compile(args: argparse.Namespace) -> int:
    _require_compiler()
    rows = compiling.compile_all(Recipe(), getattr(torch, args.dtype), args.targets)
    print(f"triton {triton.__version__}, {args.dtype}, batch {Recipe().batch_size}\n\n{compiling.table(rows)}\n")
    wrong = [problem for row in rows for problem in row.problems()]
    print("\n".join(wrong) or "no spills, and 128 bits wherever a large tensor is read or written")
    return 1 if wrong else 0


def _instructions(args: argparse.Namespace) -> int:
    _require_compiler()
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(instructions.Card)}
    card = instructions.CARDS.get(args.arch, instructions.CARDS["sm_90"])
    card = dataclasses.replace(card, **{name: value for name, value in given.items() if value})
    recipe, dtype = Recipe(batch_size=args.batch_size), getattr(torch, args.dtype)
    counts = {name: instructions.count_all(recipe, dtype, args.arch, name) for name in args.activation}
    print("predicted: counted in compiled code, no GPU ran")
    print(f"triton {triton.__version__}, {args.arch}, {args.dtype}, batch {args.batch_size}; {card}")
    if len(counts) > 1:
        print(f"thread instructions per element, as multiples of {args.activation[0]} in parentheses\n")
        print(instructions.comparison(counts))
    else:
        table = instructions.table(counts[args.activation[0]], card)
        print(f"thread instructions per element, by class; us of one launch\n\n{table}")
    if args.json:
        rows = [{"activation": name} | instructions.record(row, card) for name, rows in counts.items() for row in rows]
        write_json(args.json, rows, f"--json {args.json}")
    return 0


def _inductor(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise InputError("torch.compile needs a CUDA GPU to compile these kernels")
    _require_compiler()
    from benchmarks import inductor  # it loads torch's compiler

    print(inductor.report())
    return 0


def _floors(args: argparse.Namespace) -> int:
    dtype = getattr(torch, "float16" if args.dtype == "auto" else args.dtype)
    if not (args.bandwidth and args.flops):
        config = resolve_backend("auto", args.device, args.dtype)
        dtype = config.dtype
    bandwidth = args.bandwidth or statistics.median(copy_bandwidth(config.device))
    flops = args.flops or statistics.median(matmul_flops(config.device, dtype))
    recipe = Recipe()
    costs, steps = layer_costs(recipe, 10, dtype), recipe.epochs * (IMAGES // recipe.batch_size)
    print(f"{bandwidth / 1e9:,.1f} GB/s, {flops / 1e9:,.1f} GFLOP/s, {short_name(dtype)}, batch {recipe.batch_size}:")
    print("floors, which are computed; nothing of the recipe is timed\n")
    print(floor_table(costs, bandwidth, flops), pivot(floor_rows(costs, steps, bandwidth, flops)), sep="\n\n")
    return 0


def _growth(args: argparse.Namespace) -> int:
    print(growth.table(args.share))
    return 0


def _launches(args: argparse.Namespace) -> int:
    print(launches.listing(launches.logged(args.log) if args.log else launches.profiled()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
