"""``python -m benchmarks.predict --bandwidth B``: what every kernel of the recipe must move, and the time it would take.

    python -m benchmarks.predict --bandwidth 4.3e12 [--name "NVIDIA H200"] [--dtype float16] [--json FILE]

A prediction, made before a measurement and to be held against it. Each kernel is taken to touch each
element that it needs once, in memory, at the bandwidth of a device-to-device copy; neither a cache nor
the cost of a launch comes into it. Of the augmentation's pictures all bytes count, though a crop and
the cutout leave some unread. The sizes are those of the planned launches' own tensors. The ideal of an
operator is what a single kernel would move that kept everything else on the chip: each tensor that
enters or leaves the operator, once.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks.launches import recipe_cases
from cifar_fast import Recipe
from cifar_fast.errors import InputError
from cifar_fast.flags import run_command
from cifar_fast.recipe import IMAGE_SIZE
from kernels.launch import Launch

Elements = Callable[[Launch, torch.Tensor], int]
"""How many elements of a tensor argument a launch touches."""


def _whole(launch: Launch, tensor: torch.Tensor) -> int:
    return tensor.numel()


def _batch(launch: Launch, tensor: torch.Tensor) -> int:
    """One entry of the data set, or of the epoch, a picture of the batch."""
    return launch.arguments["out"].shape[0] * tensor[0].numel()


def _mean_and_scale(launch: Launch, tensor: torch.Tensor) -> int:
    """Two of the three rows of the statistics: the variance itself is not needed."""
    return tensor.numel() // 3 * 2


def _if_pooled(launch: Launch, tensor: torch.Tensor) -> int:
    return tensor.numel() if launch.constants["POOL"] == 2 else 0


def _if_training(launch: Launch, tensor: torch.Tensor) -> int:
    return tensor.numel() if launch.constants["TRAINING"] else 0


def _all(names: str, how: Elements = _whole) -> dict[str, Elements]:
    return dict.fromkeys(names.split(), how)


_CHANNELS = {"statistics": _mean_and_scale} | _all("weight bias")
# For each kernel its operator, and which arguments it reads and which it writes.
KERNELS: dict[str, tuple[str, dict[str, Elements], dict[str, Elements]]] = {
    "augment_kernel": ("augment", _all("images indices crop flip cutout labels", _batch) | _all("table step"), _all("out out_labels")),
    "statistics_kernel": ("forward", _all("x"), _all("pooled argmax", _if_pooled) | _all("means squares firsts")),
    "merge_statistics_kernel": ("forward", _all("means squares firsts"), _all("statistics")),
    "apply_kernel": ("forward", _all("x") | _CHANNELS, _all("y")),
    "backward_sums_kernel": ("backward", _all("dy x") | _CHANNELS, _all("sums")),
    "merge_sums_kernel": ("backward", _all("sums"), _all("totals dweight dbias")),
    "backward_apply_kernel": (
        "backward",
        _all("dy x") | _all("argmax", _if_pooled) | _CHANNELS | _all("totals", _if_training),
        _all("dx"),
    ),
}
SCRATCH = {"means", "squares", "firsts", "sums", "totals"}  # between an operator's kernels: no part of its ideal


def touched(launch: Launch) -> tuple[dict[str, int], dict[str, int]]:
    """The bytes of each tensor argument that ``launch`` reads, and those that it writes."""
    _, *sides = KERNELS[launch.kernel.__name__]
    given = {name: value for name, value in launch.arguments.items() if isinstance(value, torch.Tensor)}
    reads, writes = (
        {name: elements(launch, given[name]) * given[name].element_size() for name, elements in side.items() if name in given}
        for side in sides
    )
    return reads, writes


def moved(launches: Iterable[Launch]) -> int:
    """Bytes that ``launches`` read and write together."""
    return sum(sum(side.values()) for launch in launches for side in touched(launch))


def ideal(launches: Sequence[Launch]) -> int:
    """Bytes of the operator that ``launches`` compute, each of its inputs and outputs touched once."""
    sizes: Counter[int] = Counter()
    for launch in launches:
        for side in touched(launch):
            for name in side.keys() - SCRATCH:
                key = id(launch.arguments[name])
                sizes[key] = max(sizes[key], side[name])
    return sum(sizes.values())


@dataclass(frozen=True)
class Kernel:
    """Predicted for one launch: bytes read and written, microseconds."""

    case: str
    kernel: str
    read: int
    written: int
    us: float


@dataclass(frozen=True)
class Operator:
    """Predicted for one operator at one shape: bytes moved and at least needed, microseconds of each; ``layers`` of a step have it."""

    case: str
    operator: str
    layers: int
    ideal: int
    moved: int
    ideal_us: float
    us: float

    @property
    def share(self) -> float:
        return self.ideal / self.moved


def layers(recipe: Recipe) -> Counter[str]:
    """How many of the recipe's convolution blocks norm at each shape, by the name of its case."""
    count: Counter[str] = Counter()
    size = IMAGE_SIZE
    for channels, pooled in zip(recipe.widths, recipe.pools):
        count[f"{channels}x{size}x{size}{', pool' if pooled else ''}"] += 1
        size //= 1 + pooled
    return count


