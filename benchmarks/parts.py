"""The parts of a run: each gives rows, of sides that take turns, after what they compute was checked."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import reference
from benchmarks.cases import (
    IMPLEMENTATIONS,
    Case,
    Wrong,
    check,
    check_replay,
    convolution_cases,
    input_sets,
    kernel_cases,
    moved,
)
from benchmarks.floors import floor_rows
from benchmarks.rows import Row
from benchmarks.timing import LAUNCHES, capture, child, cold_times, count_launches, interleave, replay_times, wall
from cifar_fast import CNN, Dataset, Recipe, draw_epoch, load_dataset
from cifar_fast.augment import augment, seeded
from cifar_fast.backends import Backend, Eager, device_guard, keep_freed_memory
from cifar_fast.floors import copy_rates, passes, product_rates
from cifar_fast.plan import Plan, fused_unavailable_reason, resolve, set_up
from cifar_fast.profile import profile
from cifar_fast.progress import silent
from cifar_fast.trainer import synchronized_clock, train

BATCH_SIZES = {"cuda": (64, 128, 256, 512, 1024, 2048), "cpu": (64, 512)}
WIDTH_FACTORS = (0.25, 0.5)
Rows = Iterator[Row]


class Skip(Exception):
    """Why a part cannot run here."""


@dataclass
class Bench:
    """What the parts share. ``real``: accuracies on ``dataset`` mean something. ``done``: rows of earlier parts."""

    recipe: Recipe
    dataset: Dataset
    real: bool
    plan: Plan
    deadline: float
    reference_script: Path | None
    done: list[Row]

    @property
    def cuda(self) -> bool:
        return self.plan.device.type == "cuda"

    @property
    def n(self) -> int:
        return len(self.dataset.train_images)

    def left(self) -> float:
        """Seconds until the run should end."""
        return self.deadline - time.perf_counter()

    def late(self) -> bool:
        return self.left() < 0

    @functools.cached_property
    def backends(self) -> dict[str, Backend]:
        """The backends that are worth timing here, set up."""
        names = ["eager"]
        if self.cuda:
            names += ["compiled"] if fused_unavailable_reason(self.plan.device) else ["compiled", "fused"]
        sides = {name: self.set_up(name, self.recipe) for name in names}
        return sides if self.cuda else sides | {"auto": self.set_up("auto", self.recipe)}

    def set_up(self, name: str, recipe: Recipe) -> Backend:
        """The backend ``name`` at the start of a run, float32 for eager on a CPU as the reference."""
        device = str(self.plan.device)
        dtype = "float16" if self.cuda else "float32" if name == "eager" else "auto"
        backend, _ = set_up(resolve(name, device, dtype), recipe, self.dataset, silent)
        torch.manual_seed(0)
        backend.reset(CNN(recipe, self.dataset.num_classes))
        return backend

    @property
    def preferred(self) -> str:
        """The backend that auto takes first."""
        return list(self.backends)[-1]

    def rate(self, case: str) -> float:
        """The median of a ceiling, per second."""
        return next(row.median * 1e9 for row in self.done if row.part == "ceilings" and row.case == case)


def ceilings(bench: Bench) -> Rows:
    """The device's copy bandwidth and matrix rate, and the floors of a step and a run that follow from them."""
    device, dtype = bench.plan.device, bench.plan.dtype
    copies, products = copy_rates(device), product_rates(device, dtype)
    yield Row("ceilings", "copy", "device", "bandwidth", "GB/s", [rate / 1e9 for rate in copies])
    yield Row("ceilings", "matrix product", "device", "rate", "GFLOP/s", [rate / 1e9 for rate in products])
    rates = statistics.median(copies), statistics.median(products)
    yield from floor_rows(bench.recipe, bench.n, bench.dataset.num_classes, dtype, *rates)


def parity(bench: Bench) -> Rows:
    """``cifar-fast compare`` of fused against eager: at full width on a GPU, narrow and interpreted without one."""
    flags = "--dataset synthetic --device cuda --dtype float16 --steps 3 --batch-size 512"
    if not bench.cuda:
        narrow = "--batch-size 4 --widths 4 8 8 8 16 32 32 32"
        flags = f"--dataset synthetic --device cpu --dtype float32 --steps 2 {narrow}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "compare.json")
        child(["-m", "cifar_fast.compare", *flags.split(), "--json", str(file)])
        report = json.loads(file.read_text())
    ratios = [row["ratio"] for row in report["rows"]]
    yield Row("parity", flags, "fused against eager", "difference", "times eager's own", ratios)


