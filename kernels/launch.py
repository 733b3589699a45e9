"""How kernels are launched: descriptions that run here, or are compiled for a GPU that is not here.

A planner takes an operator's inputs and outputs, on the ``meta`` device too, and gives the launches that compute the
one from the other. Running them is one use; the benchmarks read the same descriptions to compile every kernel at every
shape of the recipe without a GPU, and to count the bytes that each moves.

Block sizes come from ``launch.json``, keyed by kernel and shape class, never from timing at run time: they set the
order of a reduction, and so the last bits of its result. Those checked in are predicted, by what the code compiled for
compute capability 9.0 issues and moves (``python -m benchmarks tune --predict``); no GPU has timed them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

TABLE = Path(__file__).with_name("launch.json")

FP_FUSION = False
"""No contraction of a * b + c: its default differs between Triton releases, and forward and backward must compute
alike.
"""

Table = dict[str, dict[str, dict[str, int]]]


@dataclass(frozen=True)
class Launch:
    """One launch of a ``@triton.jit`` function.

    ``reads`` and ``writes`` are its tensor arguments by name, None where the kernel does without one at this setting;
    ``scalars`` its numbers, ``constants`` what is compiled in. ``touched`` gives the elements of a tensor that are
    accessed, where those are not all.
    """

    kernel: Any
    grid: tuple[int, ...]
    reads: dict[str, torch.Tensor | None]
    writes: dict[str, torch.Tensor | None]
    scalars: dict[str, int | float]
    constants: dict[str, Any]
    num_warps: int = 4
    touched: dict[str, int] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Any]:
        """What the kernel is called with, besides its constants."""
        return self.reads | self.writes | self.scalars

    @property
    def options(self) -> dict[str, Any]:
        """The compiler's."""
        return {"num_warps": self.num_warps, "enable_fp_fusion": FP_FUSION}

    @property
    def bytes_read(self) -> int:
        return self._bytes(self.reads)

    @property
    def bytes_written(self) -> int:
        return self._bytes(self.writes)

    def _bytes(self, tensors: dict[str, torch.Tensor | None]) -> int:
        return sum(
            self.touched.get(name, tensor.numel()) * tensor.element_size()
            for name, tensor in tensors.items()
            if tensor is not None
        )


def run(
    launches: Iterable[Launch], device: torch.device, on_compiled: Callable[[Launch, Any], None] | None = None
) -> None:
    """Run ``launches`` in turn on ``device``; ``on_compiled`` is given each with what was compiled for it."""
    if device.type not in ("cuda", "meta") and not interpreted():
        raise RuntimeError(
            f"Triton kernels need tensors on a GPU, not on {device}; "
            "set TRITON_INTERPRET=1 before Python starts to run them here"
        )
    with torch.cuda.device(device) if device.type == "cuda" else _interpreting:
        for launch in launches:
            compiled = launch.kernel[launch.grid](**_given(launch))
            if on_compiled:
                on_compiled(launch, compiled)


def compile_only(launches: Iterable[Launch], device: torch.device) -> None:
    """Compile ``launches``, of tensors without memory too, for the GPU ``device``; to run them later takes no compiler
    then.
    """
    with torch.cuda.device(device):
        for launch in launches:
            launch.kernel.warmup(grid=launch.grid, **_given(launch))


def _given(launch: Launch) -> dict[str, Any]:
    return launch.arguments | launch.constants | launch.options


_interpreting = threading.RLock()
"""The interpreter puts its own functions into ``triton.language`` while it runs a kernel, for all threads."""


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on tensors of any device, as TRITON_INTERPRET=1 asks."""
    return triton.knobs.runtime.interpret


def parameters(kernel: str, shape_class: int | str) -> dict[str, int]:
    """The entry of the table for ``kernel`` at ``shape_class``, or the kernel's ``"*"`` entry."""
    entries = table()[kernel]
    return entries.get(str(shape_class), entries["*"])


def table() -> Table:
    """The launch parameters in use: the checked-in ones, unless :func:`using` gives others."""
    return _others[-1] if _others else _checked_in()


@contextlib.contextmanager
def using(other: Table) -> Iterator[None]:
    """BackendConfig launches by the table ``other`` meanwhile."""
    _others.append(other)
    try:
        yield
    finally:
        _others.pop()


_others: list[Table] = []


@functools.cache
def _checked_in() -> Table:
    return json.loads(TABLE.read_text())


def operator(
    name: str, outputs: Callable[..., Any], plan: Callable[..., list[Launch]], mutates: tuple[str, ...] = ()
) -> Any:
    """Register ``cifar_fast::name`` with torch, from the two functions that say all of it.

    ``outputs(*inputs)`` allocates the results, one tensor, a tuple or None; its signature is the operator's, and it
    stands in for the operator where torch only traces. ``plan(*inputs, *results)`` gives the launches that fill them,
    and change the inputs named in ``mutates``. The operator is opaque to torch.compile, which makes it work under
    Triton's interpreter too, and it wants its inputs in the layout in which they were traced.
    """

    def compute(*inputs: Any) -> Any:
        made = outputs(*inputs)
        results = (made,) if isinstance(made, torch.Tensor) else made or ()
        run(plan(*inputs, *results), inputs[0].device)
        return made

    schema = torch.library.infer_schema(outputs, mutates_args=mutates)
    tags = (torch.Tag.needs_exact_strides,)
    registered = torch.library.custom_op(f"cifar_fast::{name}", compute, mutates_args=mutates, schema=schema, tags=tags)
    registered.register_fake(outputs)
    registered.outputs, registered.plan = outputs, plan
    return registered


def empty_channels_last(
    n: int, channels: int, height: int, width: int, dtype: torch.dtype, device: Any
) -> torch.Tensor:
    """Uninitialized ``[N, C, H, W]``, NHWC in memory even where a size of 1 leaves strides open; not a view."""
    strides = (height * width * channels, 1, width * channels, channels)
    return torch.empty_strided((n, channels, height, width), strides, dtype=dtype, device=device)


def require(condition: bool, error: type[Exception], message: str) -> None:
    """Raise ``error`` with ``message`` unless ``condition``."""
    if not condition:
        raise error(message)


def require_tensor(
    name: str,
    tensor: torch.Tensor | None,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    like: tuple[str, torch.Tensor],
) -> None:
    """Raise unless ``tensor`` is contiguous, of one of ``dtypes``, of ``shape``, and on the device of ``like``, a named
    tensor.

    Raises TypeError for what is no tensor or of another dtype, ValueError for shape and layout, RuntimeError for the
    device.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, not {tensor!r}")
    wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    require(tensor.dtype in dtypes, TypeError, f"{name} must be {wanted}, not {tensor.dtype}")
    shown = list(tensor.shape)
    require(tuple(tensor.shape) == shape, ValueError, f"{name} must have the shape {list(shape)}, not {shown}")
    require(tensor.is_contiguous(), ValueError, f"{name} must be contiguous, not of strides {tensor.stride()}")
    other, its = like
    on = f"{name} must be on {its.device}, as {other} is, not on {tensor.device}"
    require(tensor.device == its.device, RuntimeError, on)
