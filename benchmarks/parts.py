"""The parts of a run: each gives rows, of sides that take turns, after what they compute was checked."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import reference
from benchmarks.floors import floor_rows
from benchmarks.rows import Row
from benchmarks.timing import capture, child, device_work, interleave, replay_times, wall
from cifar_fast import CNN, Dataset, Recipe, draw_epoch, load_dataset
from cifar_fast.backends.base import Backend
from cifar_fast.backends.eager import Eager
from cifar_fast.backends.select import BackendConfig, build_backend, resolve_backend
from cifar_fast.data.augment import augment
from cifar_fast.data.tensors import device_data
from cifar_fast.diagnostics.kernel_cases import (
    IMPLEMENTATIONS,
    Case,
    Wrong,
    check,
    check_replay,
    input_sets,
    kernel_cases,
    moved,
)
from cifar_fast.diagnostics.profile import profile
from cifar_fast.diagnostics.roofline import Pass, copy_bandwidth, floors, matmul_flops, passes
from cifar_fast.training.trainer import train
from cifar_fast.utils.device import device_timer, fused_unavailable_reason, tune_malloc
from cifar_fast.utils.seeds import make_generators

Rows = Iterator[Row]


class Skip(Exception):
    """Why a part cannot run here."""


@dataclass
class Bench:
    """What the parts share. ``real``: accuracies on ``dataset`` mean something. ``done``: rows of earlier parts."""

    recipe: Recipe
    dataset: Dataset
    real: bool
    plan: BackendConfig
    deadline: float
    reference_script: Path | None
    done: list[Row]

    @property
    def cuda(self) -> bool:
        return self.plan.device.type == "cuda"

    @property
    def n(self) -> int:
        return len(self.dataset.train_images)

    @property
    def passes(self) -> list[Pass]:
        """Those of a training step."""
        return passes(self.recipe, self.dataset.num_classes, self.plan.dtype)

    def late(self, seconds: float = 0) -> bool:
        """Whether the run should end before so many seconds are over."""
        return self.deadline - time.perf_counter() < seconds

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
        plan = resolve_backend(name, device, dtype)
        backend, _ = build_backend(plan, recipe, device_data(self.dataset, plan.device))
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
    copies, products = copy_bandwidth(bench.plan.device), matmul_flops(bench.plan.device, bench.plan.dtype)
    yield Row("ceilings", "copy", "device", "bandwidth", "GB/s", [rate / 1e9 for rate in copies])
    yield Row("ceilings", "matrix product", "device", "rate", "GFLOP/s", [rate / 1e9 for rate in products])
    steps = bench.recipe.epochs * bench.dataset.steps_per_epoch(bench.recipe.batch_size)
    yield from floor_rows(bench.passes, steps, statistics.median(copies), statistics.median(products))


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
    tune_malloc()
    plan = resolve_backend("eager", "cpu", "float32") if side == "eager" else resolve_backend("auto", "cpu")
    backend, _ = build_backend(plan, recipe, device_data(dataset, plan.device))
    check_backend(backend, dataset)
    epoch = draw_epoch(n, device=plan.device, recipe=recipe)

    def augment_epoch() -> None:
        for i in range(0, n - n % size, size):
            augment(backend.train_images, epoch.slice(i, i + size), recipe, plan.memory_format)

    return lambda: next(backend.train_epoch(epoch.slice(0, size)))[0], augment_epoch


def check_backend(backend: Eager, dataset: Dataset) -> None:
    """Raise Wrong unless ``backend`` makes the reference's batches on a CPU bit for bit, and gets its first losses."""
    recipe, size = backend.recipe, backend.recipe.batch_size
    n = min(len(dataset.train_images), max(2000, size))
    images, _ = reference.normalized(dataset.train_images, dataset.test_images, backend.dtype)
    torch.manual_seed(1)
    batch, labels = reference.augmented_epoch(images[:n], torch.tensor(dataset.train_labels[:n]))
    torch.manual_seed(1)
    draws = draw_epoch(n, device="cpu", recipe=recipe)
    if not torch.equal(augment(backend.train_images, draws, recipe, backend.memory_format), batch):
        raise Wrong("our batches are not the reference's")
    training = _reference_training(recipe, dataset)
    with torch.no_grad():
        expected, _ = training.network(batch[:size].float(), labels[:size])
    torch.manual_seed(0)
    backend.reset(CNN(recipe, dataset.num_classes))
    losses, _ = next(backend.train_epoch(draws.slice(0, size)))
    error = ((losses - expected).norm() / expected.norm()).item()
    if not error <= LOSS_TOLERANCES[backend.dtype]:
        raise Wrong(f"the first losses are off the reference's by {error:.1e}")


def _reference_training(recipe: Recipe, dataset: Dataset) -> reference.Training:
    size, shape = recipe.batch_size, dict(widths=recipe.widths, classes=dataset.num_classes)
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
    for implementation in IMPLEMENTATIONS:
        for case in kernel_cases(bench.recipe, bench.plan.dtype):
            if (case.name, implementation) not in measured:
                if bench.late():  # the rest comes when the run goes on
                    return
                yield from measure_kernel(case, implementation)