def cpu(bench: Bench) -> Rows:
    """A step and an epoch's augmentation beside the reference's, a process each and in turn."""
    if bench.cuda:
        raise Skip("a GPU is here; give --device cpu for the CPU's figures")
    with tempfile.TemporaryDirectory() as folder:
        npz = Path(folder, "images.npz")
        bench.dataset.save(npz)
        sides = {side: functools.partial(_cpu_child, bench.recipe, npz, side) for side in CPU_SIDES}
        if bench.reference_script and bench.recipe.widths == Recipe().widths:  # the script knows no others
            script = functools.partial(_script, bench.reference_script, npz, bench.recipe)
            sides = {"reference script": script} | sides
        found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for turn in range(3):
            for name, side in sides.items():
                found[name].append(side())
            if turn and bench.late():
                break
    for case in ("step", "augmentation of an epoch"):
        for name, turns in found.items():
            yield Row("cpu", case, name, "time", "s", [turn[case] for turn in turns])


CPU_SIDES = ("reference, restated", "eager", "auto", "auto again")
CPU_STEPS = 3
LOSS_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
"""Of ||losses - the reference's||, relative; 5e-7 and 8e-4 were seen."""


def _cpu_child(recipe: Recipe, npz: Path, side: str) -> dict[str, float]:
    """:func:`cpu_side` in a process of its own: what one asks of the C library's memory would hold for the next too."""
    code = (
        "import json, sys; from benchmarks.parts import cpu_side; from cifar_fast import Recipe; "
        "print(json.dumps(cpu_side(Recipe.from_json(sys.argv[1]), *sys.argv[2:])))"
    )
    return json.loads(child(["-c", code, recipe.to_json(), str(npz), side]))


def cpu_side(recipe: Recipe, npz: str, side: str) -> dict[str, float]:
    """Seconds of a training step and of an epoch's augmentation by one of ``CPU_SIDES``."""
    device = torch.device("cpu")
    step, augment_epoch = cpu_calls(recipe, load_dataset("npz", npz, log=None), side)
    losses: list[torch.Tensor] = []
    augmentation = [wall(augment_epoch, device) for _ in range(3)]
    times = [wall(lambda: losses.append(step()), device) for _ in range(2 + CPU_STEPS)][2:]
    if not torch.stack(losses).isfinite().all():
        raise Wrong(f"{side}: the loss of a timed step is not finite")
    return {"step": statistics.median(times), "augmentation of an epoch": statistics.median(augmentation)}


