"""Kernel launches as data: run here, or compiled for GPUs that this machine does not have.

A planner returns the list of kernel launches for given input and output tensors, which may be meta tensors.
:func:`run` executes the list. The benchmarks read the same list to compile each kernel at each shape of the recipe, and
to count the bytes that it moves.

Block sizes come from ``launch.json``, keyed by kernel and shape class. They are never tuned at run time, because they
set the order of a reduction and so the last bits of its result. The checked-in sizes are predictions for compute
capability 9.0, made by ``tune`` of the benchmarks. No GPU has timed them yet.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .optional_triton import MISSING, tl, triton

TABLE = Path(__file__).with_name("launch.json")

FP_FUSION = False
"""No contraction of a * b + c, whatever Triton's default is: forward and backward must round alike."""

Table = dict[str, dict[str, dict[str, int]]]
"""Launch parameters by kernel and shape class."""


@dataclass(frozen=True)
class Launch:
    """One launch of a ``@triton.jit`` function.

    ``reads`` and ``writes`` are its tensor arguments by name, None for those that this launch does not use. ``scalars``
    are its numbers and ``constants`` its ``tl.constexpr`` arguments. ``accessed`` gives the number of elements that the
    kernel accesses in a tensor, if the kernel does not access all of them.
    """

    kernel: Any
    grid: tuple[int, ...]
    reads: dict[str, torch.Tensor | None]
    writes: dict[str, torch.Tensor | None]
    scalars: dict[str, int | float]
    constants: dict[str, Any]
    num_warps: int = 4
    accessed: dict[str, int] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Any]:
        """The kernel's arguments at run time: tensors and numbers."""
        return self.reads | self.writes | self.scalars

    @property
    def options(self) -> dict[str, Any]:
        """Options of the compiler."""
        return {"num_warps": self.num_warps, "enable_fp_fusion": FP_FUSION}

    @property
    def keywords(self) -> dict[str, Any]:
        """All keyword arguments of a call of the kernel."""
        return self.arguments | self.constants | self.options

    @property
    def bytes_read(self) -> int:
        return self._bytes(self.reads)

    @property
    def bytes_written(self) -> int:
        return self._bytes(self.writes)

    def _bytes(self, tensors: dict[str, torch.Tensor | None]) -> int:
        return sum(
            self.accessed.get(name, tensor.numel()) * tensor.element_size()
            for name, tensor in tensors.items()
            if tensor is not None
        )


_interpreter_lock = threading.RLock()
"""The interpreter replaces functions of ``triton.language`` for all threads while it runs a kernel."""


def run(
    launches: Iterable[Launch], device: torch.device, on_compiled: Callable[[Launch, Any], None] | None = None
) -> None:
    """Run ``launches`` in order on ``device``. After each, call ``on_compiled`` with it and its compiled kernel."""
    if MISSING:
        raise RuntimeError(f"the operators need Triton on {device} ({MISSING})")
    if device.type not in ("cuda", "meta") and not interpreted():
        raise RuntimeError(
            f"Triton kernels need tensors on a GPU, not on {device}; "
            "set TRITON_INTERPRET=1 before Python starts to run them here"
        )
    with torch.cuda.device(device) if device.type == "cuda" else _interpreter_lock:
        for launch in launches:
            compiled = launch.kernel[launch.grid](**launch.keywords)
            if on_compiled:
                on_compiled(launch, compiled)


def compile_only(launches: Iterable[Launch], device: torch.device) -> None:
    """Compile ``launches`` for the GPU ``device``, to run them later without a compiler. Meta tensors will do."""
    with torch.cuda.device(device):
        for launch in launches:
            launch.kernel.warmup(grid=launch.grid, **launch.keywords)


def interpreted() -> bool:
    """Return whether TRITON_INTERPRET=1 is set: Triton then interprets kernels, on tensors of any device."""
    return not MISSING and triton.knobs.runtime.interpret


@torch.compiler.assume_constant_result
def native(device: torch.device) -> bool:
    """Return whether the operators run as compiled C++ or plain torch on ``device``, without Triton."""
    return device.type == "cpu" and not interpreted()


INTERPRETED: tl.constexpr = tl.constexpr(interpreted())  # ``triton.jit`` decides at the same time, for good


@triton.jit
def convert(value, dtype: tl.constexpr):
    """Return ``value``, float32 or float64, in the floating-point ``dtype``, rounded to nearest even.

    In bfloat16 Triton's interpreter would cut the last bits off. The bits are rounded here, as in compiled code.
    """
    if dtype == tl.bfloat16 and value.dtype == tl.float64:
        value = value.to(tl.float32)  # Triton does not convert float64 to bfloat16 reliably
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = tl.where(value == value, rounded, 0x7FC0)  # the bits of a NaN must not be rounded
        return quiet.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


_tables: list[Table] = [json.loads(TABLE.read_text())]


def table() -> Table:
    """Return the launch parameters in use, from the innermost :func:`using` or from ``launch.json``."""
    return _tables[-1]


@contextlib.contextmanager
def using(other: Table) -> Iterator[None]:
    """Use the launch parameters ``other`` inside the context."""
    _tables.append(other)
    try:
        yield
    finally:
        _tables.pop()


def parameters(kernel: str, shape_class: int | str) -> dict[str, int]:
    """Return the launch parameters of ``kernel`` at ``shape_class``, or its ``"*"`` entry if there are none."""
    entries = table()[kernel]
    return entries.get(str(shape_class), entries["*"])


