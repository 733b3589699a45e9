"""Check that everything a training needs works on this machine, with a yes or a no for each part and the reason.

The check takes at most two minutes: it uses a small batch and the embedded textures. The time of a training is that of
a few steps, for the whole recipe on CIFAR-10. The kernels are compared with plain torch
(:mod:`cifar_fast.diagnostics.kernel_cases`). A step of the backend that ``auto`` selects here is compared with eager
(:mod:`cifar_fast.diagnostics.compare`). No part ends the check: an exception is a no, with its first cause.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cifar_fast.backends.base import Backend
from cifar_fast.backends.select import BackendConfig, build_backend
from cifar_fast.data.augment import draw_epoch
from cifar_fast.data.dataset import Dataset
from cifar_fast.data.synthetic import PATTERNS, textures
from cifar_fast.data.tensors import device_data
from cifar_fast.diagnostics.compare import Comparison, compare
from cifar_fast.diagnostics.roofline import copy_bandwidth, layer_costs, matmul_flops, roofline_times, wall
from cifar_fast.recipe import Recipe
from cifar_fast.training.time_to_go import EVALUATED
from cifar_fast.utils.device import device_guard, device_timer, environment, fused_unavailable_reason, short_name
from cifar_fast.utils.errors import InputError, first_cause, first_line, option
from cifar_fast.utils.files import write_json
from cifar_fast.utils.progress import LOGGER, duration
from cifar_fast.utils.seeds import make_generators
from cifar_fast.utils.torch_defaults import torch_defaults

BATCH_SIZE = {"cuda": 64, "cpu": 8}
TRAINING_BATCH_SIZE = {"cuda": 512, "cpu": 64}  # an image takes about as long on a CPU in a batch of 512
TRAIN_IMAGES, TEST_IMAGES = 50_000, 10_000  # of CIFAR-10
MIN_BATCH_SIZE = 8  # with fewer images, chance decides whether the losses are as accurate as eager's
STEPS = 4  # of an epoch
COMPARED_STEPS = 3  # the comparison uses the median over the steps for gradients
RUNS = (3, 5)  # number of warm-up runs and of timed runs, for a copy and for a matrix product
MAX_MATRIX_SIZE, LONG_PRODUCT = 8192, 0.02  # matrices grow up to this size, or until a product takes so many seconds


class Failed(Exception):
    """A result is not what it must be."""


class Skipped(Exception):
    """Something is missing here, and ``auto`` does without it."""


@dataclass(frozen=True)
class CheckResult:
    """The answer to one question. A no counts as a failure only if ``auto`` needs this part here."""

    name: str
    ok: bool
    text: str
    needed: bool = True

    def __str__(self) -> str:
        return f"{self.name:34} {'yes' if self.ok else 'no':4} {self.text}"


@dataclass
class Check:
    """The results of a check, each logged as soon as it is there.

    Args:
        config: the backends that ``auto`` tries here.
        reference: the backend that the step is compared with.
        recipe: the recipe, with the batch size of the check, and maybe a narrower network.
        training: the recipe whose training time is estimated.
    """

    config: BackendConfig
    reference: BackendConfig
    recipe: Recipe
    training: Recipe
    results: list[CheckResult] = field(default_factory=list)
    backend: Backend | None = None
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether everything that ``auto`` needs here works."""
        return all(result.ok or not result.needed for result in self.results)

    def add(self, name: str, call: Callable[[], str]) -> None:
        """Add the text that ``call`` returns as a yes, or its exception as a no."""
        try:
            result = CheckResult(name, True, call())
        except Exception as error:
            LOGGER.debug("%s", name, exc_info=error)
            cause = first_cause(error)
            ours = isinstance(cause, (Failed, Skipped, InputError))
            text = first_line(cause) if ours else f"{type(cause).__name__}: {first_line(cause)}"
            result = CheckResult(name, False, text, needed=not isinstance(cause, Skipped))
        self.results.append(result)
        LOGGER.info(str(result))

    def run(self) -> None:
        """Run every part in turn."""
        config, recipe, device = self.config, self.recipe, self.config.device
        size = recipe.batch_size
        dataset = Dataset("textures", "textures", *textures(STEPS * size, 0), *textures(size, 1), tuple(PATTERNS))
        with device_guard(device), torch_defaults(device):
            self.add("device", lambda: describe_device(device))
            self.add("NVIDIA driver", describe_driver)
            self.add("versions", lambda: describe_versions(device))
            if recipe.widths != self.training.widths:
                self.add("network", self.narrower)
            if reason := fused_unavailable_reason(device):
                self.add("kernels", lambda: skip(reason))
            else:
                from cifar_fast.diagnostics.kernel_cases import check_cases, check_kernel

                self.add("kernels compile", lambda: compile_kernels(recipe, config.dtype, device))
                for name, case in check_cases(recipe, config.dtype).items():
                    self.add(name, functools.partial(check_kernel, case, device))
            self.add("set-up", lambda: self.set_up(dataset))
            if backend := self.backend:
                times: list[float] = []
                self.add("memory", lambda: describe_memory(device, size))
                self.add("the same bits again", lambda: repeat(backend, times))
                self.add("time", lambda: compare_times(backend, times))
                self.add(f"{self.training.epochs} epochs", self.training_time)
                first = dataclasses.replace(config, backends=(backend.name,))
                self.add("against eager", lambda: against_eager(first, self.reference, recipe, dataset))
            self.add("auto selects", self.selected_backend)

    def set_up(self, dataset: Dataset) -> str:
        """Build the backend that ``auto`` selects here."""
        device = self.config.device
        clock = device_timer(device)
        start = clock()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.backend, self.failures = build_backend(self.config, self.recipe, device_data(dataset, device))
        if self.failures:
            raise Failed("; ".join(self.failures))
        return f"the {self.backend.name} backend, in {clock() - start:.0f} s"

    def narrower(self) -> str:
        """Describe the network of the check, which is not the recipe's."""
        shown, whole = (" ".join(map(str, widths)) for widths in (self.recipe.widths, self.training.widths))
        return f"widths {shown} in place of {whole}, for kernels, memory and time below: the interpreter is slow"

    def training_time(self) -> str:
        """Estimate the time of a whole training from that of a few steps."""
        assert self.backend
        device, size = self.config.device, TRAINING_BATCH_SIZE[self.config.device.type]
        recipe = dataclasses.replace(self.training, batch_size=size)
        dataset = Dataset("textures", "textures", *textures(STEPS * size, 0), *textures(2, 1), tuple(PATTERNS))
        config = dataclasses.replace(self.config, backends=(self.backend.name,))
        backend, failures = build_backend(config, recipe, device_data(dataset, device))
        if failures:
            raise Failed("; ".join(failures))
        run_epoch(backend)  # warms up
        per_image = run_epoch(backend)[0] / size
        steps = TRAIN_IMAGES // self.training.batch_size
        work = self.training.epochs * (steps * self.training.batch_size + EVALUATED * TEST_IMAGES)
        return (
            f"about {duration(per_image * work)} for the recipe on CIFAR-10 with its evaluations; "
            f"{1e3 * per_image * size:,.2f} ms/step of {size} images"
        )

    def selected_backend(self) -> str:
        """Describe the backend that ``auto`` selects here, and the reason."""
        if not self.backend:
            raise Failed(f"nothing: none of {', '.join(self.config.backends)} can be set up here")
        config = dataclasses.replace(self.config, backends=(self.backend.name,))
        return "; ".join([f"{config}: {self.config.reason}", *self.failures])

    def write(self, path: Path) -> None:
        """Write the results as JSON."""
        report = {
            "environment": environment(self.config.device),
            "batch_size": self.recipe.batch_size,
            "widths": list(self.recipe.widths),
            "dtype": short_name(self.config.dtype),
            "backend": self.backend.name if self.backend else None,
            "passed": self.passed,
            "results": [dataclasses.asdict(result) for result in self.results],
        }
        write_json(path, report, f"{option('json')} {path}")


