"""``python -m benchmarks.suite --output DIR``: everything measured side by side, the most valuable first, in so many minutes.

    python -m benchmarks.suite --output DIR [--data-dir PATH] [--minutes 9] [--only PART ...] [--reference-script PATH] [--device cpu]

Each part below writes what it found to ``results.json`` (its schema: ``benchmarks/results/README.md``), from which
``results.md`` and the pictures are made, before the next begins. A suite that was interrupted, or that ran out of its
minutes, goes on where it was when it is started again with the same ``--output``. A part that cannot run here says why.
Where parity fails nothing more is measured, and the exit code is 1: no speed is told of a wrong result.

Whatever is compared takes turns within one run, and one of the sides runs twice a turn: the ratio of the two is the noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import roofline
from benchmarks.report import write_report
from cifar_fast import CNN, Dataset, InputError, Recipe, draw_epoch, load_dataset
from cifar_fast.backends import Compiled, Eager, keep_freed_memory, on
from cifar_fast.choose import Choice, choose, fused_trouble
from cifar_fast.files import replacing
from cifar_fast.flags import Parser, run_command
from cifar_fast.profile import profile
from cifar_fast.progress import silent
from cifar_fast.recipe import IMAGE_SIZE
from cifar_fast.results import confidence_interval_95, environment
from cifar_fast.trainer import set_up, synchronised_clock, train_once

SCHEMA = 1
BATCH_SIZES = {"cuda": (128, 256, 512, 1024, 2048, 4096), "cpu": (128, 256, 512, 1024)}
WIDTHS = (0.5, 1, 2)
EPOCHS = (6, 12, 24)


class Skip(Exception):
    """Why a part does not run here."""


@dataclasses.dataclass
class Suite:
    """What the parts share. ``done``: results of earlier parts under their names."""

    recipe: Recipe
    dataset: Dataset
    real: bool
    choice: Choice
    deadline: float
    reference_script: Path | None
    done: dict[str, Any]

    @property
    def device(self) -> torch.device:
        return self.choice.device

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds until the suite should end."""
        return self.deadline - time.perf_counter()

    @functools.cached_property
    def backends(self) -> dict[str, Eager]:
        """The backends that are worth timing here, set up."""
        kinds: tuple[type[Eager], ...] = (Eager,)
        if self.cuda:
            from cifar_fast.fused import Fused

            kinds = (Eager, Compiled) if fused_trouble(self.device) else (Eager, Compiled, Fused)
        return {kind.name: self.set_up(kind, self.recipe) for kind in kinds}

    def set_up(self, kind: type[Eager], recipe: Recipe) -> Eager:
        torch.manual_seed(0)
        memory_format = torch.contiguous_format if kind is Eager else torch.channels_last
        choice = dataclasses.replace(self.choice, backends=(kind,), memory_format=memory_format)
        return set_up(choice, recipe, self.dataset, silent)

    @property
    def fastest(self) -> type[Eager]:
        return type(list(self.backends.values())[-1])


def summary(values: list[float]) -> dict[str, Any]:
    """Median, mean, least, most, standard deviation and number of ``values``, and the values."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    known = dict(median=statistics.median(values), mean=statistics.fmean(values), min=min(values), max=max(values))
    return known | dict(std=deviation, n=len(values), values=values)


def ceilings(suite: Suite) -> dict[str, Any]:
    """The device's copy bandwidth and matrix rate, and the floors of a step and a run that follow from them."""
    limits = roofline.ceilings(suite.device, suite.choice.dtype)
    passes = roofline.layers(suite.recipe, suite.dataset.num_classes, suite.choice.dtype)
    steps = roofline.steps(suite.recipe, len(suite.dataset.train_images))
    floor, run = roofline.floors(passes, limits), roofline.floors(passes, limits, steps)
    return dataclasses.asdict(limits) | dict(
        step_flop=sum(row.flop for row in passes),
        step_bytes=sum(row.bytes for row in passes),
        step_floor=floor.arithmetic,
        step_floor_no_overlap=floor.no_overlap,
        run_floor=run.arithmetic,
        run_floor_no_overlap=run.no_overlap,
        steps=steps,
    )


