"""The parts of a run.

Each part checks the results of the implementations that it compares, times them in turn, and yields rows.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import reference
from benchmarks.rows import Row, floor_rows
from benchmarks.timing import capture, child, device_work, interleave, replay_times
from cifar_fast import Dataset, Recipe, draw_epoch, load_dataset
from cifar_fast.backends.base import Backend
from cifar_fast.backends.select import BackendConfig, build_backend, resolve_backend
from cifar_fast.data.tensors import device_data
from cifar_fast.diagnostics import kernel_cases
from cifar_fast.diagnostics.profile import profile
from cifar_fast.diagnostics.roofline import (
    COPY_BYTES,
    Pass,
    copy_bandwidth,
    layer_costs,
    matmul_flops,
    roofline_times,
    wall,
)
from cifar_fast.training.trainer import train
from cifar_fast.utils.device import device_timer, fused_unavailable_reason, short_name, slow_on_cpu_reason, tune_malloc
from cifar_fast.utils.seeds import make_generators

Rows = Iterator[Row]


class Skip(Exception):
    """A part cannot run here."""


@dataclass
class Bench:
    """The inputs of the parts. ``real``: accuracies on ``dataset`` mean something. ``done``: rows of earlier parts."""

    recipe: Recipe
    dataset: Dataset
    real: bool
    config: BackendConfig
    deadline: float
    reference_script: Path | None
    done: list[Row]

    @property
    def cuda(self) -> bool:
        return self.config.device.type == "cuda"

    @property
    def n(self) -> int:
        return len(self.dataset.train_images)

    @property
    def costs(self) -> list[Pass]:
        """Cost of a training step."""
        return layer_costs(self.recipe, self.dataset.num_classes, self.config.dtype)

    def late(self, seconds: float = 0) -> bool:
        """Return whether fewer than ``seconds`` are left before the deadline."""
        return self.deadline - time.perf_counter() < seconds

    @functools.cached_property
    def backends(self) -> dict[str, Backend]:
        """The backends that are worth timing here, with the choice of ``auto`` last."""
        names = ["eager", "compiled", "fused"] if self.cuda else ["eager", "auto"]
        if self.cuda and fused_unavailable_reason(self.config.device):
            names.remove("fused")
        return {name: self.build(name, self.recipe) for name in names}

    def build(self, name: str, recipe: Recipe) -> Backend:
        """Build a backend and start a run. Eager is float32 on a CPU, as the reference."""
        device = str(self.config.device)
        dtype = "float16" if self.cuda else "float32" if name == "eager" else "auto"
        config = resolve_backend(name, device, dtype)
        backend, _ = build_backend(config, recipe, device_data(self.dataset, config.device))
        backend.reset(backend.new_model(torch.Generator().manual_seed(0)))
        return backend

    @property
    def preferred(self) -> str:
        """The backend that ``auto`` tries first."""
        return list(self.backends)[-1]

    def rate(self, case: str) -> float:
        """Return the median of a rate (bytes/s or FLOP/s) that :func:`ceilings` measured."""
        return next(row.median * 1e9 for row in self.done if row.part == "ceilings" and row.case == case)


def ceilings(bench: Bench) -> Rows:
    """Measure copy bandwidth and matrix rate, and compute the floors of a step and a run from them."""
    copies, products = copy_bandwidth(bench.config.device), matmul_flops(bench.config.device, bench.config.dtype)
    yield Row("ceilings", "copy", "device", "bandwidth", "GB/s", [rate / 1e9 for rate in copies])
    yield Row("ceilings", "matrix product", "device", "rate", "GFLOP/s", [rate / 1e9 for rate in products])
    steps = bench.recipe.epochs * bench.dataset.steps_per_epoch(bench.recipe.batch_size)
    yield from floor_rows(bench.costs, steps, statistics.median(copies), statistics.median(products))


def parity(bench: Bench) -> Rows:
    """Compare fused with eager by ``cifar-fast compare``, in a narrow model without a GPU."""
    flags = "--dataset synthetic --device cuda --dtype float16 --steps 3 --batch-size 512"
    variables = {}
    if not bench.cuda:
        variables["TRITON_INTERPRET"] = "0"  # the kernels that the other parts time
        narrow = "--batch-size 64 --widths 4 8 8 8 16 32 32 32"
        flags = f"--dataset synthetic --device cpu --dtype float32 --steps 2 {narrow}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "compare.json")
        child(["-m", "cifar_fast.compare", *flags.split(), "--json", str(file)], **variables)
        report = json.loads(file.read_text())
    ratios = [row["ratio"] for row in report["rows"]]
    yield Row("parity", flags, "fused against eager", "difference", "times eager's own", ratios)


def cpu(bench: Bench) -> Rows:
    """Time a step and the augmentation of an epoch, of ours and of the reference.

    Each implementation runs in its own process, and they take turns.
    """
    if bench.cuda:
        raise Skip("a GPU is here; use --device cpu for the CPU")
    with tempfile.TemporaryDirectory() as folder:
        npz = Path(folder, "images.npz")
        bench.dataset.save(npz)
        sides = {side: functools.partial(_cpu_child, bench.recipe, npz, side) for side in CPU_SIDES}
        if bench.reference_script and bench.recipe.widths == Recipe().widths:  # the script has no other widths
            script = functools.partial(_script, bench.reference_script, npz, bench.recipe)
            sides = {"reference script": script} | sides
        measured = interleave(sides, rounds=3, enough=bench.late, warm_up=0)  # each side warms up in its process
    for case in ("step", "augmentation of an epoch"):
        for name, turns in measured.items():
            yield Row("cpu", case, name, "time", "s", [turn[case] for turn in turns])


CPU_SIDES = ("reference, restated", "eager", "auto", "auto again")
CPU_STEPS = 3
LOSS_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
"""Maximum relative difference of the first losses from the reference's. 5e-7 and 8e-4 were measured."""


