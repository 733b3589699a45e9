"""What is to run: what ``auto`` means on this machine, settled once and handed on as a value, and its set-up."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cifar_fast.backends.base import Backend
from cifar_fast.backends.eager import Compiled, Eager
from cifar_fast.data.dataset import Dataset
from cifar_fast.model import CustomModel, make_model
from cifar_fast.recipe import BACKENDS, DTYPES, IMAGE_CHANNELS, IMAGE_SIZE, MEMORY_FORMATS, Recipe
from cifar_fast.utils.device import check_caches, cpu_has_bfloat16, fused_unavailable_reason, resolve_device, short_name
from cifar_fast.utils.errors import InputError, first_cause, first_line, out_of_memory
from cifar_fast.utils.progress import LOGGER

SetUp = Callable[["BackendConfig", Recipe, Dataset], "tuple[Backend, list[str]]"]
"""Takes and gives what :func:`set_up` does."""


@dataclass(frozen=True)
class BackendConfig:
    """What is to run, and in ``reason`` why, where that was left to us.

    ``backends``: names of those to try to set up, in this order; more than one where ``auto`` may fall back.
    """

    backends: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format
    reason: str

    def __str__(self) -> str:
        """Backend, memory format and dtype, such as "fused, channels_last, float16"."""
        return f"{self.backends[0]}, {short_name(self.memory_format)}, {short_name(self.dtype)}"


def resolve_backend(
    backend: str = "auto", device: str = "auto", dtype: str = "auto", memory_format: str = "auto"
) -> BackendConfig:
    """Settle what ``auto`` means here; :class:`InputError` for what cannot work here."""
    for what, value, names in (
        ("backend", backend, BACKENDS),
        ("dtype", dtype, DTYPES),
        ("memory format", memory_format, MEMORY_FORMATS),
    ):
        if value not in ("auto", *names):
            raise InputError(f"unknown {what} {value!r}; there are auto, {', '.join(names)}")
    if backend == "fused" and memory_format == "contiguous_format":
        raise InputError("the fused backend's kernels need --memory-format channels_last; eager and compiled have both")
    check_caches()
    reasons = []

    where = resolve_device(device)
    if device == "auto":
        reasons.append("a GPU is here" if where.type == "cuda" else "no CUDA GPU is here")

    if dtype == "auto" and where.type == "cuda":
        dtype = "float16"
        reasons.append("float16 as the reference")
    elif dtype == "auto":
        dtype = "bfloat16" if cpu_has_bfloat16() else "float32"
        reasons.append(
            "this CPU computes in bfloat16" if dtype == "bfloat16" else "this CPU has no bfloat16 arithmetic"
        )

    if memory_format == "auto" and backend == "eager":
        memory_format = "contiguous_format"  # the reference script's
    elif memory_format == "auto":
        memory_format = "channels_last"
        if backend == "auto" and where.type == "cpu":
            reasons.append("channels_last was measured fastest on a CPU")

    backends: tuple[str, ...] = (backend,)
    unavailable = None if backend in ("eager", "compiled") else fused_unavailable_reason(where)
    if backend == "fused" and unavailable:
        raise InputError(f"the fused backend cannot run here ({unavailable}); use --backend compiled, eager or auto")
    if backend == "auto" and where.type == "cpu":
        backends = ("eager",)
        reasons.append("eager was measured faster than compiled on a CPU")
    elif backend == "auto" and memory_format == "contiguous_format":
        backends = ("compiled", "eager")
        reasons.append("the fused backend's kernels need channels_last, compiled instead")
    elif backend == "auto" and unavailable:
        backends = ("compiled", "eager")
        reasons.append(f"the fused backend cannot run here ({unavailable}), compiled instead")
    elif backend == "auto":
        backends = ("fused", "compiled", "eager")
        reasons.append("fused first, which has the least to do on the host")
    return BackendConfig(backends, where, getattr(torch, dtype), getattr(torch, memory_format), "; ".join(reasons))


def build_backend(
    plan: BackendConfig, recipe: Recipe, dataset: Dataset, custom_model: CustomModel | None = None
) -> tuple[Backend, list[str]]:
    """The first backend of ``plan`` that works here, set up for every run to come, and what was said of those that
    failed.

    The backend holds throw-away weights: call ``reset`` before training. Where a backend fails and there is another,
    the log gets a line; where there is none, :class:`InputError` is raised.
    """
    if custom_model:
        check_logits(custom_model, plan, recipe, dataset)
    failures: list[str] = []
    for name, following in zip(plan.backends, (*plan.backends[1:], None)):
        if name != "eager":
            LOGGER.info(
                f"setting up the {name} backend, which compiles: a minute or so, less when it has been done before"
            )
        try:
            backend = backend_class(name)(recipe, dataset, plan.device, plan.dtype, plan.memory_format, custom_model)
        except InputError:
            raise
        except Exception as error:  # compiler, driver, memory: each layer below raises its own
            cannot = f"take the model {custom_model.name}" if custom_model else "be set up"
            failure = f"the {name} backend cannot {cannot} here ({_why(error, recipe.batch_size)})"
            if following is None:
                raise InputError(f"{failure}; see --backend for others, --traceback for where it failed") from error
            LOGGER.debug("%s", failure, exc_info=error)
        else:
            for line in (*dataset.notes, *backend.notes):
                LOGGER.info(line)
            return backend, failures
        failures.append(f"{failure}, {following} instead")
        LOGGER.info(f"auto: {failures[-1]}")
        gc.collect()  # what failed holds its tensors in cycles, and the next backend needs the memory
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()
    raise AssertionError("a plan has at least one backend")


def _why(error: BaseException, batch_size: int) -> str:
    """The reason in a line. No variable of the caller's may hold the cause, whose frames hold the backend's memory."""
    cause = first_cause(error)
    if out_of_memory(cause):
        return f"out of memory at --batch-size {batch_size}"
    return f"{type(cause).__name__}: {first_line(cause)}"


def backend_class(name: str) -> Callable[..., Backend]:
    """The class of the backend ``name``; fused imports Triton, which not every machine has."""
    if name == "fused":
        from cifar_fast.backends.fused import Fused

        return Fused
    return Eager if name == "eager" else Compiled


def once(set_up: SetUp) -> SetUp:
    """``set_up`` for one recipe, which is set up at the first call."""
    made: list[tuple[Backend, list[str]]] = []

    def make(plan: BackendConfig, recipe: Recipe, dataset: Dataset) -> tuple[Backend, list[str]]:
        if not made:
            made.append(build_backend(plan, recipe, dataset))
        return made[0]

    return make


def keeping() -> SetUp:
    """A :func:`cifar_fast.backends.select.build_backend` that gives what it has set up before, for the same plan and recipe.

    What compiles and captures, minutes for each variant, is kept; on a GPU all go when less than half of its memory is
    free. Eager, which is set up in the time that its data take to the device, is not.
    """
    kept: dict[tuple[BackendConfig, Recipe], tuple[Backend, list[str]]] = {}

    def make(plan: BackendConfig, recipe: Recipe, dataset: Dataset) -> tuple[Backend, list[str]]:
        if (plan, recipe) in kept:
            return kept[plan, recipe]
        if kept and plan.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(plan.device)
            if free < total / 2:
                kept.clear()
                gc.collect()  # graphs and compiled code hold their tensors in cycles
                torch.cuda.empty_cache()
        made = build_backend(plan, recipe, dataset)
        if made[0].name != "eager":
            kept[plan, recipe] = made
        return made

    return make


@torch.no_grad()
def check_logits(model_maker: CustomModel, plan: BackendConfig, recipe: Recipe, dataset: Dataset) -> None:
    """Raise :class:`InputError` unless the model makes logits of images."""
    model = (
        make_model(recipe, dataset, plan.device, plan.dtype, model_maker).to(memory_format=plan.memory_format).eval()
    )
    shape = (2, IMAGE_CHANNELS, IMAGE_SIZE, IMAGE_SIZE)
    images = torch.zeros(shape, dtype=plan.dtype, device=plan.device).contiguous(memory_format=plan.memory_format)
    try:
        with torch.autocast(plan.device.type, torch.bfloat16, enabled=plan.dtype == torch.bfloat16):
            logits = model(images)
    except Exception as error:  # whatever a model of anybody's raises
        cause = first_cause(error)
        raise InputError(
            f"model {model_maker.name} cannot take images of shape {shape} in {plan.memory_format} "
            f"({type(cause).__name__}: {first_line(cause)})"
        ) from error
    is_tensor = isinstance(logits, torch.Tensor)
    wanted = (len(images), dataset.num_classes)
    if not is_tensor or tuple(logits.shape) != wanted or not logits.is_floating_point():
        came = f"{logits.dtype} of shape {tuple(logits.shape)}" if is_tensor else type(logits).__name__
        raise InputError(f"model {model_maker.name} must give logits of shape {wanted} for two images, not {came}")