def measure_kernel(case: Case, implementation: str) -> list[Row]:
    """Check ``implementation`` of ``case``, then time it on the current GPU; a wrong result is one row that says so.

    In a loop: many calls in one CUDA graph, over input sets in turn that touch twice the L2 cache together; outputs
    take turns too, are poisoned and checked after one more replay. The rate counts what our kernels move, for every
    implementation, so that rates compare.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    torch.manual_seed(0)
    stream = torch.cuda.Stream()  # a backward pass runs where its forward pass did, and must not leave the capture
    stream.wait_stream(torch.cuda.current_stream())

    def row(metric: str, unit: str, values: list[float]) -> Row:
        return Row("kernels", case.name, implementation, metric, unit, values)

    try:
        with torch.cuda.stream(stream):
            sets = case.inputs(input_sets(case, cache), device)
            calls, expected = case.calls(implementation, sets), case.truth(sets[0])
            check(case, calls[0](), expected)
            for call in calls:
                call()
            graph, outputs, count = capture(calls, stream)
            times = [seconds / count for seconds in replay_times(graph)]
            check_replay(case, graph.replay, outputs[0], expected)
            launches = len(device_work(calls[0]))  # last, so that no profiler was there when a time was taken
    except Wrong as error:
        return [row(f"wrong: {error}", "", [])]
    finally:
        torch.cuda.current_stream().wait_stream(stream)
    size = moved(case.launches())
    rows = [
        row("in a loop", "us", [seconds * 1e6 for seconds in times]),
        row("our bytes", "GB/s", [size / seconds / 1e9 for seconds in times]),
    ]
    return rows + ([row("launches", "", [launches])] if launches else [])  # none: the profiler sees nothing here


def steps(bench: Bench) -> Rows:
    """A training step of each backend, in turn, auto's choice twice; its share of the floors; where its time goes."""
    sides = bench.backends | {f"{bench.preferred} again": bench.backends[bench.preferred]}
    times = time_steps(bench, sides, rounds=10 if bench.cuda else 3)
    flop = sum(one.flop for one in bench.passes)
    least = floors(bench.passes, bench.rate("copy"), bench.rate("matrix product"))
    for name, values in times.items():
        yield Row("steps", "step", name, "time", "ms/step", [seconds * 1e3 for seconds in values])
        yield Row("steps", "step", name, "rate", "TFLOP/s", [flop / seconds / 1e12 for seconds in values])
        for floor in ("arithmetic", "no_overlap"):
            yield Row("steps", "step", name, f"{floor} floor", "%", [100 * least[floor] / statistics.median(values)])
    for name, backend in bench.backends.items():
        with tempfile.TemporaryDirectory() as folder:
            draws = draw_epoch(bench.n, device=bench.plan.device, recipe=bench.recipe)
            table = profile(backend, draws, folder, steps=10 if bench.cuda else 2)
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
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for backend in bench.backends.values():  # an epoch that does not count: all is compiled in it that will be
        list(backend.train_epoch(draw_epoch(bench.n, device=bench.plan.device, recipe=bench.recipe)))
    with tempfile.TemporaryDirectory() as folder:
        npz = Path(folder, "images.npz")
        bench.dataset.save(npz)
        for turn in range(10):
            start = time.perf_counter()
            for name, backend in bench.backends.items():
                weights, draws = make_generators(turn, bench.plan.device)
                backend.reset(CNN(bench.recipe, bench.dataset.num_classes, weights))
                *_, last = train(backend, bench.n, draws, turn, device_timer(bench.plan.device))
                found[name].append(vars(last))
            if bench.reference_script and turn < 3:
                found["reference script"].append(_script_training(bench, npz, Path(folder, "metrics"), seed=turn))
            if bench.late(time.perf_counter() - start):
                break
    for name, rows in found.items():
        case = f"{bench.recipe.epochs} epochs"
        yield Row("trainings", case, name, "time", "s", [row["train_seconds"] for row in rows])
        yield Row("trainings", case, name, "test accuracy", "%", [row["test_accuracy"] for row in rows])


def _script_training(bench: Bench, npz: Path, metrics: Path, seed: int) -> dict[str, float]:
    """The last row that the reference's script writes."""
    how = f"--device {bench.plan.device} --dtype float16 --seed {seed} --epochs {bench.recipe.epochs}"
    child([str(bench.reference_script), "--data", str(npz), *how.split(), "--metrics", str(metrics)])
    return json.loads(metrics.read_text().splitlines()[-1])


def sweeps(bench: Bench) -> Rows:
    """A step of auto's choice at other batch sizes and widths."""
    sizes = (64, 128, 256, 512, 1024, 2048) if bench.cuda else (64, 512)
    recipes = {f"batch size {size}": dict(batch_size=size) for size in sizes}
    for factor in (0.25, 0.5):
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
    part.__name__: part for part in (ceilings, parity, cpu, steps, trainings, sweeps, kernels)
}