def predict(recipe: Recipe, dtype: torch.dtype, bandwidth: float) -> tuple[list[Kernel], list[Operator]]:
    """The prediction for every case of the recipe, at ``bandwidth`` bytes a second."""
    kernels, operators, count = [], [], layers(recipe)
    for case in recipe_cases(recipe, dtype):
        parts: dict[str, list[Launch]] = {}
        for launch in case.launches():
            name = launch.kernel.__name__
            read, written = (sum(side.values()) for side in touched(launch))
            kernels.append(Kernel(case.name, name, read, written, (read + written) / bandwidth * 1e6))
            parts.setdefault(KERNELS[name][0], []).append(launch)
        for operator, launches in parts.items():
            least, all_bytes = ideal(launches), moved(launches)
            times = least / bandwidth * 1e6, all_bytes / bandwidth * 1e6
            operators.append(Operator(case.name, operator, count[case.name], least, all_bytes, *times))
    return kernels, operators


def step(operators: Iterable[Operator]) -> Operator:
    """The sum over a training step's norms, each layer counted."""
    rows = [row for row in operators if row.layers]
    sums = {name: sum(row.layers * getattr(row, name) for row in rows) for name in ("ideal", "moved", "ideal_us", "us")}
    return Operator("a step", "all", sum(row.layers for row in rows if row.operator == "forward"), **sums)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int) -> str:
    """An aligned Markdown table, the first ``text_columns`` columns to the left and the numbers after them to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    rule = ["-" * width if i < text_columns else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = [
        [cell.ljust(w) if i < text_columns else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))] for row in (header, *rows)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def report(kernels: list[Kernel], operators: list[Operator]) -> str:
    """Both tables; MB are 10^6 bytes."""
    header = ("shape", "kernel", "predicted MB read", "predicted MB written", "predicted us")
    first = [(row.case, row.kernel, f"{row.read / 1e6:.3f}", f"{row.written / 1e6:.3f}", f"{row.us:.2f}") for row in kernels]
    total = step(operators)
    second = [
        (
            row.case,
            row.operator,
            str(row.layers or "-"),
            f"{row.ideal / 1e6:.3f}",
            f"{row.moved / 1e6:.3f}",
            f"{row.share:.1%}",
            f"{row.ideal_us:.2f}",
            f"{row.us:.2f}",
        )
        for row in (*operators, total)
    ]
    columns = ("shape", "operator", "layers", "predicted ideal MB", "predicted MB", "predicted share", "predicted ideal us", "predicted us")
    return "\n\n".join(
        (
            "### Predicted, a kernel",
            markdown(header, first, 2),
            "### Predicted, an operator",
            markdown(columns, second, 2),
            f"### Predicted, the norms of a step\n\n{total.layers} layers, forward and backward: predicted {total.moved / 1e9:.3f} GB and "
            f"{total.us:.0f} us, against an ideal of {total.ideal / 1e9:.3f} GB and {total.ideal_us:.0f} us. "
            "One augmentation a step comes on top; evaluation is no part of it.",
        )
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def rate(text: str) -> float:
    """A flag's number of bytes, or FLOP, a second."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return value


def main(argv: list[str] | None = None) -> int:
    """Run the command with ``argv`` (default: the process's own); gives the exit code, 2 for bad input."""
    return run_command(lambda: _command(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m benchmarks.predict", description=__doc__.splitlines()[0])
    what = "bytes a second of a device-to-device copy measured on the GPU, reads and writes both counted"
    parser.add_argument("--bandwidth", type=rate, required=True, metavar="BYTES_PER_S", help=what)
    parser.add_argument("--name", default="a GPU", help="the GPU that has this bandwidth, for the heading")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    return parser


def _command(args: argparse.Namespace) -> int:
    recipe = Recipe()
    kernels, operators = predict(recipe, getattr(torch, args.dtype), args.bandwidth)
    if args.json:
        facts: dict[str, Any] = {"what": "a prediction; nothing was measured but the bandwidth", "gpu": args.name}
        facts |= {"bandwidth": args.bandwidth, "dtype": args.dtype, "batch_size": recipe.batch_size}
        facts |= {"kernels": [asdict(row) for row in kernels], "operators": [asdict(row) for row in operators]}
        try:
            args.json.write_text(json.dumps(facts | {"step": asdict(step(operators))}, indent=1) + "\n")
        except OSError as error:
            raise InputError(f"--json {args.json}: cannot be written ({error.strerror or error})") from None
    print(f"## Predicted for {args.name}, {args.dtype}, batch {recipe.batch_size}, at {args.bandwidth / 1e12:g} TB/s: no measurement\n")
    print(report(kernels, operators))
    return 0


if __name__ == "__main__":
    sys.exit(main())
