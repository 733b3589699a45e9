"""``python -m benchmarks launches``: the launches of the captured step and evaluation, in order and by kind.

They stand in the log of a stand-in for a GPU, where each launch between "C capture 1 begins" and "C capture 1 ends" is
a line "N kind stream name grid block". Without a log torch.profiler lists them, while this GPU replays the graphs.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from benchmarks.timing import device_work
from cifar_fast import CNN, InputError, Recipe, draw_epoch, load_dataset
from cifar_fast.backends.select import build_backend, resolve_backend
from cifar_fast.data.tensors import device_data

GRAPHS = ("step", "evaluation")  # in the order in which the fused backend captures them
KINDS = (  # the first pattern found in a name decides
    ("our Triton kernels", r"^[a-z_]+_kernel\b"),
    ("the compiler's Triton kernels", r"^triton_"),
    ("torch's own kernels", r"at::native"),
    ("copies and fills", r"^[mM]em(cpy|set)"),
    ("cuDNN's and cuBLAS's kernels", r""),
)


def logged(log: Path) -> list[list[str]]:
    """The launches of each capture in a stand-in's ``log``: name, and grid where it is known."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"{log}: {error.strerror}") from None
    captures: list[list[str]] = []
    for line in lines:
        if re.match(r"C capture \d+ begins", line):
            captures.append([])
        elif found := re.match(r"N \S+ \S+ (\S+)(?: (?!grid=0,)(grid=\S+))?", line):
            # Of a mangled name of torch's: the first of its parts that is a kernel's.
            name = re.sub(r"^_ZN2at6native.*?\d_?([A-Za-z][A-Za-z_]*[kK]ernel).*", r"at::native::\1", found[1])
            captures[-1].append(" ".join(filter(None, (name, found[2]))))
    if len(captures) != len(GRAPHS):
        raise InputError(f"{log}: {len(captures)} captures, not the two of a training by the fused backend")
    return captures


def profiled() -> list[list[str]]:
    """The launches of each graph of the recipe in float16 on this GPU: names, as the profiler gives them."""
    dataset = load_dataset("synthetic", log=None)
    plan = resolve_backend("fused", "cuda", "float16")
    backend, _ = build_backend(plan, Recipe(), device_data(dataset, plan.device))
    backend.reset(CNN(Recipe(), dataset.num_classes))
    training = backend.train_epoch(draw_epoch(len(dataset.train_images), device=backend.device, recipe=Recipe()))
    next(training)  # which also puts the epoch's draws in place
    graphs = [device_work(lambda: next(training)), device_work(backend.evaluate)]
    if not all(graphs):
        raise InputError("the profiler sees no kernel on the GPU; give the log of a stand-in")
    return graphs


def listing(graphs: list[list[str]]) -> str:
    """For each graph of :func:`logged` or :func:`profiled` every launch, then how many there are of each kind."""
    blocks = []
    for graph, launches in zip(GRAPHS, graphs):
        kinds = Counter(next(kind for kind, pattern in KINDS if re.search(pattern, name)) for name in launches)
        blocks += [f"{graph}: {len(launches)} launches", *(f"    {name}" for name in launches)]
        blocks += [f"  {count:3} {kind}" for kind, count in kinds.most_common()] + [""]
    return "\n".join(blocks[:-1])
