"""``python -m benchmarks inductor``: predict the time of torch.compile's norm kernels and of ours.

The kernels compute batch norm and CELU, with or without a max-pool. Instructions and bytes are counted in compiled code
as by ``python -m benchmarks instructions``; nothing is timed. A GPU is needed, because Inductor compiles for the GPU
that it finds. The microseconds are for an H200. Each tensor argument counts once if it is loaded, once if it is stored,
and once if atomics add to it. The kernel cannot move fewer bytes. Inductor chooses among the configurations of a kernel
by timing; here the one with the fewest instructions counts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any
from unittest import mock

import torch
import torch._inductor.config
from torch._inductor.runtime.triton_heuristics import CachingAutotuner, GridExpr

from benchmarks.instructions import CARDS, Counted, count_compiled, count_launch, table
from benchmarks.rows import markdown
from cifar_fast import Recipe
from cifar_fast.diagnostics.kernel_cases import Norm, norm_cases

CARD = CARDS["sm_90"]


def uses(source: str, name: str) -> set[str]:
    """Return which of load, store and atomic_add the ``source`` of a kernel applies to the tensor ``name``."""
    return set(re.findall(rf"tl\.(load|store|atomic_add)\({name}\b", source))


@contextmanager
def count_inductor_launches(case: str) -> Iterator[list[Counted]]:
    """Append each kernel that Inductor launches in the block to the list."""
    launches: list[Counted] = []
    original: Any = CachingAutotuner.run

    def run(self: Any, *args: Any, stream: Any, **settings: Any) -> Any:
        if not self.launchers:
            self.precompile()
        names = [name for name, kind in self.triton_meta["signature"].items() if kind != "constexpr"]
        given = dict(zip(names, args))
        tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        choices = [
            count_compiled(
                made.kernel,
                programs=prod(GridExpr.from_meta(self.inductor_meta, made.config).eval_slow(given)),
                section="inductor",
                case=case,
                kernel=self.fn.__name__,
                count=1,
                elements=max(tensor.numel() for tensor in tensors.values()),
                bytes=sum(tensor.nbytes * len(uses(self.fn.src, name)) for name, tensor in tensors.items()),
            )
            for made in self.compile_results
        ]
        launches.append(min(choices, key=lambda choice: choice.warp_instructions))
        return original(self, *args, stream=stream, **settings)

    with mock.patch.object(CachingAutotuner, "run", run):
        yield launches


def count_inductor(case: Norm) -> list[Counted]:
    """Count what Inductor launches for ``case``."""
    call = case.call("compiled", case.inputs(torch.device("cuda")))
    with torch.set_grad_enabled(case.direction != "inference"):
        call()  # compiles
        with count_inductor_launches(case.name) as launches:
            call()
    return launches


def report() -> str:
    """Format a line for each norm and direction of the recipe, then every kernel of Inductor."""
    torch._inductor.config.use_static_triton_launcher = False  # it does not keep the code
    torch._inductor.config.force_disable_caches = True
    recipe, dtype = Recipe(), torch.float16
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    lines: list[tuple[str, ...]] = []
    sums: dict[str, float] = defaultdict(float)
    kernels: list[Counted] = []
    for case, count in norm_cases(recipe, dtype).items():
        ours = [count_launch("ours", case.name, 1, launch, arch=arch) for launch in case.launches()]
        theirs = count_inductor(case)
        kernels += theirs
        figures, longest = [], []
        for side, launches in (("ours", ours), ("Inductor", theirs)):
            pairs = [(times["byte"] * 1e6, times["issue"] * 1e6) for times in (one.times(CARD) for one in launches)]
            byte, issue, longer = (sum(us) for us in zip(*((*pair, max(pair)) for pair in pairs)))
            figures += [str(len(launches)), f"{byte:.1f}", f"{issue:.1f}", f"{longer:.1f}"]
            longest.append(longer)
            sums[f"{case.section}, {side}"] += count * longer
        lines.append((case.name, str(count), *figures, f"{longest[1] / longest[0]:.2f}"))
    names = ("launches", "bytes us", "issue us", "longer us")
    header = ("case", "count", *names, *(f"Inductor: {name}" for name in names), "Inductor / ours")
    totals = "\n".join(f"{name}: {us:.1f} us, the longer of both" for name, us in sums.items())
    facts = f"predicted: counted in compiled code, not timed\ntorch {torch.__version__}, {arch}, {dtype}; {CARD}"
    return "\n\n".join([facts, markdown(header, lines), totals, table(kernels, CARD)])
