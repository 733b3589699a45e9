"""Choice of the backend: what ``auto`` means on this machine, and the construction of the backend."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cifar_fast.backends.base import Backend, autocast
from cifar_fast.backends.eager import Compiled, Eager
from cifar_fast.data.tensors import DeviceData
from cifar_fast.model import CustomModel, build_model, parameter_dtype
from cifar_fast.recipe import BACKENDS, DTYPES, IMAGE_CHANNELS, IMAGE_SIZE, MEMORY_FORMATS, Recipe
from cifar_fast.utils.device import (
    check_caches,
    default_dtype,
    ensure_triton_cache,
    fused_unavailable_reason,
    resolve_device,
    short_name,
    slow_on_cpu_reason,
)
from cifar_fast.utils.errors import InputError, did_you_mean, first_cause, first_line, option, out_of_memory
from cifar_fast.utils.progress import LOGGER


@dataclass(frozen=True)
class BackendConfig:
    """Backends to try in order, with device, dtype and memory format. ``reason`` explains what ``auto`` chose."""

    backends: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format
    reason: str

    def __str__(self) -> str:
        """Return backend, memory format and dtype, such as "fused, channels_last, float16"."""
        return f"{self.backends[0]}, {short_name(self.memory_format)}, {short_name(self.dtype)}"


def resolve_backend(
    backend: str = "auto", device: str = "auto", dtype: str = "auto", memory_format: str = "auto"
) -> BackendConfig:
    """Decide what ``auto`` means on this machine.

    Raises:
        InputError: a name is unknown, or the choice cannot work on this machine.
    """
    for what, value, names in (
        ("backend", backend, BACKENDS),
        ("dtype", dtype, DTYPES),
        ("memory format", memory_format, MEMORY_FORMATS),
    ):
        if value not in ("auto", *names):
            hint = did_you_mean(str(value), names)
            raise InputError(f"unknown {what} {value!r}; there are auto, {', '.join(names)}{hint}")
    if backend == "fused" and memory_format == "contiguous_format":
        raise InputError(
            f"the fused backend's kernels need {option('memory_format')} channels_last; eager and compiled support both"
        )
    check_caches()
    reasons = []

    where = resolve_device(device)
    if where.type == "cuda":
        ensure_triton_cache()
    if device == "auto":
        reasons.append("a GPU is here" if where.type == "cuda" else "no CUDA GPU is here")

    if dtype == "auto":
        dtype, reason = default_dtype(where)
        reasons.append(reason)

    if memory_format == "auto" and backend == "eager":
        memory_format = "contiguous_format"  # the reference script's
    elif memory_format == "auto":
        memory_format = "channels_last"
        if backend == "auto" and where.type == "cpu":
            reasons.append("channels_last was measured fastest on a CPU")

    unavailable = None if backend in ("eager", "compiled") else fused_unavailable_reason(where)
    if backend == "fused" and unavailable:
        raise InputError(f"the fused backend cannot run here ({unavailable}); choose {option('backend')} eager or auto")
    backends: tuple[str, ...] = ("compiled", "eager")
    if backend != "auto":
        backends = (backend,)
    elif where.type == "cpu":
        slow = unavailable or slow_on_cpu_reason(getattr(torch, dtype))
        if memory_format == "contiguous_format":
            slow = "its kernels need channels_last"
        backends = ("eager",) if slow else ("fused", "eager")
        reasons.append(f"fused would be slow here: {slow}" if slow else "fused was measured fastest on a CPU")
    elif memory_format == "contiguous_format":
        reasons.append("the fused backend's kernels need channels_last, so compiled is used instead")
    elif unavailable:
        reasons.append(f"the fused backend cannot run here ({unavailable}), so compiled is used instead")
    else:
        backends = ("fused", *backends)
        reasons.append("fused is tried first, because it has the least work on the host")
    return BackendConfig(backends, where, getattr(torch, dtype), getattr(torch, memory_format), "; ".join(reasons))


def local_device(config: BackendConfig, world_size: int, local_rank: int, asked: str) -> BackendConfig:
    """Return ``config`` on the GPU of this rank, unless one process trains alone or ``asked`` names a device.

    More processes than GPUs on this machine are an InputError.
    """
    if world_size == 1 or config.device.type != "cuda" or asked not in ("auto", "cuda"):
        return config
    if local_rank >= (count := torch.cuda.device_count()):
        raise InputError(
            f"more processes than GPUs, {count} on this machine; start at most {count} processes, or choose "
            f"{option('device')} cpu"
        )
    return dataclasses.replace(config, device=torch.device("cuda", local_rank))


def build_backend(
    config: BackendConfig, recipe: Recipe, data: DeviceData, custom_model: CustomModel | None = None
) -> tuple[Backend, list[str]]:
    """Return the first backend of ``config`` that works here, and a line for each that failed before it.

    The backend's weights are arbitrary; call ``reset`` before training. Each failure is logged.

    Raises:
        InputError: no backend works, or the custom model does not make logits of images.
    """
    if custom_model:
        check_logits(custom_model, config, recipe, data.num_classes)
    failures: list[str] = []
    for name, following in zip(config.backends, (*config.backends[1:], None)):
        if name == "compiled" or (name == "fused" and config.device.type == "cuda"):
            LOGGER.info(f"setting up the {name} backend, which compiles: about a minute, less if it is cached")
        try:
            backend = backend_class(name)(recipe, data, config.device, config.dtype, config.memory_format, custom_model)
        except InputError:
            raise
        except Exception as error:  # compiler, driver and memory each raise their own
            cannot = f"take the model {custom_model.name}" if custom_model else "be set up"
            reason, cure = _reason(error, name, recipe.batch_size)
            failure = InputError(f"the {name} backend cannot {cannot} here ({reason})")
            if following is None:
                raise InputError(f"{failure.message}; {cure}") from error
            LOGGER.debug("%s", failure, exc_info=error)
        else:
            for line in backend.notes:
                LOGGER.info(line)
            return backend, failures
        failures.append(f"{failure}, so {following} is used instead")
        LOGGER.info(f"auto: {failures[-1]}")
        gc.collect()  # the failed backend holds its tensors in cycles, and the next one needs the memory
        if config.device.type == "cuda":
            torch.cuda.empty_cache()
    raise AssertionError("a config names at least one backend")


def _reason(error: BaseException, name: str, batch_size: int) -> tuple[str, str]:
    """Return the cause of ``error``, raised by the set-up of the backend ``name``, and what to do, each in one line.

    It is found here so that no variable of the caller holds the cause, whose frames hold the backend's memory.
    """
    cause = first_cause(error)
    other = f"choose another {option('backend')}"
    if not out_of_memory(cause):
        return f"{type(cause).__name__}: {first_line(cause)}", other
    if name == "eager":  # its set-up makes the network and no batch
        return "out of memory for the weights of the network", f"choose smaller {option('widths')}, or free memory"
    return (
        f"out of memory at {option('batch_size')} {batch_size}",
        f"choose a smaller one, or another {option('backend')}",
    )


def backend_class(name: str) -> type[Backend]:
    """Return the class of the backend ``name``. Only the fused backend imports the kernels."""
    if name == "fused":
        from cifar_fast.backends.fused import Fused

        return Fused
    return Eager if name == "eager" else Compiled


class BackendCache:
    """The backends that were built, for the next run of the same config and recipe.

    Backends that compile are kept, because a build takes minutes. Others, such as eager and fused on a CPU, are kept
    until another one is requested, so that the memory of a sweep does not grow with its variants. On a GPU all are
    dropped before a build if less than half of the GPU's memory is free.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[BackendConfig, Recipe, CustomModel | None], tuple[Backend, list[str]]] = {}

    def get(
        self,
        config: BackendConfig,
        recipe: Recipe,
        make_data: Callable[[], DeviceData],
        custom_model: CustomModel | None = None,
    ) -> tuple[Backend, list[str]]:
        """Return what :func:`build_backend` returned for these arguments; build if nothing is kept.

        ``make_data`` returns the data on the device. It is called only for a build.
        """
        key = config, recipe, custom_model
        self._kept = {other: kept for other, kept in self._kept.items() if other == key or kept[0].compiles}
        if key not in self._kept:
            self._make_room(config.device)
            self._kept[key] = build_backend(config, recipe, make_data(), custom_model)
        return self._kept[key]

    def _make_room(self, device: torch.device) -> None:
        if self._kept and device.type == "cuda":
            torch.cuda.empty_cache()  # otherwise the memory of dropped tensors does not count as free
            free, total = torch.cuda.mem_get_info(device)
            if free < total / 2:
                self._kept.clear()
                gc.collect()  # graphs and compiled code hold their tensors in cycles
                torch.cuda.empty_cache()