def parity(suite: Suite) -> dict[str, Any]:
    """``cifar_fast.compare`` of fused against eager: at full width on a GPU, narrow and interpreted without one."""
    flags = "--device cuda --dtype float16 --steps 3 --batch-size 512"
    if not suite.cuda:
        flags = "--device cpu --dtype float32 --steps 2 --batch-size 4 --widths 4 8 8 8 16 32 32 32"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "compare.json")
        command = [sys.executable, "-m", "cifar_fast.compare", "--dataset", "synthetic", *flags.split(), "--json", str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        if not file.exists():
            raise RuntimeError(f"the comparison failed: {done.stderr.strip().splitlines()[-1:]}")
        report = json.loads(file.read_text())
    ratios = [row["ratio"] for row in report["rows"]]
    return dict(flags=flags, within=report["within"], tolerance=report["tolerance"], median_ratio=statistics.median(ratios), n=len(ratios))


def kernels(suite: Suite) -> dict[str, Any]:
    """Each kernel at each shape of the recipe beside eager torch and torch.compile."""
    if not suite.cuda:
        raise Skip("the kernels need a CUDA GPU")
    from benchmarks.kernels import Wrong, cases, measure

    before = suite.done.get("kernels", dict(rows=[], wrong=[]))
    rows, wrong = list(before["rows"]), list(before["wrong"])
    measured = {(row["case"], row["implementation"]) for row in rows + wrong}
    stop = suite.left() / 2  # the parts after this one are worth as much; what is left here comes when the suite goes on
    for implementation in ("fused", "compiled", "eager"):
        for case in cases(suite.recipe, suite.choice.dtype):
            name = f"{case.name}, {case.direction}"
            if (name, implementation) in measured:
                continue
            if suite.left() < stop:
                return dict(rows=rows, wrong=wrong, cut_short=True)
            try:
                rows.append(measure(case, implementation, suite.done["ceilings"]["bandwidth"]))
            except Wrong as error:  # no figure of it is told
                wrong.append(dict(case=name, implementation=implementation, why=str(error)))
    return dict(rows=rows, wrong=wrong, cut_short=False)


def steps(suite: Suite) -> dict[str, Any]:
    """A training step of each backend, in turn; and where its time goes."""
    last = list(suite.backends)[-1]
    found = time_steps(suite, suite.backends | {f"{last}, again": suite.backends[last]}, rounds=10 if suite.cuda else 3)
    limits = suite.done["ceilings"]
    for name, row in found.items():
        row["flops"] = limits["step_flop"] / row["median"]
        row["share_of_floor"] = limits["step_floor"] / row["median"]
        row["share_of_floor_no_overlap"] = limits["step_floor_no_overlap"] / row["median"]
        if not name.endswith("again"):
            with tempfile.TemporaryDirectory() as folder:
                draws = draw_epoch(len(suite.dataset.train_images), device=suite.device, recipe=suite.recipe)
                table = profile(suite.backends[name], draws, folder, steps=10 if suite.cuda else 2, log=silent)
            row["profile"] = [dataclasses.asdict(line) for line in table.rows]
            row["profiled_step_ms"] = table.step_milliseconds
    return found


def time_steps(suite: Suite, sides: dict[str, Eager], rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds a step, sides in turn: a whole epoch a turn on a GPU, three steps without one."""
    clock = synchronised_clock(suite.device)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-1, rounds):  # the first does not count
        for name, backend in sides.items():
            size = backend.recipe.batch_size
            draws = draw_epoch(len(suite.dataset.train_images), device=suite.device, recipe=backend.recipe)
            if not suite.cuda:
                draws = draws.slice(0, 3 * size)
            start = clock()
            losses = [loss for loss, _ in backend.train_epoch(0, draws)]
            seconds = (clock() - start) / len(losses)
            if not torch.stack(losses).isfinite().all():
                raise RuntimeError(f"a loss of the {name} backend is not finite: no figure is given")
            if turn >= 0:
                times[name].append(seconds)
        if turn >= 2 and suite.left() < 0:
            break
    return {name: summary(values) for name, values in times.items()}


def trainings(suite: Suite) -> dict[str, Any]:
    """Whole trainings in turn: seconds of training and test accuracy; the reference's script as a black box, by its own clock."""
    if not suite.cuda:
        raise Skip("a whole training takes an hour without a GPU")
    if not suite.real:
        raise Skip("give --data-dir: accuracies are of real pictures")
    seconds: dict[str, list[float]] = {}
    accuracies: dict[str, list[float]] = {}
    n, clock = len(suite.dataset.train_images), synchronised_clock(suite.device)
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(10):
            start = time.perf_counter()
            for name, backend in suite.backends.items():
                torch.manual_seed(turn)
                backend.prepare(CNN(suite.recipe, suite.dataset.num_classes))
                rows: list[Any] = []
                taken, _ = train_once(backend, n, turn, clock, rows.append, silent)
                seconds.setdefault(name, []).append(taken)
                accuracies.setdefault(name, []).append(rows[-1].test_accuracy)
            if suite.reference_script and turn < 3:
                row = _reference_run(suite, Path(folder), turn)
                seconds.setdefault("the reference's script", []).append(row["train_seconds"])
                accuracies.setdefault("the reference's script", []).append(row["test_accuracy"])
            if suite.left() < time.perf_counter() - start:
                break
    return {
        name: dict(seconds=summary(seconds[name]), accuracy=summary(values) | dict(ci95=confidence_interval_95(values)))
        for name, values in accuracies.items()
    }


def _reference_run(suite: Suite, folder: Path, seed: int) -> dict[str, float]:
    """The last row that the reference's script writes, which says what its clock and its test set said."""
    npz, metrics = _npz(suite.dataset, folder), folder / "metrics.jsonl"
    flags = f"--data {npz} --device {suite.device} --dtype float16 --seed {seed} --epochs {suite.recipe.epochs} --metrics {metrics}"
    subprocess.run([sys.executable, str(suite.reference_script), *flags.split()], check=True, capture_output=True)
    return json.loads(metrics.read_text().splitlines()[-1])


def _npz(dataset: Dataset, folder: Path) -> Path:
    path = folder / "pictures.npz"
    if not path.exists():
        names = ("train_images", "train_labels", "test_images", "test_labels")
        np.savez(path, **{name: getattr(dataset, name) for name in names})
    return path


def on_a_cpu(suite: Suite) -> dict[str, Any]:
    """``benchmarks.cpu``: a step and an epoch's augmentation beside the reference's own settings, and its script, in turn."""
    if suite.cuda:
        raise Skip("a GPU is here; give --device cpu for the CPU's figures")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "cpu.json")
        script = ["--reference-script", str(suite.reference_script)] if suite.reference_script else []
        rounds = "3" if suite.left() > 300 else "2"
        subprocess.run(
            [sys.executable, "-m", "benchmarks.cpu", "--rounds", rounds, *script, "--json", str(file)], check=True, capture_output=True
        )
        found = json.loads(file.read_text())
    return dict(seconds=found["seconds"], matrix_flops=found["matrix_flops"], batch_size=found["recipe"]["batch_size"])


def convolutions(suite: Suite) -> dict[str, Any]:
    """Each convolution of the recipe alone: forward, data gradient, weight gradient; the first with 3, 4 and 8 channels of input."""
    recipe, dtype, rows = suite.recipe, suite.choice.dtype, []
    size, batch = IMAGE_SIZE, recipe.batch_size
    clock = synchronised_clock(suite.device)
    settings = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, not transposed, no output padding, one group
    for i, (c_in, c_out, pool) in enumerate(zip((3, *recipe.widths), recipe.widths, recipe.pools)):
        for channels in (3, 4, 8) if i == 0 else (c_in,):
            how = dict(device=suite.device, dtype=dtype)
            x, dy = (torch.randn(batch, c, size, size, **how).contiguous(memory_format=torch.channels_last) for c in (channels, c_out))
            weight = torch.randn(c_out, channels, 3, 3, **how).contiguous(memory_format=torch.channels_last)
            calls = {"forward": lambda x=x, weight=weight: torch.ops.aten.convolution(x, weight, None, *settings)}
            for name, mask in (("data gradient", [True, False, False]), ("weight gradient", [False, True, False])):
                calls[name] = lambda dy=dy, x=x, w=weight, mask=mask: torch.ops.aten.convolution_backward(dy, x, w, None, *settings, mask)
            if i == 0:
                del calls["data gradient"]  # a training needs none
            flop = 18 * channels * c_out * size**2 * batch
            for name, call in calls.items():
                seconds = _time_call(call, clock, suite.cuda)
                rows.append(
                    dict(
                        layer=i + 1, channels=[channels, c_out], size=size, name=name, flop=flop, flops=flop / seconds["median"], **seconds
                    )
                )
        size //= 1 + pool
    return dict(rows=rows)


def _time_call(call: Callable[[], object], clock: Callable[[], float], cuda: bool) -> dict[str, Any]:
    """Seconds of one call: of many in a row on a GPU, so that the device, not the host, is timed."""
    repeats = 20 if cuda else 1
    times = []
    with convolution_choice(cuda):
        for turn in range(-2, 7 if cuda else 3):
            start = clock()
            for _ in range(repeats):
                call()
            if turn >= 0:
                times.append((clock() - start) / repeats)
    return summary(times)


def convolution_choice(cuda: bool) -> Any:
    """As the fused backend has cuDNN choose; nothing to choose on a CPU."""
    if cuda:
        from cifar_fast.fused import fastest_deterministic_convolutions

        return fastest_deterministic_convolutions()
    return on(torch.device("cpu"))


def memory(suite: Suite) -> dict[str, Any]:
    """The most memory that torch reserved on the device for an epoch and an evaluation, set-up included."""
    if not suite.cuda:
        raise Skip("torch counts memory on GPUs only")
    found = {}
    for name in suite.backends:
        code = (
            "import sys, torch; from cifar_fast import Recipe, fit, load_dataset; "
            f"fit(Recipe(epochs=1), load_dataset('synthetic'), backend='{name}', device='cuda', dtype='float16', log=None); "
            "print(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())"
        )
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        allocated, reserved = map(int, done.stdout.split()[-2:])
        found[name] = dict(allocated=allocated, reserved=reserved)
    return found


def batch_sizes(suite: Suite) -> dict[str, Any]:
    """A step of the fastest backend at other batch sizes."""
    return _sweep(suite, ((str(size), dataclasses.replace(suite.recipe, batch_size=size)) for size in BATCH_SIZES[suite.device.type]))


def widths(suite: Suite) -> dict[str, Any]:
    """A step of the fastest backend with all widths times a factor."""
    return _sweep(
        suite,
        (
            (f"x {factor:g}", dataclasses.replace(suite.recipe, widths=tuple(int(w * factor) for w in suite.recipe.widths)))
            for factor in WIDTHS
        ),
    )


def _sweep(suite: Suite, recipes: Iterator[tuple[str, Recipe]]) -> dict[str, Any]:
    found = {}
    for name, recipe in recipes:
        if len(suite.dataset.train_images) < 3 * recipe.batch_size:
            continue
        backend = suite.set_up(suite.fastest, recipe)
        row = time_steps(suite, {backend.name: backend}, rounds=5 if suite.cuda else 3)[backend.name]
        passes = roofline.layers(recipe, suite.dataset.num_classes, suite.choice.dtype)
        flop = sum(part.flop for part in passes)
        found[name] = row | dict(pictures_a_second=recipe.batch_size / row["median"], flop=flop, flops=flop / row["median"])
        del backend
    return dict(backend=suite.fastest.name, rows=found)


def epochs(suite: Suite) -> dict[str, Any]:
    """Accuracy and seconds of shorter trainings by the fastest backend, the schedule squeezed."""
    if not (suite.cuda and suite.real):
        raise Skip("needs a GPU and --data-dir")
    found = {}
    n, clock = len(suite.dataset.train_images), synchronised_clock(suite.device)
    for count in EPOCHS:
        backend = suite.set_up(suite.fastest, dataclasses.replace(suite.recipe, epochs=count))
        seconds, accuracies = [], []
        for seed in range(3):
            torch.manual_seed(seed)
            backend.prepare(CNN(backend.recipe, suite.dataset.num_classes))
            rows: list[Any] = []
            seconds.append(train_once(backend, n, seed, clock, rows.append, silent)[0])
            accuracies.append(rows[-1].test_accuracy)
        found[str(count)] = dict(seconds=summary(seconds), accuracy=summary(accuracies))
        if suite.left() < 0:
            break
    return found


def peers(suite: Suite) -> dict[str, Any]:
    """Other projects that are installed, on the same pictures: another network and recipe, so times to an accuracy alone compare."""
    if not suite.cuda:
        raise Skip("the peers need a CUDA GPU")
    if importlib.util.find_spec("airbench") is None:
        raise Skip("airbench is not installed; pip install airbench")
    if not suite.real:
        raise Skip("give --data-dir: accuracies are of real pictures")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "cifar10").mkdir()
        for split in ("train", "test"):
            images, labels = (torch.tensor(getattr(suite.dataset, f"{split}_{what}")) for what in ("images", "labels"))
            torch.save(dict(images=images, labels=labels, classes=list(suite.dataset.class_names)), f"{folder}/cifar10/{split}.pt")
        code = (
            "import airbench, time, torch\nairbench.warmup94(verbose=False)\nfor i in range(3):\n"
            " torch.cuda.synchronize(); start = time.perf_counter(); airbench.train94(run=i, verbose=True)\n"
            " torch.cuda.synchronize(); print('OURS', time.perf_counter() - start)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True)
    return {"airbench94": airbench_rows(done.stdout)}


def airbench_rows(printed: str) -> dict[str, Any]:
    """What airbench's own table says of each training in its row of the evaluation, and the seconds that we print after it."""
    theirs, ours, accuracies = [], [], []
    for line in printed.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if "eval" in cells:
            *_, accuracy, seconds = (float(cell) for cell in cells if "." in cell)
            accuracies.append(100 * accuracy)
            theirs.append(seconds)
        elif line.startswith("OURS"):
            ours.append(float(line.split()[1]))
    return dict(own_clock=summary(theirs), our_clock=summary(ours), accuracy=summary(accuracies))


PARTS: dict[str, Callable[[Suite], dict[str, Any]]] = {
    "ceilings": ceilings,
    "parity": parity,
    "cpu": on_a_cpu,
    "kernels": kernels,
    "steps": steps,
    "trainings": trainings,
    "convolutions": convolutions,
    "peers": peers,
    "memory": memory,
    "batch_sizes": batch_sizes,
    "widths": widths,
    "epochs": epochs,
}
FIRST = ("ceilings", "parity")
"""Parts that the others need, and that run whatever ``--only`` says."""


def run(output: Path, suite: Suite, settings: dict[str, Any], only: list[str]) -> int:
    """Run what is not done yet of ``only``, writing after each part; gives the exit code."""
    file = output / "results.json"
    results = start(file, settings, environment(suite.device))
    suite.done = {name: part["result"] for name, part in results["parts"].items() if "result" in part}
    for name in [*FIRST, *(name for name in only if name not in FIRST)]:
        if name in suite.done and not suite.done[name].get("cut_short"):
            print(f"{name}: done before")
            continue
        if name not in FIRST and suite.left() <= 0:
            print(f"{name} and what follows: no minutes left; start again to go on")
            break
        begun = time.perf_counter()
        try:
            with on(suite.device):
                part = {"result": PARTS[name](suite)}
            suite.done[name] = part["result"]
        except Skip as reason:
            part = {"skipped": str(reason)}
        except Exception as error:  # compiler, driver, memory, a child process: the rest can still be measured
            stderr = getattr(error, "stderr", None) or ""
            part = {"failed": " ".join(f"{type(error).__name__}: {error} {stderr[-300:]}".split())}
        part["seconds"] = time.perf_counter() - begun
        results["parts"][name] = part
        with replacing(file) as draft:
            draft.write_text(json.dumps(results, indent=1) + "\n")
        write_report(output)
        print(f"{name}: {part.get('skipped') or part.get('failed') or 'done'} ({part['seconds']:.0f} s)", flush=True)
        if name == "parity" and not suite.done.get("parity", {}).get("within"):
            print("parity is not given: nothing more is measured", file=sys.stderr)
            return 1
    return 1 if any("failed" in part for part in results["parts"].values()) else 0


def start(file: Path, settings: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """The results so far of this machine and these settings; :class:`InputError` for another's."""
    fresh = json.loads(json.dumps({"schema": SCHEMA, "environment": facts, "settings": settings, "parts": {}}))  # tuples are lists there
    if not file.exists():
        return fresh
    try:
        before = json.loads(file.read_text())
        same = all(before[name] == fresh[name] for name in ("schema", "environment", "settings"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not a suite's results ({error}); choose another --output") from None
    if not same:
        raise InputError(f"{file}: results of another machine, version or setting; choose another --output")
    return before


def main(argv: list[str] | None = None) -> int:
    """Run the command with ``argv`` (default: the process's own); gives 0, 1 where a part failed, 2 for bad input."""
    return run_command(lambda: _command(_parser().parse_args(argv)), "interrupted; start again with the same --output to go on")


def _command(args: argparse.Namespace) -> int:
    begun = time.perf_counter()
    if not args.minutes > 0:
        raise InputError(f"--minutes must be above 0, not {args.minutes:g}")
    if args.reference_script and not args.reference_script.is_file():
        raise InputError(f"--reference-script {args.reference_script}: no such file")
    choice = choose("eager", args.device)
    if choice.device.type == "cpu":
        keep_freed_memory()
    if args.data_dir is None:
        dataset = load_dataset("synthetic")
    else:
        dataset = load_dataset("npz" if os.path.isfile(args.data_dir) else "folder", args.data_dir)
    recipe = Recipe()
    settings = dict(recipe=dataclasses.asdict(recipe), dtype=str(choice.dtype).removeprefix("torch."), dataset=dataset.facts())
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {args.output}: cannot be written to ({error.strerror or error}); choose another folder") from None
    suite = Suite(recipe, dataset, args.data_dir is not None, choice, begun + 60 * args.minutes, args.reference_script, {})
    return run(args.output, suite, settings, args.only or list(PARTS))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m benchmarks.suite", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for results.json, results.md and pictures")
    parser.add_argument(
        "--data-dir", metavar="PATH", help="real pictures: an .npz, or a folder with train/ and test/ (default: generated ones)"
    )
    parser.add_argument("--minutes", type=float, default=9, metavar="M", help="begin no part after so many minutes (default: 9)")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, metavar="PART", help=f"only these, after {' and '.join(FIRST)}: {', '.join(PARTS)}"
    )
    parser.add_argument("--reference-script", type=Path, metavar="PATH", help="the reference's own script, run as a black box beside ours")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