def _cpu_child(recipe: Recipe, npz: Path, side: str) -> dict[str, float]:
    """Run :func:`cpu_side` in its own process, because ``tune_malloc`` lasts for the whole process."""
    code = (
        "import json, sys; from benchmarks.parts import cpu_side; from cifar_fast import Recipe; "
        "print(json.dumps(cpu_side(Recipe.from_json(sys.argv[1]), *sys.argv[2:])))"
    )
    return json.loads(child(["-c", code, recipe.to_json(), str(npz), side]))


def cpu_side(recipe: Recipe, npz: str, side: str) -> dict[str, float]:
    """Return the seconds of a training step and of an epoch's augmentation on one of ``CPU_SIDES``."""
    device = torch.device("cpu")
    step, augment_epoch = cpu_calls(recipe, load_dataset("npz", npz, log=None), side)
    losses: list[torch.Tensor] = []
    augmentation = [wall(augment_epoch, device) for _ in range(3)]
    times = [wall(lambda: losses.append(step()), device) for _ in range(2 + CPU_STEPS)][2:]
    if not torch.stack(losses).isfinite().all():
        raise kernel_cases.WrongResult(f"{side}: the loss of a timed step is not finite")
    return {"step": statistics.median(times), "augmentation of an epoch": statistics.median(augmentation)}