def skip(reason: str) -> str:
    raise Skipped(f"{reason}; auto does without")


def describe_device(device: torch.device) -> str:
    """Return the name and the size of ``device``."""
    name = environment(device)["device_name"]
    if device.type == "cpu":
        return f"{name}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    capability = f"compute capability {properties.major}.{properties.minor}"
    return f"{name}, {capability}, {properties.total_memory / 1e9:.1f} GB"


def describe_driver() -> str:
    """Return the CUDA version of the driver."""
    try:
        torch.cuda.init()
        driver = ctypes.CDLL("libcuda.so.1")
    except (RuntimeError, AssertionError, OSError) as error:  # a torch without CUDA asserts, an AMD GPU has no library
        return skip(first_line(error).split(". ")[0])
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    return f"for CUDA {version.value // 1000}.{version.value % 1000 // 10}"


def describe_versions(device: torch.device) -> str:
    """Return the versions that the figures depend on."""
    facts = environment(device)
    names = {"torch": "torch", "triton": "Triton", "cuda": "CUDA", "cudnn": "cuDNN", "python": "Python"}
    return ", ".join(f"{shown} {facts[name]}" for name, shown in names.items() if facts[name])


def describe_memory(device: torch.device, size: int) -> str:
    """Return the peak of memory since the set-up began, on a CPU since the process began."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        peak, more = torch.cuda.max_memory_allocated(device), f", {free / 1e9:.1f} GB free"
    else:
        import resource

        peak, more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, ""
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"at most {peak / 1e9:.2f} of {total / 1e9:.1f} GB with {size} images a step{more}"


def compile_kernels(recipe: Recipe, dtype: torch.dtype, device: torch.device) -> str:
    """Compile every kernel at every shape of ``recipe``."""
    from cifar_fast.diagnostics.kernel_cases import Head, kernel_cases
    from cifar_fast.kernels.launch import compile_only, interpreted

    if interpreted():
        skip("there is no GPU to compile for; the checks below run the kernels in Triton's interpreter")
    if device.type == "cpu":
        skip("there is no GPU to compile for; the checks below run the operators of the CPU")
    cases = [*kernel_cases(recipe, dtype), Head(recipe, dtype)]
    launches = [launch for case in cases for launch in case.launches()]
    return f"{len(cases)} shapes, in {wall(lambda: compile_only(launches, device), device):.0f} s"


def run_epoch(backend: Backend) -> tuple[float, list[torch.Tensor]]:
    """Train an epoch from fresh weights with fixed seeds; return seconds per step, and the losses and the weights."""
    weights, generator = make_generators(0, backend.device)
    backend.reset(backend.new_model(weights))
    n = len(backend.data.train_images)
    draws = draw_epoch(n, device=backend.device, recipe=backend.recipe, generator=generator)
    losses: list[torch.Tensor] = []
    seconds = wall(lambda: losses.extend(loss for loss, _ in backend.train_epoch(draws)), backend.device)
    return seconds / STEPS, [tensor.clone() for tensor in (*losses, *backend.state_dict().values())]


def repeat(backend: Backend, times: list[float]) -> str:
    """Run an epoch at least twice and compare the bits.

    Append the seconds per step of all but the first to ``times``.
    """
    _, first = run_epoch(backend)
    while not times or (sum(times) * STEPS < 0.2 and len(times) < 50):
        seconds, again = run_epoch(backend)
        times.append(seconds)
        if not all(map(torch.equal, first, again)):
            text = f"losses or weights of {STEPS} steps differ from one time to the next"
            raise Failed(text) if backend.name == "fused" or backend.device.type == "cpu" else Skipped(text)
    return f"losses and weights of {STEPS} steps, {len(times) + 1} times"


def compare_times(backend: Backend, times: list[float]) -> str:
    """Return the time of a step and its roofline time, with rates that are measured here."""
    if not times:
        raise Failed("no step has finished")
    device, dtype, size = backend.device, backend.dtype, 512
    bandwidth = max(copy_bandwidth(device, RUNS))  # the fastest, because the roofline is a lower bound
    flops = max(matmul_flops(device, dtype, RUNS, size))
    while size < MAX_MATRIX_SIZE and 2 * size**3 / flops < LONG_PRODUCT:
        size *= 2
        flops = max(matmul_flops(device, dtype, RUNS, size))
    bound = roofline_times(layer_costs(backend.recipe, backend.data.num_classes, dtype), bandwidth, flops)["overlapped"]
    return (
        f"{statistics.median(times) * 1e3:,.2f} ms/step of {backend.recipe.batch_size} images; "
        f"floor {bound * 1e3:,.2f} ms, at {bandwidth / 1e9:,.0f} GB/s and {flops / 1e9:,.0f} GFLOP/s"
    )


def against_eager(config: BackendConfig, reference: BackendConfig, recipe: Recipe, dataset: Dataset) -> str:
    """Compare the backend of ``config`` with eager."""
    comparison = Comparison(config, reference)
    for step in compare(recipe, dataset, config, reference, steps=COMPARED_STEPS):
        comparison.add(step)
    *_, within = verdict = comparison.verdict().split("\n")
    if not comparison.within:
        raise Failed(f"{verdict[1]}; {within}")
    return within
