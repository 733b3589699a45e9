"""``cifar-fast check``: whether all that a training needs works on this machine, a line each, yes or no and why.

Small enough to take at most two minutes: the recipe's full widths, a small batch, the embedded textures. A kernel is
right when its error against plain torch in float64 is at most twice that of plain torch in the same dtype; what only
moves values must have the same bits. The step of the backend that ``auto`` takes here is held against eager's as the
comparison does (:mod:`cifar_fast.compare`). No line ends the command: what fails is a no, with the first cause.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cifar_fast.backends.base import Backend
from cifar_fast.backends.select import BackendConfig, build_backend
from cifar_fast.data.augment import draw_epoch
from cifar_fast.data.dataset import Dataset
from cifar_fast.data.synthetic import PATTERNS, textures
from cifar_fast.data.tensors import device_data
from cifar_fast.diagnostics.compare import Comparison, compare
from cifar_fast.diagnostics.kernel_cases import DIRECTIONS
from cifar_fast.diagnostics.roofline import copy_bandwidth, floors, matmul_flops, passes
from cifar_fast.model import CNN, loss_dtype, parameter_dtype
from cifar_fast.recipe import Block, Recipe
from cifar_fast.utils.device import device_guard, device_timer, environment, fused_unavailable_reason, short_name
from cifar_fast.utils.errors import InputError, first_cause, first_line
from cifar_fast.utils.files import atomic_write, os_error_as_input_error
from cifar_fast.utils.progress import LOGGER
from cifar_fast.utils.seeds import make_generators
from cifar_fast.utils.torch_defaults import torch_defaults

BATCH_SIZE = {"cuda": 64, "cpu": 8}
SMALLEST = 8  # batch; of fewer losses luck decides whether they are as near as eager's own
STEPS = 4  # of an epoch
COMPARED = 3  # steps, of whose gradients the median counts
RUNS = (3, 5)  # of a copy and of a matrix product: those that do not count, and those that do
LARGEST, LONG = 8192, 0.02  # the matrices grow up to this side, or until a product takes that many seconds


class Wrong(Exception):
    """A result that is not what it must be."""


class NotNeeded(Exception):
    """Something is not here, and ``auto`` does without it."""


@dataclass(frozen=True)
class Line:
    """One answer. A no of what ``auto`` does not need here is no fault."""

    name: str
    ok: bool
    text: str
    needed: bool = True

    def __str__(self) -> str:
        return f"{self.name:34} {'yes' if self.ok else 'no':4} {self.text}"


@dataclass
class Check:
    """The lines, each told to ``log`` when it is there. ``reference`` is the plan that the step is held against."""

    plan: BackendConfig
    reference: BackendConfig
    recipe: Recipe
    lines: list[Line] = field(default_factory=list)
    backend: Backend | None = None
    failures: list[str] = field(default_factory=list)

    @property
    def fine(self) -> bool:
        """Whether all that ``auto`` needs here works."""
        return all(line.ok or not line.needed for line in self.lines)

    def add(self, name: str, call: Callable[[], str]) -> None:
        """The line that ``call`` gives the text of, or the cause where it raises."""
        try:
            line = Line(name, True, call())
        except Exception as error:
            LOGGER.debug("%s", name, exc_info=error)
            cause = first_cause(error)
            ours = isinstance(cause, (Wrong, NotNeeded, InputError))
            text = first_line(cause) if ours else f"{type(cause).__name__}: {first_line(cause)}"
            line = Line(name, False, text, needed=not isinstance(cause, NotNeeded))
        self.lines.append(line)
        LOGGER.info(str(line))

    def run(self) -> None:
        """Every line in turn."""
        plan, recipe, device = self.plan, self.recipe, self.plan.device
        size = recipe.batch_size
        dataset = Dataset("textures", "textures", *textures(STEPS * size, 0), *textures(size, 1), tuple(PATTERNS))
        with device_guard(device), torch_defaults(device):
            self.add("device", lambda: describe_device(device))
            self.add("NVIDIA driver", describe_driver)
            self.add("versions", lambda: describe_versions(device))
            if reason := fused_unavailable_reason(device):
                self.add("kernels", lambda: not_here(reason))
            else:
                self.add("kernels compile", lambda: compile_kernels(recipe, plan.dtype, device))
                self.add("augmentation", lambda: check_augmentation(recipe, plan.dtype, device, dataset))
                for block in first_of_each_pool(recipe):
                    for direction in DIRECTIONS:
                        name = f"norm {block.name}, {direction}"
                        self.add(name, functools.partial(check_norm, block, direction, recipe, plan.dtype, device))
                self.add("loss", lambda: check_loss(recipe, plan.dtype, device))
                self.add("bookkeeping", lambda: check_record(recipe.batch_size, plan.dtype, device))
            self.add("set-up", lambda: self.set_up(dataset))
            if backend := self.backend:
                times: list[float] = []
                self.add("memory", lambda: describe_memory(device, recipe.batch_size))
                self.add("the same bits again", lambda: repeat(backend, dataset, times))
                self.add("time", lambda: compare_times(backend, dataset.num_classes, times))
                first = dataclasses.replace(plan, backends=(backend.name,))
                self.add("against eager", lambda: against_eager(first, self.reference, recipe, dataset))
            self.add("auto takes", self.taken)

    def set_up(self, dataset: Dataset) -> str:
        """Make the backend that ``auto`` takes here."""
        clock = device_timer(self.plan.device)
        start = clock()
        if self.plan.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.plan.device)
        self.backend, self.failures = build_backend(self.plan, self.recipe, device_data(dataset, self.plan.device))
        if self.failures:
            raise Wrong("; ".join(self.failures))
        return f"the {self.backend.name} backend, in {clock() - start:.0f} s"

    def taken(self) -> str:
        """What ``auto`` takes here, and why."""
        if not self.backend:
            raise Wrong(f"nothing: of {', '.join(self.plan.backends)} none can be set up here")
        plan = dataclasses.replace(self.plan, backends=(self.backend.name,))
        return "; ".join([f"{plan}: {self.plan.reason}", *self.failures])

    def write(self, path: Path) -> None:
        """The lines as JSON."""
        report = {
            "environment": environment(self.plan.device),
            "batch_size": self.recipe.batch_size,
            "dtype": short_name(self.plan.dtype),
            "backend": self.backend.name if self.backend else None,
            "fine": self.fine,
            "lines": [dataclasses.asdict(line) for line in self.lines],
        }
        with os_error_as_input_error(f"--json {path}", "choose another file"), atomic_write(path) as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n")


def not_here(reason: str) -> str:
    """Raise :class:`NotNeeded`: what a line is about is not here."""
    raise NotNeeded(f"{reason}; auto does without")


# -- the machine


def describe_device(device: torch.device) -> str:
    """Its name, and what there is of it."""
    name = environment(device)["device_name"]
    if device.type == "cpu":
        return f"{name}, {torch.get_num_threads()} threads"
    has = torch.cuda.get_device_properties(device)
    return f"{name}, compute capability {has.major}.{has.minor}, {has.total_memory / 1e9:.1f} GB"


def describe_driver() -> str:
    """Of which CUDA it is; why there is none, in torch's words."""
    try:
        torch.cuda.init()
        driver = ctypes.CDLL("libcuda.so.1")
    except (RuntimeError, AssertionError, OSError) as error:  # a torch without CUDA asserts, an AMD GPU has no library
        raise NotNeeded(f"{first_line(error).split('. ')[0]}; auto does without") from None
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    return f"for CUDA {version.value // 1000}.{version.value % 1000 // 10}"


