"""What is measured, and what is computed and counted beside it:

python -m benchmarks run | report | tune | compile | instructions | floors | launches
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
import triton

from benchmarks.compile import TARGETS, compile_all
from benchmarks.compile import table as compile_table
from benchmarks.floors import floor_rows
from benchmarks.floors import table as floor_table
from benchmarks.instructions import CARDS, count_all, record
from benchmarks.instructions import table as instructions_table
from benchmarks.launches import listing, logged, profiled
from benchmarks.parts import PARTS, Bench
from benchmarks.report import RESULTS, pivot, write_report
from benchmarks.run import run
from benchmarks.tune import predicting, tune
from cifar_fast import InputError, Recipe, load_dataset
from cifar_fast.backends.select import resolve_backend
from cifar_fast.cli.flags import Parser, add_data_flags, run_command
from cifar_fast.diagnostics.kernel_cases import IMAGES
from cifar_fast.diagnostics.roofline import copy_bandwidth, matmul_flops, passes
from cifar_fast.kernels.launch import interpreted
from cifar_fast.recipe import DTYPES
from cifar_fast.utils.device import short_name, tune_malloc
from cifar_fast.utils.files import atomic_write, os_error_as_input_error


def main(argv: list[str] | None = None) -> int:
    """Run a command with ``argv`` (default: the process's own); gives 0, 1 where something failed, 2 for bad input."""
    what = "interrupted; start again with the same --output to go on"
    return run_command(lambda: _command(_parser().parse_args(argv)), argv, what)


def rate(text: str) -> float:
    """A flag's bytes/s or FLOP/s."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    run = commands.add_parser("run", help="measure everything side by side, resumable")
    add_data_flags(run)
    run.set_defaults(dataset=None)  # cifar10 where it is said where that is, else synthetic
    run.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the results")
    run.add_argument("--minutes", type=rate, default=9, metavar="M", help="begin no part after so many (default: 9)")
    run.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"only these, of {', '.join(PARTS)}")
    run.add_argument("--reference-script", type=Path, metavar="PATH", help="the reference's script, to time as it is")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    for flag, nargs in (("--batch-size", None), ("--widths", "+")):
        run.add_argument(flag, type=int, nargs=nargs, metavar="N", help="of the recipe (default: the reference's)")

    commands.add_parser("report", help="make results.md and pictures of every results.json again")

    tune = commands.add_parser("tune", help="choose the launch parameters of kernels/launch.json on this GPU")
    tune.add_argument("--dtype", default="float16", choices=DTYPES)
    tune.add_argument(
        "--predict", choices=CARDS, metavar="ARCH", help=f"for a card that need not be here: {', '.join(CARDS)}"
    )
    tune.add_argument("--write", action="store_true", help="write the best entries to kernels/launch.json")

    compile_ = commands.add_parser("compile", help="compile every kernel for GPUs that need not be here")
    compile_.add_argument("--dtype", default="float16", choices=DTYPES)
    compile_.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS, help="(default: all)")

    instructions = commands.add_parser("instructions", help="count what each kernel issues, in its compiled code")
    instructions.add_argument("--dtype", default="float16", choices=DTYPES)
    instructions.add_argument("--arch", default="sm_90", choices=TARGETS, help="compile for it (default: sm_90)")
    instructions.add_argument("--batch-size", type=int, default=Recipe().batch_size, metavar="N", help="default: 512")
    instructions.add_argument(
        "--card", dest="name", metavar="NAME", help="whose figures follow (default: A100, H200 or B200, by --arch)"
    )
    instructions.add_argument("--multiprocessors", type=int, metavar="N")
    instructions.add_argument("--clock", type=rate, metavar="X", help="Hz")
    instructions.add_argument("--bandwidth", type=rate, metavar="X", help="bytes/s, reads and writes both counted")
    instructions.add_argument("--cache", type=rate, metavar="X", help="bytes, of the second level")
    instructions.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")

    floors = commands.add_parser("floors", help="what a step computes and moves, and the time that takes at the least")
    floors.add_argument("--device", default="auto", help="where ceilings that are not given are measured")
    floors.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    floors.add_argument("--bandwidth", type=rate, metavar="X", help="bytes/s of a copy, reads and writes both counted")
    floors.add_argument("--flops", type=rate, metavar="Y", help="FLOP/s of a matrix product in the dtype")

    launches = commands.add_parser("launches", help="list the launches of a captured step and of an evaluation")
    what = "of a training by the fused backend on a stand-in for a GPU (default: profile this GPU)"
    launches.add_argument("log", nargs="?", type=Path, metavar="LOG", help=what)
    for one in commands.choices.values():
        one.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser


def _command(args: argparse.Namespace) -> int:
    measured = {"run": _run, "report": _report, "tune": _tune}
    computed = {"compile": _compile, "instructions": _instructions, "floors": _floors, "launches": _launches}
    return (measured | computed)[args.command](args)


def _run(args: argparse.Namespace) -> int:
    begun = time.perf_counter()
    if args.reference_script and not args.reference_script.is_file():
        raise InputError(f"--reference-script {args.reference_script}: no such file")
    plan = resolve_backend("auto", args.device)
    if plan.device.type == "cpu":
        tune_malloc()
    changes = {name: getattr(args, name) for name in ("batch_size", "widths") if getattr(args, name)}
    recipe = dataclasses.replace(Recipe(), **changes)
    name = args.dataset or ("cifar10" if args.data_dir or args.data_url else "synthetic")
    dataset = load_dataset(name, args.data_dir, data_url=args.data_url)
    dataset.check_trainable(recipe.batch_size)
    with os_error_as_input_error(f"--output {args.output}"):
        args.output.mkdir(parents=True, exist_ok=True)
    settings = dict(recipe=dataclasses.asdict(recipe), dtype=short_name(plan.dtype), dataset=dataset.metadata())
    real, deadline = name != "synthetic", begun + 60 * args.minutes
    bench = Bench(recipe, dataset, real, plan, deadline, args.reference_script, [])
    return run(args.output, bench, settings, args.only or list(PARTS))


def _report(args: argparse.Namespace) -> int:
    for file in sorted(RESULTS.glob("*/results.json")):
        write_report(file.parent)
        print(f"written to {file.parent}")
    return 0


def _compiling() -> None:
    if interpreted():
        raise InputError("TRITON_INTERPRET is set, under which nothing is compiled; unset it")


def _tune(args: argparse.Namespace) -> int:
    if not (args.predict or torch.cuda.is_available()):
        raise InputError("tuning needs a CUDA GPU; --predict goes by the compiled code instead")
    _compiling()
    how = {"time_case": predicting(args.predict)} if args.predict else {}
    tune(getattr(torch, args.dtype), args.write, **how)
    return 0


def _compile(args: argparse.Namespace) -> int:
    _compiling()
    rows = compile_all(Recipe(), getattr(torch, args.dtype), args.targets)
    print(f"triton {triton.__version__}, {args.dtype}, batch {Recipe().batch_size}\n\n{compile_table(rows)}\n")
    wrong = [problem for row in rows for problem in row.problems()]
    print("\n".join(wrong) or "no spills, and 128 bits wherever a large tensor is read or written")
    return 1 if wrong else 0


def _instructions(args: argparse.Namespace) -> int:
    _compiling()
    given = {name: getattr(args, name) for name in ("name", "multiprocessors", "clock", "bandwidth", "cache")}
    card = dataclasses.replace(
        CARDS.get(args.arch, CARDS["sm_90"]), **{name: value for name, value in given.items() if value}
    )
    rows = count_all(Recipe(batch_size=args.batch_size), getattr(torch, args.dtype), args.arch)
    print("predicted: counted in compiled code, no GPU ran")
    print(f"triton {triton.__version__}, {args.arch}, {args.dtype}, batch {args.batch_size}; {card}")
    print(f"thread instructions per element, by class; us of one launch\n\n{instructions_table(rows, card)}")
    if args.json:
        with (
            os_error_as_input_error(f"--json {args.json}", "choose another file"),
            atomic_write(args.json) as temporary,
        ):
            temporary.write_text(json.dumps([record(row, card) for row in rows], indent=1) + "\n")
    return 0


def _floors(args: argparse.Namespace) -> int:
    dtype = getattr(torch, "float16" if args.dtype == "auto" else args.dtype)
    if not (args.bandwidth and args.flops):
        plan = resolve_backend("auto", args.device, args.dtype)
        dtype = plan.dtype
    bandwidth = args.bandwidth or statistics.median(copy_bandwidth(plan.device))
    flops = args.flops or statistics.median(matmul_flops(plan.device, dtype))
    recipe = Recipe()
    some, steps = passes(recipe, 10, dtype), recipe.epochs * (IMAGES // recipe.batch_size)
    print(f"{bandwidth / 1e9:,.1f} GB/s, {flops / 1e9:,.1f} GFLOP/s, {short_name(dtype)}, batch {recipe.batch_size}:")
    print("floors, which are computed; nothing of the recipe is timed\n")
    print(floor_table(some, bandwidth, flops), pivot(floor_rows(some, steps, bandwidth, flops)), sep="\n\n")
    return 0


def _launches(args: argparse.Namespace) -> int:
    print(listing(logged(args.log) if args.log else profiled()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
