"""Settings of the process and the thread that would change a result: at torch's defaults meanwhile, then the caller's
again.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

DEFAULT_NUM_THREADS = torch.get_num_threads()
"""Those that the process had when this was imported. Sums over a batch are cut between threads, so that their last bits
depend on the number.
"""

_lock = threading.Lock()
_inside = 0
_process_wide = contextlib.ExitStack()


@contextlib.contextmanager
def torch_defaults(device: torch.device, threads: int = DEFAULT_NUM_THREADS) -> Iterator[None]:
    """Compute on ``device`` meanwhile as a fresh process would, whatever surrounds the call.

    Of the thread: the number of threads it computes with, autocast, gradients and inference mode, the default device,
    numpy's error state. Of the process:
    the default dtype, deterministic algorithms, anomaly detection, cuDNN's and oneDNN's switches, precision of float32
    products, warnings that are errors. The process has one such state for all its threads: the first that comes in sets
    it, and the last that leaves gives it back. Random numbers are no part of it: those of a run come from generators
    of its own.
    """
    global _inside
    with _lock:
        if _inside == 0:
            _enter_process_wide(_process_wide)
        _inside += 1
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(threads)
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            # Without its cache: the caller's autocast, even a disabled one, would keep ours past a step, with casts of
            # weights that have changed since.
            stack.enter_context(torch.autocast(device.type, enabled=False, cache_enabled=False))
            if torch.get_default_device().type != "cpu":
                stack.enter_context(torch.device("cpu"))
            stack.enter_context(np.errstate(all="ignore"))
            yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _process_wide.close()


def _enter_process_wide(stack: contextlib.ExitStack) -> None:
    stack.enter_context(warnings.catch_warnings())
    if any(action == "error" for action, *_ in warnings.filters):
        warnings.simplefilter("default")
    stack.enter_context(torch.autograd.set_detect_anomaly(False))
    if torch.are_deterministic_algorithms_enabled():  # asked first: the call imports the whole compiler
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        stack.callback(torch.use_deterministic_algorithms, True, warn_only=warn_only)
        torch.use_deterministic_algorithms(False)
    stack.callback(torch.set_default_dtype, torch.get_default_dtype())
    torch.set_default_dtype(torch.float32)
    for owner, name, value in (
        (torch.backends.cudnn, "enabled", True),
        (torch.backends.cudnn, "benchmark", False),
        (torch.backends.cudnn, "deterministic", False),
        (torch.backends.mkldnn, "enabled", True),
    ):
        stack.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)
    stack.enter_context(convolutions_in_tf32(True))
    stack.enter_context(_products_in_float32())


def convolutions_in_tf32(allowed: bool) -> contextlib.AbstractContextManager[None]:
    """Whether cuDNN may compute float32 convolutions in TF32 meanwhile; torch's default is that it may."""
    cudnn: Any = torch.backends.cudnn
    return _precision(
        lambda: cudnn.allow_tf32,
        lambda value: setattr(cudnn, "allow_tf32", value),
        allowed,
        (cudnn.conv, cudnn.rnn),
        ("tf32",) if allowed else ("ieee", "none"),
    )


def _products_in_float32() -> contextlib.AbstractContextManager[None]:
    """Matrix products of float32 in float32, and on a CPU convolutions too: torch's default."""
    cuda: Any = torch.backends.cuda
    mkldnn: Any = torch.backends.mkldnn
    return _precision(
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
        "highest",
        (cuda.matmul, mkldnn.matmul, mkldnn.conv),
        ("ieee", "none"),
    )


@contextlib.contextmanager
def _precision(
    get: Callable[[], Any], put: Callable[[Any], None], value: Any, owners: tuple[Any, ...], wanted: tuple[str, ...]
) -> Iterator[None]:
    """The ``fp32_precision`` of ``owners`` one of ``wanted`` meanwhile.

    ``get`` and ``put`` are the older setting of the same, which torch keeps beside it: where the two disagree, reading
    the older one is an error, in torch's own code too. So both are set, and only where something differs.
    """
    before = [owner.fp32_precision for owner in owners]
    if all(precision in wanted for precision in before):
        yield
        return
    try:
        older = get()
    except RuntimeError:  # the caller has used the newer setting alone
        older = value
    put(value)
    for owner, precision in zip(owners, before):
        if owner.fp32_precision not in wanted and precision not in wanted:
            owner.fp32_precision = wanted[0]
    try:
        yield
    finally:
        put(older)
        for owner, precision in zip(owners, before):
            owner.fp32_precision = precision