def cpu_calls(recipe: Recipe, dataset: Dataset, side: str) -> tuple[Callable[[], torch.Tensor], Callable[[], object]]:
    """A training step, which gives its losses, and an epoch's augmentation by one of ``CPU_SIDES``, checked.

    The reference's step takes a batch that is there, as in its script; ours makes it too.
    """
    n, size = len(dataset.train_images), recipe.batch_size
    if side.startswith("reference"):
        images, _ = reference.normalized(dataset.train_images, dataset.test_images, torch.float32)
        labels, training = torch.tensor(dataset.train_labels), _reference_training(recipe, dataset)
        batch = next(training.batches(images, labels))
        return lambda: training.step(*batch, n // size)[0], lambda: reference.augmented_epoch(images, labels)
    keep_freed_memory()
    plan = resolve("eager", "cpu", "float32") if side == "eager" else resolve("auto", "cpu")
    backend, _ = set_up(plan, recipe, dataset, silent)
    check_backend(backend, dataset)
    epoch = draw_epoch(n, device=plan.device, recipe=recipe)

    def augment_epoch() -> None:
        for i in range(0, n - n % size, size):
            augment(backend.data.train_images, epoch.slice(i, i + size), recipe, plan.memory_format)

    return lambda: next(backend.train_epoch(epoch.slice(0, size)))[0], augment_epoch


def check_backend(backend: Eager, dataset: Dataset) -> None:
    """Raise Wrong unless ``backend``, on a CPU, makes the reference's batches bit for bit, and gets its first losses.

    Losses in float32 and in the script's memory format have the reference's bits, others are held to LOSS_TOLERANCES.
    """
    recipe, size = backend.recipe, backend.recipe.batch_size
    n = min(len(dataset.train_images), max(2000, size))
    images, _ = reference.normalized(dataset.train_images, dataset.test_images, backend.dtype)
    torch.manual_seed(1)
    batch, labels = reference.augmented_epoch(images[:n], torch.tensor(dataset.train_labels[:n]))
    torch.manual_seed(1)
    draws = draw_epoch(n, device="cpu", recipe=recipe)
    if not torch.equal(augment(backend.data.train_images, draws, recipe, backend.memory_format), batch):
        raise Wrong("our batches are not the reference's")
    training = _reference_training(recipe, dataset)
    with torch.no_grad():
        expected, _ = training.network(batch[:size].float(), labels[:size])
    torch.manual_seed(0)
    backend.reset(CNN(recipe, dataset.num_classes))
    losses, _ = next(backend.train_epoch(draws.slice(0, size)))
    exact = backend.dtype == torch.float32 and backend.memory_format == torch.contiguous_format
    error = ((losses - expected).norm() / expected.norm()).item()
    if not (torch.equal(losses, expected) if exact else error <= LOSS_TOLERANCES[backend.dtype]):
        raise Wrong(f"the first losses are off the reference's by {error:.1e}")


def _reference_training(recipe: Recipe, dataset: Dataset) -> reference.Training:
    shape = dict(widths=recipe.widths, classes=dataset.num_classes)
    size = recipe.batch_size
    return reference.Training(seed=0, epochs=recipe.epochs, batch_size=size, dtype=torch.float32, **shape)


def _script(script: Path, npz: Path, recipe: Recipe) -> dict[str, float]:
    """The reference's own script as a black box: the mean of its steps, the first included."""
    flags = f"--data {npz} --device cpu --dtype float32 --batch-size {recipe.batch_size} --max-steps {2 + CPU_STEPS}"
    printed = child([str(script), *flags.split()])
    found = re.search(r"augment ([\d.]+) s an epoch, ([\d.]+) s a step", printed)
    if not found:
        raise RuntimeError(f"{script} did not print what was expected of it: {printed!r}")
    return {"step": float(found[2]), "augmentation of an epoch": float(found[1])}


def kernels(bench: Bench) -> Rows:
    """Each kernel at each shape of the recipe beside eager torch and torch.compile."""
    if not bench.cuda:
        raise Skip("the kernels need a CUDA GPU")
    measured = {(row.case, row.side) for row in bench.done if row.part == "kernels" and row.values}
    stop = bench.left() / 2  # the parts after this one are worth as much; the rest comes when the run goes on
    for implementation in IMPLEMENTATIONS:
        for case in kernel_cases(bench.recipe, bench.plan.dtype):
            if (case_name(case), implementation) not in measured:
                if bench.left() < stop:
                    return
                yield from measure_kernel(case, implementation)


def case_name(case: Case) -> str:
    return f"{case.name}, {case.direction}"


def measure_kernel(case: Case, implementation: str) -> list[Row]:
    """Check ``implementation`` of ``case``, then time it on the current GPU; a wrong result is one row that says so.

    In a loop: many calls in one CUDA graph, over input sets in turn that touch twice the L2 cache together; outputs
    take turns too, are poisoned and checked after one more replay. Cold: a call after a buffer larger than the cache
    was written. Rates count the ideal bytes, so that they compare implementations; ``moved`` what our kernels move.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    torch.manual_seed(0)
    stream = torch.cuda.Stream()  # a backward pass runs where its forward pass did, and must not leave the capture
    stream.wait_stream(torch.cuda.current_stream())

    def row(metric: str, unit: str, values: list[float]) -> Row:
        return Row("kernels", case_name(case), implementation, metric, unit, values)

    try:
        with torch.cuda.stream(stream):
            sets = case.inputs(input_sets(case, cache), device)
            calls, expected = case.calls(implementation, sets), case.truth(sets[0])
            check(case, calls[0](), expected)
            for call in calls:
                call()
            graph, outputs, count = capture(calls, LAUNCHES, stream)
            times = [seconds / count for seconds in replay_times(graph)]
            check_replay(case, graph.replay, outputs[0], expected)
            cold = cold_times(calls[0], cache, stream)
            launches = count_launches(calls[0])  # last, so that no profiler was there when a time was taken
    except Wrong as error:
        return [row(f"wrong: {error}", "", [])]
    finally:
        torch.cuda.current_stream().wait_stream(stream)
    rows = [
        row("in a loop", "us", [seconds * 1e6 for seconds in times]),
        row("cold", "us", [seconds * 1e6 for seconds in cold]),
        row("ideal bytes", "GB/s", [case.ideal_bytes / seconds / 1e9 for seconds in times]),
    ]
    if implementation == "fused":
        size = moved(case.launches())
        rows.append(row("moved bytes", "GB/s", [size / seconds / 1e9 for seconds in times]))
    return rows + ([row("launches", "", [launches])] if launches else [])


def steps(bench: Bench) -> Rows:
    """A training step of each backend, in turn, auto's choice twice; its share of the floors; where its time goes."""
    sides = bench.backends | {f"{bench.preferred} again": bench.backends[bench.preferred]}
    times = time_steps(bench, sides, rounds=10 if bench.cuda else 3)
    some = passes(bench.recipe, bench.dataset.num_classes, bench.plan.dtype)
    flop, size = sum(one.flop for one in some), sum(one.bytes for one in some)
    arithmetic, memory = flop / bench.rate("matrix product"), size / bench.rate("copy")
    for name, values in times.items():
        yield Row("steps", "step", name, "time", "ms/step", [seconds * 1e3 for seconds in values])
        yield Row("steps", "step", name, "rate", "TFLOP/s", [flop / seconds / 1e12 for seconds in values])
        yield Row("steps", "step", name, "arithmetic floor", "%", [100 * arithmetic / statistics.median(values)])
        yield Row(
            "steps", "step", name, "no-overlap floor", "%", [100 * (arithmetic + memory) / statistics.median(values)]
        )
    for name, backend in bench.backends.items():
        with tempfile.TemporaryDirectory() as folder:
            draws = draw_epoch(bench.n, device=bench.plan.device, recipe=bench.recipe)
            table = profile(backend, draws, folder, steps=10 if bench.cuda else 2, log=silent)
        for line in table.rows:
            yield Row("profile", line.line, name, "time", "ms/step", [line.milliseconds])
            yield Row("profile", line.line, name, "launches", "1/step", [line.launches])


def time_steps(bench: Bench, sides: dict[str, Backend], rounds: int) -> dict[str, list[float]]:
    """Seconds per step, sides in turn: a whole epoch a turn on a GPU, three steps without one."""

    def turn(name: str, backend: Backend) -> float:
        draws = draw_epoch(bench.n, device=bench.plan.device, recipe=backend.recipe)
        if not bench.cuda:
            draws = draws.slice(0, 3 * backend.recipe.batch_size)
        losses: list[torch.Tensor] = []
        seconds = wall(lambda: losses.extend(loss for loss, _ in backend.train_epoch(draws)), bench.plan.device)
        if not torch.stack(losses).isfinite().all():
            raise Wrong(f"a loss of the {name} backend is not finite: no figure is given")
        return seconds / len(losses)

    return interleave({name: functools.partial(turn, name, side) for name, side in sides.items()}, rounds, bench.late)


def trainings(bench: Bench) -> Rows:
    """Whole trainings in turn; the reference's script as a black box, by its own clock."""
    if not bench.cuda:
        raise Skip("a whole training takes an hour and more without a GPU")
    if not bench.real:
        raise Skip("give --dataset and --data-dir: accuracies are of real images")
    seconds: dict[str, list[float]] = {}
    accuracies: dict[str, list[float]] = {}
    for backend in bench.backends.values():  # an epoch that does not count: all is compiled in it that will be
        list(backend.train_epoch(draw_epoch(bench.n, device=bench.plan.device, recipe=bench.recipe)))
    with tempfile.TemporaryDirectory() as folder:
        npz = Path(folder, "images.npz")
        bench.dataset.save(npz)
        for turn in range(10):
            start = time.perf_counter()
            for name, backend in bench.backends.items():
                last = _training(bench, backend, seed=turn)
                seconds.setdefault(name, []).append(last["train_seconds"])
                accuracies.setdefault(name, []).append(last["test_accuracy"])
            if bench.reference_script and turn < 3:
                last = _script_training(bench, npz, Path(folder, "metrics.jsonl"), seed=turn)
                seconds.setdefault("reference script", []).append(last["train_seconds"])
                accuracies.setdefault("reference script", []).append(last["test_accuracy"])
            if bench.left() < time.perf_counter() - start:
                break
    for name in seconds:
        yield Row("trainings", f"{bench.recipe.epochs} epochs", name, "time", "s", seconds[name])
        yield Row("trainings", f"{bench.recipe.epochs} epochs", name, "test accuracy", "%", accuracies[name])


def _training(bench: Bench, backend: Backend, seed: int) -> dict[str, float]:
    """The last row of a training by ``backend``."""
    weights, draws = seeded(seed, bench.plan.device)
    backend.reset(CNN(backend.recipe, bench.dataset.num_classes, weights))
    *_, last = train(backend, bench.n, draws, seed, synchronized_clock(bench.plan.device))
    return vars(last)


def _script_training(bench: Bench, npz: Path, metrics: Path, seed: int) -> dict[str, float]:
    """The last row that the reference's script writes."""
    how = f"--device {bench.plan.device} --dtype float16 --seed {seed} --epochs {bench.recipe.epochs}"
    child([str(bench.reference_script), "--data", str(npz), *how.split(), "--metrics", str(metrics)])
    return json.loads(metrics.read_text().splitlines()[-1])


def convolutions(bench: Bench) -> Rows:
    """Each convolution alone, in the memory format and dtype of ``auto``; its first with 3, 4 and 8 input channels."""
    from cifar_fast.fused import fastest_deterministic_convolutions  # which needs Triton

    device, repeats = bench.plan.device, 20 if bench.cuda else 1
    with fastest_deterministic_convolutions(), device_guard(device):
        for case in convolution_cases(bench.recipe, bench.plan.dtype):
            call = case.call(device, torch.channels_last)
            times = [wall(call, device, repeats) for _ in range(9 if bench.cuda else 5)][2:]
            yield Row("convolutions", case.name, case.direction, "time", "ms", [seconds * 1e3 for seconds in times])
            rates = [case.flop / seconds / 1e12 for seconds in times]
            yield Row("convolutions", case.name, case.direction, "rate", "TFLOP/s", rates)


def memory(bench: Bench) -> Rows:
    """The most memory that torch took on the device for an epoch and an evaluation, set-up included."""
    if not bench.cuda:
        raise Skip("torch counts memory on GPUs only")
    for name in bench.backends:
        code = (
            "import torch; from cifar_fast import Recipe, fit, load_dataset; "
            f"fit(Recipe(epochs=1), load_dataset('synthetic'), backend='{name}', device='cuda', "
            "dtype='float16', log=None); "
            "print(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())"
        )
        allocated, reserved = map(int, child(["-c", code]).split()[-2:])
        yield Row("memory", "an epoch, synthetic", name, "allocated", "GB", [allocated / 1e9])
        yield Row("memory", "an epoch, synthetic", name, "reserved", "GB", [reserved / 1e9])


def sweeps(bench: Bench) -> Rows:
    """A step of auto's choice at other batch sizes and widths."""
    recipes = {f"batch size {size}": dict(batch_size=size) for size in BATCH_SIZES[bench.plan.device.type]}
    for factor in WIDTH_FACTORS:
        recipes[f"widths x {factor:g}"] = dict(widths=tuple(int(width * factor) for width in bench.recipe.widths))
    name = bench.preferred
    for case, changes in recipes.items():
        recipe = dataclasses.replace(bench.recipe, **changes)
        if bench.n >= 3 * recipe.batch_size:
            sides = {name: bench.set_up(name, recipe)}
            values = time_steps(bench, sides, rounds=5 if bench.cuda else 3)[name]
            yield Row("sweeps", case, name, "time", "ms/step", [seconds * 1e3 for seconds in values])
            yield Row("sweeps", case, name, "rate", "images/s", [recipe.batch_size / seconds for seconds in values])


PARTS: dict[str, Callable[[Bench], Rows]] = {
    "ceilings": ceilings,
    "parity": parity,
    "cpu": cpu,
    "kernels": kernels,
    "steps": steps,
    "trainings": trainings,
    "convolutions": convolutions,
    "memory": memory,
    "sweeps": sweeps,
}
