"""``python -m benchmarks.inductor``: what torch.compile's kernels for (max-pool,) batch norm and CELU issue and move,
beside ours. A prediction: counted in compiled code as by ``python -m benchmarks instructions``, nothing is timed.

It needs a GPU, or what torch takes for one, as Inductor compiles for what is there; us are of an H200. Bytes are each
tensor argument of a kernel once where it is loaded, once where it is stored, and once where it is added to by atomics,
which is the least that the kernel can move. Of Inductor's configurations of a kernel, among which it chooses by timing,
the one that issues least counts.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
import torch._inductor.config
from torch._inductor.runtime.triton_heuristics import CachingAutotuner, GridExpr

from benchmarks.instructions import CARDS, Counted, count_compiled, count_launch
from benchmarks.rows import markdown
from cifar_fast import Recipe
from cifar_fast.diagnostics.kernel_cases import Norm, norm_cases

CARD = CARDS["sm_90"]


def uses(source: str, name: str) -> set[str]:
    """What a kernel's ``source`` does with the tensor ``name``: load, store, atomic_add."""
    return set(re.findall(rf"tl\.(load|store|atomic_add)\({name}\b", source))


@contextmanager
def launches_counted(case: str) -> Iterator[list[Counted]]:
    """Fills the list with each kernel that Inductor launches meanwhile."""
    found: list[Counted] = []
    original = CachingAutotuner.run

    def run(self: Any, *args: Any, stream: Any, **settings: Any) -> Any:
        if not self.launchers:
            self.precompile()
        names = [name for name, kind in self.triton_meta["signature"].items() if kind != "constexpr"]
        given = dict(zip(names, args))
        tensors = {name: one for name, one in given.items() if isinstance(one, torch.Tensor)}
        moved = sum(one.nbytes * len(uses(self.fn.src, name)) for name, one in tensors.items())
        facts = dict(elements=max(one.numel() for one in tensors.values()), bytes=moved, kernel=self.fn.__name__)
        choices = [
            count_compiled(
                made.kernel,
                prod(GridExpr.from_meta(self.inductor_meta, made.config).eval_slow(given)),
                part="inductor",
                case=case,
                count=1,
                **facts,
            )
            for made in self.compile_results
        ]
        found.append(min(choices, key=lambda one: one.warp_instructions))
        return original(self, *args, stream=stream, **settings)

    CachingAutotuner.run = run
    try:
        yield found
    finally:
        CachingAutotuner.run = original


def inductor(case: Norm) -> list[Counted]:
    """What Inductor launches for ``case``."""
    call: Callable[[], object] = case.calls("compiled", case.inputs(1, torch.device("cuda")))[0]
    with torch.set_grad_enabled(case.direction != "inference"):
        call()  # compiles
        with launches_counted(case.direction) as found:
            call()
    return found


def times(launches: list[Counted]) -> tuple[float, float, float]:
    """us of bytes, of issue, and of the longer of both launch by launch."""
    found = [one.times(CARD) for one in launches]
    pairs = [(one["byte"] * 1e6, one["issue"] * 1e6) for one in found]
    return sum(a for a, _ in pairs), sum(b for _, b in pairs), sum(map(max, pairs))


def main() -> int:
    """Print a line for each of the recipe's norms and directions, then every kernel."""
    torch._inductor.config.use_static_triton_launcher = False  # which forgets the code
    torch._inductor.config.force_disable_caches = True
    recipe, dtype = Recipe(), torch.float16
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    lines, kernels, sums = [], [], {}
    for case, count in norm_cases(recipe, dtype).items():
        ours = [count_launch("ours", case.direction, 1, launch, arch) for launch in case.launches()]
        theirs = inductor(case)
        a, b = times(ours), times(theirs)
        for side, one in enumerate((a, b)):
            sums[case.part, side] = sums.get((case.part, side), 0) + count * one[2]
        sides = [[str(len(some)), *(f"{us:.1f}" for us in one)] for some, one in ((ours, a), (theirs, b))]
        lines.append((case.name, str(count), *sides[0], *sides[1], f"{b[2] / a[2]:.2f}"))
        for one in theirs:
            whole = one.per_element(sum(one.instructions.values()))
            facts = f"{one.bytes / 1e6:.1f}", f"{whole:.1f}", str(one.registers), f"{one.resident:.0%}"
            kernels.append((case.name, one.kernel, *facts, *(f"{us:.1f}" for us in times([one]))))
    figures = ("launches", "bytes us", "issue us", "longer us")
    print(f"predicted: counted in compiled code, no GPU ran\ntorch {torch.__version__}, {arch}, {dtype}; {CARD}\n")
    print(markdown(("case", "count", *figures, *(f"inductor: {one}" for one in figures), "inductor / ours"), lines))
    for part in ("step", "evaluation"):
        print(f"\n{part}: ours {sums[part, 0]:.1f} us, Inductor's {sums[part, 1]:.1f} us, of the longer of both")
    header = ("case", "kernel", "MB", "instructions per element", "registers", "warps", *figures[1:])
    print("\n" + markdown(header, kernels))
    return 0


if __name__ == "__main__":
    sys.exit(main())