def describe_versions(device: torch.device) -> str:
    """Of what the figures depend on."""
    facts = environment(device)
    names = {"torch": "torch", "triton": "Triton", "cuda": "CUDA", "cudnn": "cuDNN", "python": "Python"}
    return ", ".join(f"{shown} {facts[name]}" for name, shown in names.items() if facts[name])


def describe_memory(device: torch.device, size: int) -> str:
    """The most that was in use at a time since the last reset, on a CPU since the process began."""
    if device.type == "cuda":
        free, all_of_it = torch.cuda.mem_get_info(device)
        peak, more = torch.cuda.max_memory_allocated(device), f", {free / 1e9:.1f} GB free"
    else:
        import resource

        peak, more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, ""
        all_of_it = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{peak / 1e9:.2f} GB at the most with {size} images a step, of {all_of_it / 1e9:.1f} GB{more}"


# -- the kernels, whose modules need Triton, which not every machine has


def first_of_each_pool(recipe: Recipe) -> list[Block]:
    """The first block without a max-pool, and the first with one."""
    return list({block.pool: block for block in reversed(recipe.blocks())}.values())


def compile_kernels(recipe: Recipe, dtype: torch.dtype, device: torch.device) -> str:
    """Compile every kernel at every shape of the norms, as a step and an evaluation take them."""
    from cifar_fast.kernels.batch_norm_celu import example_launches
    from cifar_fast.kernels.launch import compile_only, interpreted

    if interpreted():
        raise NotNeeded("no GPU to compile for: below they run in Triton's interpreter; auto does without")
    launches = [
        launch
        for block in recipe.blocks()
        for direction in DIRECTIONS
        for launch in example_launches(
            (recipe.batch_size, block.c_out, block.size, block.size),
            pool=block.pool,
            dtype=dtype,
            parameter_dtype=parameter_dtype(dtype),
            alpha=recipe.celu_alpha,
            direction=direction,
        )
    ]
    clock = device_timer(device)
    start = clock()
    compile_only(launches, device)
    return f"those of {len(recipe.blocks())} norms, in {clock() - start:.0f} s"