def check_logits(custom_model: CustomModel, config: BackendConfig, recipe: Recipe, num_classes: int) -> None:
    """Raise :class:`InputError` unless ``custom_model`` makes logits ``[B, num_classes]`` of images in both modes."""
    shape = (2, IMAGE_CHANNELS, IMAGE_SIZE, IMAGE_SIZE)
    expected = (shape[0], num_classes)
    model = build_model(recipe, num_classes, config.device, config.dtype, custom_model)

    @torch.no_grad()
    def outputs(training: bool, memory_format: torch.memory_format) -> Any:
        dtype = config.dtype if training else parameter_dtype(config.dtype)
        images = torch.zeros(shape, dtype=dtype, device=config.device).contiguous(memory_format=memory_format)
        with custom_model.preserve_rng(config.device), autocast(config.device, dtype):
            return model.to(memory_format=memory_format).train(training)(images)

    for training, mode in ((False, ""), (True, " in training")):
        try:
            logits = outputs(training, config.memory_format)
        except Exception as error:  # the caller's model may raise anything
            cause, cure = first_cause(error), ""
            if config.memory_format == torch.channels_last:
                with contextlib.suppress(Exception):
                    outputs(training, torch.contiguous_format)
                    cure = f'; it can with {option("memory_format")}="contiguous_format"'
            raise InputError(
                f"model {custom_model.name} cannot take images of shape {shape} in {config.memory_format}{mode} "
                f"({type(cause).__name__}: {first_line(cause)}){cure}"
            ) from error
        if not isinstance(logits, torch.Tensor):
            got = f"{type(logits).__name__}; wrap it in a module that returns the logits alone"
        elif tuple(logits.shape) != expected or not logits.is_floating_point():
            got = f"{logits.dtype} of shape {tuple(logits.shape)}; its last layer must give a number for each class"
        else:
            continue
        raise InputError(
            f"model {custom_model.name} must return logits of shape {expected} for two images{mode}, not {got}"
        )