def cpu_calls(recipe: Recipe, dataset: Dataset, side: str) -> tuple[Callable[[], torch.Tensor], Callable[[], object]]:
    """Check one of ``CPU_SIDES``; return its training step, which returns losses, and an epoch's augmentation.

    The reference's step gets a finished batch, as in its script. Our step also makes the batch.
    """
    n, size = len(dataset.train_images), recipe.batch_size
    if side.startswith("reference"):
        images, _ = reference.normalized(dataset.train_images, dataset.test_images, torch.float32)
        labels, training = torch.tensor(dataset.train_labels), _reference_training(recipe, dataset)
        batch = next(training.batches(images, labels))
        return lambda: training.step(*batch, n // size)[0], lambda: reference.augmented_epoch(images, labels)
    tune_malloc()
    config = resolve_backend("eager", "cpu", "float32") if side == "eager" else resolve_backend("auto", "cpu")
    backend, _ = build_backend(config, recipe, device_data(dataset, config.device))
    check_backend(backend, dataset)
    epoch = draw_epoch(n, device=config.device, recipe=recipe)

    def augment_epoch() -> None:
        for i in range(0, n - n % size, size):
            backend.batch(epoch.slice(i, i + size))

    return lambda: next(backend.train_epoch(epoch.slice(0, size)))[0], augment_epoch


def check_backend(backend: Backend, dataset: Dataset) -> None:
    """Raise :class:`WrongResult` unless batches and losses of ``backend`` are right.

    The batches must equal the reference's bit for bit, and the first losses within ``LOSS_TOLERANCES``.
    """
    recipe, size = backend.recipe, backend.recipe.batch_size
    n = min(len(dataset.train_images), max(2000, size))
    images, _ = reference.normalized(dataset.train_images, dataset.test_images, backend.dtype)
    torch.manual_seed(1)
    batch, labels = reference.augmented_epoch(images[:n], torch.tensor(dataset.train_labels[:n]))
    torch.manual_seed(1)
    draws = draw_epoch(n, device="cpu", recipe=recipe)
    if not torch.equal(backend.batch(draws)[0], batch):
        raise kernel_cases.WrongResult("our batches are not the reference's")
    training = _reference_training(recipe, dataset)
    with torch.no_grad():
        expected, _ = training.network(batch[:size].float(), labels[:size])
    backend.reset(backend.new_model(torch.Generator().manual_seed(0)))
    losses, _ = next(backend.train_epoch(draws.slice(0, size)))
    error = ((losses - expected).norm() / expected.norm()).item()
    if not error <= LOSS_TOLERANCES[backend.dtype]:
        raise kernel_cases.WrongResult(f"the first losses are off the reference's by {error:.1e}")


def _reference_training(recipe: Recipe, dataset: Dataset) -> reference.Training:
    settings: dict[str, Any] = dict(epochs=recipe.epochs, batch_size=recipe.batch_size, widths=recipe.widths)
    return reference.Training(seed=0, dtype=torch.float32, classes=dataset.num_classes, **settings)


def _script(script: Path, npz: Path, recipe: Recipe) -> dict[str, float]:
    """Time the reference's own script; a step is the mean over all steps, including the first."""
    flags = f"--data {npz} --device cpu --dtype float32 --batch-size {recipe.batch_size} --max-steps {2 + CPU_STEPS}"
    printed = child([str(script), *flags.split()])
    times = re.search(r"augment ([\d.]+) s an epoch, ([\d.]+) s a step", printed)
    if not times:
        raise RuntimeError(f"{script} did not print its times: {printed!r}")
    return {"step": float(times[2]), "augmentation of an epoch": float(times[1])}


def kernels(bench: Bench) -> Rows:
    """Time each operator at each shape of the recipe beside eager torch and torch.compile."""
    measured = {(row.case, row.side) for row in bench.done if row.part == "kernels" and row.values}
    if not bench.cuda:
        _require_cpu_kernels(bench.config.dtype)
        for case in kernel_cases.cpu_cases(bench.recipe, bench.config.dtype):
            sides = [side for side in kernel_cases.IMPLEMENTATIONS if (case.name, side) not in measured]
            if bench.late():
                return
            yield from measure_on_cpu(case, sides, bench.rate("copy"))
        return
    for implementation in kernel_cases.IMPLEMENTATIONS:
        for case in kernel_cases.kernel_cases(bench.recipe, bench.config.dtype):
            if (case.name, implementation) not in measured:
                if bench.late():  # the next run measures the rest
                    return
                yield from measure_kernel(case, implementation)


def measure_kernel(case: kernel_cases.TimedCase, implementation: str) -> list[Row]:
    """Check ``implementation`` of ``case``, then time it on the current GPU. A wrong result is a row without values.

    A CUDA graph holds many calls. They alternate between input sets that together are twice as large as the L2 cache,
    and so do the outputs. After the timing the outputs are overwritten, replayed and checked again. The bandwidth of
    every implementation is computed from the bytes that our kernels move, so that the bandwidths can be compared.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    torch.manual_seed(0)
    stream = torch.cuda.Stream()  # a backward pass uses the stream of its forward pass, which must be the captured one
    stream.wait_stream(torch.cuda.current_stream())

    try:
        with torch.cuda.stream(stream):
            sets = [case.inputs(device) for _ in range(kernel_cases.input_sets(case, cache))]
            calls, expected = [case.call(implementation, given) for given in sets], case.expected(sets[0])
            kernel_cases.check(calls[0](), expected)
            for call in calls:
                call()
            graph, outputs, count = capture(calls, stream)
            times = [seconds / count for seconds in replay_times(graph)]
            kernel_cases.check_replay(graph.replay, outputs[0], expected)
            launches = len(device_work(calls[0]))  # last, so that the profiler slows nothing that is timed
    except kernel_cases.WrongResult as error:
        return [_wrong(case, implementation, error)]
    finally:
        torch.cuda.current_stream().wait_stream(stream)
    rows = _kernel_rows(case, implementation, times)
    if launches:  # the profiler may see nothing
        rows.append(Row("kernels", case.name, implementation, "launches", "", [launches]))
    return rows


def measure_on_cpu(case: kernel_cases.TimedCase, implementations: Sequence[str], copy_rate: float) -> list[Row]:
    """Check ``implementations`` of ``case``, then time them in turn. A wrong result is a row without values.

    A turn calls an implementation once on each of at most ``MAX_SETS`` input sets, which together are larger than the
    caches if the tensors are not small. The outputs of a turn are kept until the next one, so they change places too.
    ``copy_rate`` is that of a copy, in bytes/s. The rest is as in :func:`measure_kernel`.
    """
    device = torch.device("cpu")
    torch.manual_seed(0)
    count = min(kernel_cases.input_sets(case, COPY_BYTES["cpu"]), MAX_SETS)
    sets = [case.inputs(device) for _ in range(count)]
    expected = case.expected(sets[0])
    rows: list[Row] = []
    sides: dict[str, Callable[[], float]] = {}
    kept: dict[str, list[kernel_cases.Tensors]] = {}

    def turn(implementation: str, calls: list[kernel_cases.Call]) -> float:
        return wall(lambda: kept.update({implementation: [call() for call in calls]}), device) / len(calls)

    for implementation in implementations:
        calls = [case.call(implementation, given) for given in sets]
        try:
            kernel_cases.check(calls[0](), expected, factor=2 if implementation == "fused" else COMPILED_FACTOR)
        except kernel_cases.WrongResult as error:
            rows.append(_wrong(case, implementation, error))
        else:
            sides[implementation] = functools.partial(turn, implementation, calls)
    for implementation, times in interleave(sides, CPU_ROUNDS).items():
        rows += _kernel_rows(case, implementation, times, copy_rate)
    return rows


CPU_ROUNDS = 7
"""Turns of each implementation of an operator on a CPU."""

COMPILED_FACTOR = 10
"""Maximum error of torch.compile's code on a CPU, in units of eager's. 2.6 was measured."""

MAX_SETS = 64
"""The most input sets on a CPU. Small tensors would need thousands to exceed the caches."""


def _wrong(case: kernel_cases.TimedCase, implementation: str, error: kernel_cases.WrongResult) -> Row:
    return Row("kernels", case.name, implementation, f"wrong: {error}", "", [])


def _kernel_rows(
    case: kernel_cases.TimedCase, implementation: str, times: list[float], copy_rate: float | None = None
) -> list[Row]:
    """Return the rows for the seconds of one call."""
    rates = _rates(kernel_cases.bytes_moved(case.launches()), times, copy_rate)
    measured = [("in a loop", "us", [seconds * 1e6 for seconds in times]), *rates]
    return [Row("kernels", case.name, implementation, *metric) for metric in measured]


def _rates(size: int, times: list[float], copy_rate: float | None = None) -> list[tuple[str, str, list[float]]]:
    """Return the rates at which ``size`` bytes were moved: name, unit and values, in GB/s and relative to a copy."""
    rates = [size / seconds for seconds in times]
    metrics = [("our bytes", "GB/s", [rate / 1e9 for rate in rates])]
    if copy_rate:
        metrics.append(("of a copy's rate", "%", [100 * rate / copy_rate for rate in rates]))
    return metrics


def _require_cpu_kernels(*dtypes: torch.dtype) -> None:
    for dtype in dtypes:
        if reason := slow_on_cpu_reason(dtype):
            raise Skip(f"no compiled kernels for {short_name(dtype)}: {reason}")


def norms(bench: Bench) -> Rows:
    """Time all norms of a training step on a CPU, forward and backward, beside eager torch in turn.

    A turn runs every block's max-pool, norm and activation forward in order, then backward, as a step does.
    """
    if bench.cuda:
        raise Skip("a GPU is here; use --device cpu for the CPU")
    device = torch.device("cpu")
    _require_cpu_kernels(*NORM_DTYPES)
    for dtype in NORM_DTYPES:
        cases = {case: n for case, n in kernel_cases.norm_cases(bench.recipe, dtype).items() if case.section == "step"}
        for case in cases:
            kernel_cases.check_kernel(case, device)
        size = sum(n * kernel_cases.bytes_moved(case.launches()) for case, n in cases.items())
        settings: Any = dict(direction="backward", statistics=True)
        layers = [
            kernel_cases.Norm(
                block,
                bench.recipe.batch_size,
                bench.recipe.celu_alpha,
                dtype,
                activation=bench.recipe.activation,
                **settings,
            )
            for block in bench.recipe.blocks()
        ]
        inputs = [layer.inputs(device) for layer in layers]
        sides = {
            side: functools.partial(wall, functools.partial(_norms_of_a_step, side, layers, inputs), device)
            for side in ("fused", "eager")
        }
        times = interleave(sides, CPU_ROUNDS)
        name = f"{len(layers)} norms, forward + backward, {short_name(dtype)}"
        for side, values in times.items():
            yield Row("norms", name, side, "time", "ms", [seconds * 1e3 for seconds in values])
            shares = [100 * seconds / eager for seconds, eager in zip(values, times["eager"])]
            yield Row("norms", name, side, "of eager's time", "%", shares)
            for metric in _rates(size, values, bench.rate("copy")):
                yield Row("norms", name, side, *metric)


NORM_DTYPES = (torch.float32, torch.bfloat16)


def _norms_of_a_step(
    implementation: str, layers: Sequence[kernel_cases.Norm], inputs: Sequence[kernel_cases.Tensors]
) -> None:
    done = []
    for layer, given in zip(layers, inputs):
        learned = [given[name].detach().requires_grad_() for name in ("x", "weight", "bias")]
        y = layer.plain(implementation)(*learned, given["running_mean"], given["running_var"])
        done.append((y, learned, given["dy"]))
    while done:  # frees what a layer saved, as a step does
        y, learned, dy = done.pop()
        torch.autograd.grad(y, learned, dy)


def steps(bench: Bench) -> Rows:
    """Time a step of each backend, ``auto``'s choice twice. Compare it with the floors, and profile it."""
    sides = bench.backends | {f"{bench.preferred} again": bench.backends[bench.preferred]}
    times = time_steps(bench, sides, rounds=10 if bench.cuda else 3)
    flop = sum(cost.flop for cost in bench.costs)
    floors = roofline_times(bench.costs, bench.rate("copy"), bench.rate("matrix product"))
    for name, values in times.items():
        yield Row("steps", "step", name, "time", "ms/step", [seconds * 1e3 for seconds in values])
        yield Row("steps", "step", name, "rate", "TFLOP/s", [flop / seconds / 1e12 for seconds in values])
        for floor in ("arithmetic", "no_overlap"):
            yield Row("steps", "step", name, f"{floor} floor", "%", [100 * floors[floor] / statistics.median(values)])
    for name, backend in bench.backends.items():
        with tempfile.TemporaryDirectory() as folder:
            draws = draw_epoch(bench.n, device=bench.config.device, recipe=bench.recipe)
            table = profile(backend, draws, folder, steps=10 if bench.cuda else 2)
        for line in table.rows:
            yield Row("profile", line.line, name, "time", "ms/step", [line.milliseconds])
            yield Row("profile", line.line, name, "launches", "1/step", [line.launches])


def time_steps(bench: Bench, sides: dict[str, Backend], rounds: int) -> dict[str, list[float]]:
    """Return seconds per step. A turn is an epoch on a GPU and three steps on a CPU."""

    def turn(name: str, backend: Backend) -> float:
        draws = draw_epoch(bench.n, device=bench.config.device, recipe=backend.recipe)
        if not bench.cuda:
            draws = draws.slice(0, 3 * backend.recipe.batch_size)
        losses: list[torch.Tensor] = []
        seconds = wall(lambda: losses.extend(loss for loss, _ in backend.train_epoch(draws)), bench.config.device)
        if not torch.stack(losses).isfinite().all():
            raise kernel_cases.WrongResult(f"a loss of the {name} backend is not finite")
        return seconds / len(losses)

    return interleave({name: functools.partial(turn, name, side) for name, side in sides.items()}, rounds, bench.late)


def trainings(bench: Bench) -> Rows:
    """Time whole trainings in turn, and the reference's script by its own clock."""
    if not bench.cuda:
        raise Skip("a whole training takes more than an hour without a GPU")
    if not bench.real:
        raise Skip("accuracies need real images: use --dataset and --data-dir")
    measured: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for backend in bench.backends.values():  # a first epoch compiles everything and is not timed
        list(backend.train_epoch(draw_epoch(bench.n, device=bench.config.device, recipe=bench.recipe)))
    with tempfile.TemporaryDirectory() as folder:
        npz = Path(folder, "images.npz")
        bench.dataset.save(npz)
        for turn in range(10):
            start = time.perf_counter()
            for name, backend in bench.backends.items():
                weights, draws = make_generators(turn, bench.config.device)
                backend.reset(backend.new_model(weights))
                *_, last = train(backend, draws, draws, device_timer(bench.config.device))
                measured[name].append(vars(last))
            if bench.reference_script and turn < 3:
                measured["reference script"].append(_script_training(bench, npz, Path(folder, "metrics"), seed=turn))
            if bench.late(time.perf_counter() - start):
                break
    for name, rows in measured.items():
        case = f"{bench.recipe.epochs} epochs"
        yield Row("trainings", case, name, "time", "s", [row["train_seconds"] for row in rows])
        yield Row("trainings", case, name, "test accuracy", "%", [row["test_accuracy"] for row in rows])


def _script_training(bench: Bench, npz: Path, metrics: Path, seed: int) -> dict[str, float]:
    """Return the last row that the reference's script writes."""
    how = f"--device {bench.config.device} --dtype float16 --seed {seed} --epochs {bench.recipe.epochs}"
    child([str(bench.reference_script), "--data", str(npz), *how.split(), "--metrics", str(metrics)])
    return json.loads(metrics.read_text().splitlines()[-1])


def sweeps(bench: Bench) -> Rows:
    """Time a step of ``auto``'s choice at other batch sizes and widths."""
    sizes = (64, 128, 256, 512, 1024, 2048) if bench.cuda else (64, 512)
    recipes = {f"batch size {size}": dataclasses.replace(bench.recipe, batch_size=size) for size in sizes}
    for factor in (0.25, 0.5):
        widths = tuple(int(width * factor) for width in bench.recipe.widths)
        recipes[f"widths x {factor:g}"] = dataclasses.replace(bench.recipe, widths=widths)
    name = bench.preferred
    for case, recipe in recipes.items():
        if bench.n >= 3 * recipe.batch_size:
            sides = {name: bench.build(name, recipe)}
            values = time_steps(bench, sides, rounds=5 if bench.cuda else 3)[name]
            yield Row("sweeps", case, name, "time", "ms/step", [seconds * 1e3 for seconds in values])
            yield Row("sweeps", case, name, "rate", "images/s", [recipe.batch_size / seconds for seconds in values])


PARTS: dict[str, Callable[[Bench], Rows]] = {
    part.__name__: part for part in (ceilings, parity, cpu, steps, trainings, sweeps, norms, kernels)
}