def check_augmentation(recipe: Recipe, dtype: torch.dtype, device: torch.device, dataset: Dataset) -> str:
    """The second batch of an epoch, with its labels, against plain torch."""
    from cifar_fast.backends.fused import PADDED_CHANNELS
    from cifar_fast.kernels.augment import augment, augment_reference

    data = device_data(dataset, device)
    table = data.normalization.table(dtype)
    draws = draw_epoch(len(data.train_images), device=device, recipe=recipe, generator=make_generators(0, device)[1])
    size = recipe.batch_size
    how = dict(out_channels=PADDED_CHANNELS, padding=recipe.crop_padding, cutout_size=recipe.cutout_size)
    step = torch.ones(1, dtype=torch.int64, device=device)
    given: dict[str, Any] = dict(labels=data.train_labels, step=step, batch_size=size)
    images, labels = augment(data.train_images, draws.tensor, table, **given, **how)
    batch = draws.slice(size, 2 * size)
    expected = augment_reference(data.train_images, batch.tensor, table, **how)
    return same({"images": (images, expected), "labels": (labels, data.train_labels[batch.permutation])})


def check_record(size: int, dtype: torch.dtype, device: torch.device) -> str:
    """An epoch's steps and one more, against plain torch."""
    from cifar_fast.kernels.record_step import StepState, record, record_reference

    loss = torch.randn(STEPS + 1, size, device=device).to(loss_dtype(dtype))
    sides = []
    for function in (record, record_reference):
        state = StepState.initial(torch.linspace(1, 2, 2 * STEPS, device=device), STEPS, size, loss.dtype)
        for of_step in loss:
            function(of_step, of_step > 0, state)
        sides.append(state._asdict())
    return same({name: (sides[0][name], sides[1][name]) for name in sides[0]})