def operator(
    name: str,
    outputs: Callable[..., Any],
    plan: Callable[..., list[Launch]],
    on_cpu: Callable[..., None],
    mutates: tuple[str, ...] = (),
    check_values: Callable[..., None] | None = None,
) -> Any:
    """Register the torch operator ``cifar_fast::name``.

    torch.compile does not look into the operator, so it works under Triton's interpreter too. It passes the inputs in
    the memory layout that they had when it traced the code.

    Args:
        name: the operator's name.
        outputs: ``outputs(*inputs)`` allocates the results: a tensor, a tuple of tensors, or None. Its signature is the
            operator's signature. It is also the operator's implementation on fake tensors.
        plan: ``plan(*inputs, *results)`` returns the launches that fill the results.
        on_cpu: ``on_cpu(*inputs, *results)`` fills the results on a CPU, unless Triton's interpreter runs the launches.
        mutates: names of the inputs that the launches change. They must not share memory with another input.
        check_values: ``check_values(*inputs)`` raises an error for wrong values in tensors, on a CPU alone. A GPU would
            have to wait for them.
    """
    names = tuple(inspect.signature(outputs).parameters)

    def compute(*inputs: Any) -> Any:
        if mutates:
            require_separate(dict(zip(names, inputs)), mutates)
        if check_values and inputs[0].device.type == "cpu":
            check_values(*inputs)
        allocated = outputs(*inputs)
        results = (allocated,) if isinstance(allocated, torch.Tensor) else allocated or ()
        if native(inputs[0].device):
            on_cpu(*inputs, *results)
        else:
            run(plan(*inputs, *results), inputs[0].device)
        return allocated

    schema = torch.library.infer_schema(outputs, mutates_args=mutates)
    tags = (torch.Tag.needs_exact_strides,)
    registered = torch.library.custom_op(f"cifar_fast::{name}", compute, mutates_args=mutates, schema=schema, tags=tags)
    registered.register_fake(outputs)
    return registered


def empty_channels_last(
    n: int, channels: int, height: int, width: int, dtype: torch.dtype, device: Any
) -> torch.Tensor:
    """Return an uninitialized ``[N, C, H, W]`` tensor.

    It is not a view, and has channels_last strides even if a size is 1.
    """
    strides = (height * width * channels, 1, width * channels, channels)
    return torch.empty_strided((n, channels, height, width), strides, dtype=dtype, device=device)


def require(condition: bool, error: type[Exception], message: str) -> None:
    """Raise ``error`` with ``message`` unless ``condition``."""
    if not condition:
        raise error(message)


def require_is_tensor(name: str, value: Any, otherwise: str = "") -> None:
    """Raise a TypeError, which ends with ``otherwise``, unless ``value`` is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, not {shown(value)}{otherwise}")


def shown(value: Any) -> str:
    """Return a value of the wrong type for a message: numbers, texts and None as they are, others by their type."""
    return repr(value) if value is None or isinstance(value, (int, float, str)) else type(value).__name__


def require_number(name: str, value: Any, kind: type, low: float, high: float) -> None:
    """Check that ``value`` is an int, or any number if ``kind`` is float, between ``low`` and ``high``."""
    article = "an int" if kind is int else "a number"
    right = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    require(right, TypeError, f"{name} must be {article}, not {shown(value)}")
    require(low <= value <= high, ValueError, f"{name} must be between {low} and {high}, not {value}")


def require_separate(named: dict[str, Any], changed: tuple[str, ...]) -> None:
    """Check that no tensor in ``changed`` shares memory with another one in ``named``. All are dense."""
    spans = {
        name: (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size())
        for name, tensor in named.items()
        if isinstance(tensor, torch.Tensor) and tensor.numel() > 0 and tensor.device.type != "meta"
    }
    for name in changed:
        begin, end = spans.get(name, (0, 0))
        for other, (first, last) in spans.items():
            if first < end and begin < last and other != name:
                raise ValueError(f"{name} is changed, so it must not share memory with {other}; give each its own")


def require_tensor(
    name: str,
    tensor: torch.Tensor | None,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    like: tuple[str, torch.Tensor],
) -> None:
    """Check that ``tensor`` is contiguous, has ``shape`` and one of ``dtypes``, and is on the device of ``like``.

    ``like`` is a pair: the name of another tensor, and the tensor. A wrong dtype is a TypeError, a wrong shape or
    layout a ValueError, a wrong device a RuntimeError.
    """
    require_is_tensor(name, tensor)
    assert tensor is not None
    wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    require(tensor.dtype in dtypes, TypeError, f"{name} must be {wanted}, not {tensor.dtype}")
    message = f"{name} must have the shape {list(shape)}, not {list(tensor.shape)}"
    require(tuple(tensor.shape) == shape, ValueError, message)
    require(tensor.is_contiguous(), ValueError, f"{name} must be contiguous, but has the strides {tensor.stride()}")
    message = f"{name} must not be a view that negates another tensor; call its resolve_neg()"
    require(torch.compiler.is_compiling() or not tensor.is_neg(), ValueError, message)
    other, device = like[0], like[1].device
    message = f"{name} must be on {device} like {other}, not on {tensor.device}"
    require(tensor.device == device, RuntimeError, message)
