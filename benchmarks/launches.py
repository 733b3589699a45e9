"""``python -m benchmarks launches``: list the launches of the captured step and evaluation, in order and by kind.

Without a log, torch.profiler lists them while this GPU replays the graphs. A log of a GPU simulator has a line
"N kind stream name grid block" for each launch between "C capture 1 begins" and "C capture 1 ends".
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import torch

from benchmarks.timing import device_work
from cifar_fast import InputError, Recipe, draw_epoch, load_dataset
from cifar_fast.backends.select import build_backend, resolve_backend
from cifar_fast.data.tensors import device_data

GRAPHS = ("step", "evaluation")  # in the order in which the fused backend captures them
KINDS = (  # the first pattern that matches a name decides
    ("our Triton kernels", r"^[a-z_]+_kernel\b"),
    ("the compiler's Triton kernels", r"^triton_"),
    ("torch's own kernels", r"at::native"),
    ("copies and fills", r"^[mM]em(cpy|set)"),
    ("cuDNN's and cuBLAS's kernels", r""),
)


def logged(log: Path) -> list[list[str]]:
    """Return the launches of each capture in ``log``: the name, and the grid if it is known."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"{log}: {error.strerror}") from None
    captures: list[list[str]] = []
    for line in lines:
        if re.match(r"C capture \d+ begins", line):
            captures.append([])
        elif found := re.match(r"N \S+ \S+ (\S+)(?: (?!grid=0,)(grid=\S+))?", line):
            # A mangled name of torch has several parts; the first that ends in "kernel" is the kernel's.
            name = re.sub(r"^_ZN2at6native.*?\d_?([A-Za-z][A-Za-z_]*[kK]ernel).*", r"at::native::\1", found[1])
            captures[-1].append(" ".join(filter(None, (name, found[2]))))
    if len(captures) != len(GRAPHS):
        raise InputError(f"{log}: {len(captures)} captures, not the two of a training with the fused backend")
    return captures


def profiled() -> list[list[str]]:
    """Return the names of the launches of each graph of the recipe in float16 on this GPU."""
    config = resolve_backend("fused", "cuda", "float16")
    data = device_data(load_dataset("synthetic", log=None), config.device)
    backend, _ = build_backend(config, Recipe(), data)
    backend.reset(backend.new_model(torch.Generator()))
    training = backend.train_epoch(draw_epoch(len(data.train_images), device=backend.device, recipe=Recipe()))
    next(training)  # the first step also copies the draws of the epoch
    graphs = [device_work(lambda: next(training)), device_work(backend.evaluate)]
    if not all(graphs):
        raise InputError("the profiler sees no kernel on the GPU")
    return graphs


def listing(graphs: list[list[str]]) -> str:
    """Format every launch of each graph, and then the number of each kind."""
    blocks = []
    for graph, launches in zip(GRAPHS, graphs):
        kinds = Counter(next(kind for kind, pattern in KINDS if re.search(pattern, name)) for name in launches)
        blocks += [f"{graph}: {len(launches)} launches", *(f"    {name}" for name in launches)]
        blocks += [f"  {count:3} {kind}" for kind, count in kinds.most_common()] + [""]
    return "\n".join(blocks[:-1])