def same(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> str:
    """:class:`Wrong` for pairs that differ."""
    if wrong := [name for name, (ours, theirs) in pairs.items() if not torch.equal(ours, theirs)]:
        raise Wrong(f"{', '.join(wrong)}: not what plain torch gives")
    return "bit for bit plain torch's"


def check_norm(block: Block, direction: str, recipe: Recipe, dtype: torch.dtype, device: torch.device) -> str:
    """The norm of ``block`` on random numbers; the figures are those of the output or gradient that is furthest off."""
    from cifar_fast.kernels.batch_norm_celu import batch_norm_celu, batch_norm_celu_reference
    from cifar_fast.kernels.launch import interpreted

    random = torch.Generator().manual_seed(0)
    n, out = 2 if interpreted() else recipe.batch_size, block.out_size
    shapes = (n, block.c_out, block.size, block.size), (n, block.c_out, out, out), *[(block.c_out,)] * 4
    x, dy, weight, bias, mean, var = (torch.randn(shape, generator=random) for shape in shapes)
    x, dy = (tensor.to(device, dtype, memory_format=torch.channels_last) for tensor in (x, dy))
    per_channel = [tensor.to(device, parameter_dtype(dtype)) for tensor in (1 + weight / 4, bias, mean, 1 + var.abs())]

    def results(function: Callable[..., torch.Tensor], double: bool = False) -> list[torch.Tensor]:
        given = [tensor.to(torch.float64) if double else tensor.clone() for tensor in (x, *per_channel)]
        how = dict(training=direction != "inference", alpha=recipe.celu_alpha, pool=block.pool)
        for tensor in given[:3]:
            tensor.requires_grad_(direction == "backward")
        y = function(*given, **how)
        if direction == "backward":
            return list(torch.autograd.grad(y, given[:3], dy.to(y.dtype)))
        return [y, *given[3:]]

    exact = results(batch_norm_celu_reference, double=True)
    return judge(exact, results(batch_norm_celu), results(batch_norm_celu_reference))


def check_loss(recipe: Recipe, dtype: torch.dtype, device: torch.device) -> str:
    """Loss and gradient of random logits, and which of them are right."""
    from cifar_fast.kernels.cross_entropy import cross_entropy, cross_entropy_reference

    random, classes = torch.Generator().manual_seed(0), len(PATTERNS)
    x = (8 * torch.randn(recipe.batch_size, classes, generator=random)).to(device, dtype)
    labels = torch.randint(classes, (recipe.batch_size,), generator=random).to(device)
    how = dict(label_smoothing=recipe.label_smoothing, scale=recipe.output_scale)
    exact = cross_entropy_reference(x.double(), labels, **how)
    ours, eager = (function(x, labels, **how) for function in (cross_entropy, cross_entropy_reference))
    same({"answers": (ours[1], eager[1])})
    return judge(exact[::2], ours[::2], eager[::2])


def judge(exact: Sequence[torch.Tensor], ours: Sequence[torch.Tensor], eager: Sequence[torch.Tensor]) -> str:
    """The errors of the result that is furthest off; :class:`Wrong` where ours is more than twice as large."""
    errors = []
    for truth, own, other in zip(exact, ours, eager):
        error, its = (float((side.double() - truth).norm() / truth.norm()) for side in (own, other))
        ratio = error / (2 * its + torch.finfo(own.dtype).eps)  # the last bit, in all
        errors.append((math.inf if math.isnan(ratio) else ratio, error, its))
    ratio, error, its = max(errors)
    text = f"error {error:.1e} against float64, eager's own {its:.1e}"
    if ratio > 1:
        raise Wrong(f"{text}: more than twice as large")
    return text


# -- the step


def run_epoch(backend: Backend, dataset: Dataset) -> tuple[float, list[torch.Tensor]]:
    """Seconds a step of an epoch from fresh weights, always the same; its losses and the weights after it."""
    weights, generator = make_generators(0, backend.device)
    backend.reset(CNN(backend.recipe, dataset.num_classes, weights))
    draws = draw_epoch(len(dataset.train_images), device=backend.device, recipe=backend.recipe, generator=generator)
    clock = device_timer(backend.device)
    start = clock()
    losses = [loss for loss, _ in backend.train_epoch(draws)]
    seconds = (clock() - start) / STEPS
    return seconds, [tensor.clone() for tensor in (*losses, *backend.state_dict().values())]


def repeat(backend: Backend, dataset: Dataset, times: list[float]) -> str:
    """Run an epoch twice, or more where that is quick; ``times`` gets the seconds a step of all but the first."""
    _, first = run_epoch(backend, dataset)
    while not times or (sum(times) * STEPS < 0.2 and len(times) < 50):
        seconds, again = run_epoch(backend, dataset)
        times.append(seconds)
        if not all(map(torch.equal, first, again)):
            text = f"losses or weights of {STEPS} steps differ from one time to the next"
            raise Wrong(text) if backend.name == "fused" or backend.device.type == "cpu" else NotNeeded(text)
    return f"losses and weights of {STEPS} steps, {len(times) + 1} times"


def compare_times(backend: Backend, classes: int, times: list[float]) -> str:
    """The time of a step beside its floor, by rates that are measured in passing."""
    if not times:
        raise Wrong("no step was run to its end")
    device, dtype, size = backend.device, backend.dtype, 512
    bandwidth = max(copy_bandwidth(device, RUNS))  # the fastest: a floor is the least that it can take
    rate = max(matmul_flops(device, dtype, RUNS, size))
    while size < LARGEST and 2 * size**3 / rate < LONG:
        size *= 2
        rate = max(matmul_flops(device, dtype, RUNS, size))
    floor = floors(passes(backend.recipe, classes, dtype), bandwidth, rate)["overlapped"]
    step = statistics.median(times)
    return (
        f"{step * 1e3:,.2f} ms/step of {backend.recipe.batch_size} images; floor {floor * 1e3:,.2f} ms, "
        f"at {bandwidth / 1e9:,.0f} GB/s and {rate / 1e9:,.0f} GFLOP/s"
    )


def against_eager(plan: BackendConfig, reference: BackendConfig, recipe: Recipe, dataset: Dataset) -> str:
    """The comparison of ``plan``'s backend against eager."""
    comparison = Comparison(plan, reference)
    for step in compare(recipe, dataset, plan, reference, steps=COMPARED):
        comparison.add(step)
    *_, within = verdict = comparison.verdict().split("\n")
    if not comparison.within:
        raise Wrong(f"{verdict[1]}; {within}")
    return within
