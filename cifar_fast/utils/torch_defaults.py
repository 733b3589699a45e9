"""Torch's default settings for the duration of a call, so that the caller's settings do not change a result."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

DEFAULT_NUM_THREADS = torch.get_num_threads()
"""Torch's number of threads when this module was imported.

Threads split the sums over a batch, so the last bits of a result depend on their number.
"""

_lock = threading.Lock()
_active_calls = 0
_process_settings = contextlib.ExitStack()


@contextlib.contextmanager
def torch_defaults(device: torch.device, num_threads: int = DEFAULT_NUM_THREADS) -> Iterator[None]:
    """Compute on ``device`` inside the block with the settings of a fresh process, then restore the caller's.

    Settings of the thread: torch's number of threads, autocast, gradients, inference mode, the default device and
    NumPy's error state. Settings of the process: the default dtype, deterministic algorithms, anomaly detection,
    switches of cuDNN and oneDNN, the precision of float32 products, and warnings raised as errors. All threads share
    the settings of the process: the first active call sets them and the last one restores them. Random number
    generators are not touched, because each run has its own.
    """
    global _active_calls
    with _lock:
        if _active_calls == 0:
            _set_process_defaults(_process_settings)
        _active_calls += 1
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(num_threads)
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            # The cache must be off: inside a caller's autocast block, even a disabled one, it would keep casts of
            # weights beyond a step, when the weights have changed.
            stack.enter_context(torch.autocast(device.type, enabled=False, cache_enabled=False))
            if torch.get_default_device().type != "cpu":
                stack.enter_context(torch.device("cpu"))
            stack.enter_context(np.errstate(all="ignore"))
            yield
    finally:
        with _lock:
            _active_calls -= 1
            if _active_calls == 0:
                _process_settings.close()


def _set_process_defaults(stack: contextlib.ExitStack) -> None:
    """Set the defaults of the process; closing ``stack`` restores the caller's settings."""
    stack.enter_context(warnings.catch_warnings())
    if any(action == "error" for action, *_ in warnings.filters):
        warnings.simplefilter("default")
    stack.enter_context(torch.autograd.set_detect_anomaly(False))
    if torch.are_deterministic_algorithms_enabled():  # only then, because the setter imports the whole compiler
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        stack.callback(torch.use_deterministic_algorithms, True, warn_only=warn_only)
        torch.use_deterministic_algorithms(False)
    stack.callback(torch.set_default_dtype, torch.get_default_dtype())
    torch.set_default_dtype(torch.float32)
    for module, name, value in (
        (torch.backends.cudnn, "enabled", True),
        (torch.backends.cudnn, "benchmark", False),
        (torch.backends.cudnn, "deterministic", False),
        (torch.backends.mkldnn, "enabled", True),
    ):
        stack.callback(setattr, module, name, getattr(module, name))
        setattr(module, name, value)
    stack.enter_context(convolutions_in_tf32(True))
    cuda: Any = torch.backends.cuda
    mkldnn: Any = torch.backends.mkldnn
    stack.enter_context(
        _precision(
            torch.get_float32_matmul_precision,
            torch.set_float32_matmul_precision,
            "highest",
            (cuda.matmul, mkldnn.matmul, mkldnn.conv),  # oneDNN computes a CPU's convolutions too
            ("ieee", "none"),
        )
    )


def convolutions_in_tf32(allowed: bool) -> contextlib.AbstractContextManager[None]:
    """Allow or forbid TF32 in cuDNN's float32 convolutions inside the block. Torch's default allows it."""
    cudnn: Any = torch.backends.cudnn
    return _precision(
        lambda: cudnn.allow_tf32,
        lambda value: setattr(cudnn, "allow_tf32", value),
        allowed,
        (cudnn.conv, cudnn.rnn),
        ("tf32",) if allowed else ("ieee", "none"),
    )


@contextlib.contextmanager
def _precision(
    get_old: Callable[[], Any],
    set_old: Callable[[Any], None],
    value: Any,
    modules: tuple[Any, ...],
    accepted: tuple[str, ...],
) -> Iterator[None]:
    """Set the ``fp32_precision`` of ``modules`` to one of ``accepted`` inside the block, if any of them differs.

    Torch keeps an older setting beside it, read by ``get_old`` and set to ``value`` by ``set_old``. If the two
    disagree, reading the older one is an error, even in torch's own code. Therefore this function sets both.
    """
    before = [module.fp32_precision for module in modules]
    if all(precision in accepted for precision in before):
        yield
        return
    try:
        old = get_old()
    except RuntimeError:  # the caller has used only the newer setting
        old = value
    set_old(value)
    for module, precision in zip(modules, before):
        if module.fp32_precision not in accepted and precision not in accepted:
            module.fp32_precision = accepted[0]
    try:
        yield
    finally:
        set_old(old)
        for module, precision in zip(modules, before):
            module.fp32_precision = precision
