"""``python -m cifar_fast.compare``: run two backends in lockstep, and tell how far apart each layer is.

    python -m cifar_fast.compare --backend fused --against eager --steps 4

Both take each step from the same weights, statistics and momentum (those of ``--against``, brought to
all sides before the step; with ``--drift`` only before the first), on the same draws and pictures. After
it the relative difference |a - b| / |b|, Euclidean over a tensor, is told of the loss, and in each layer of

* statistics: the running mean and variance of a norm, which are those of the layer's activations;
* gradients and weights.

How large may it be? As large as the error that eager itself makes in the first side's memory format, since torch sums
in other orders and types in each (on a CPU its batch norm adds up in double where the format is contiguous, and in
single in channels_last): beside each difference stands that of eager in the dtype from eager in the next higher
precision, and the error of both against eager in float64. The pictures are rounded to the dtype once, for all. A difference is within ``--tolerance`` times
eager's own, plus a quarter of the last bit for where eager happens to be exact, or past it.

Loss and statistics must be within it at every step. Of a gradient, and of the weight made with it, the
median over the steps must be: where two pixels of a max-pool are equal but for rounding, the sides may
pick either, and a narrow model's whole gradient changes. A wrong formula is wrong at every step. If one
is past the tolerance the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_fast.data import load_dataset
from cifar_fast.errors import InputError
from cifar_fast.files import replacing
from cifar_fast.flags import Parser, add_run_flags, recipe_of, run_command

if TYPE_CHECKING:  # torch takes seconds: not for --help or a mistyped flag
    import torch

    from cifar_fast.backends import Eager
    from cifar_fast.choose import Choice
    from cifar_fast.data import Dataset
    from cifar_fast.progress import Log
    from cifar_fast.recipe import Recipe

TOLERANCE = 3.0
"""Of two sides that err alike in different directions, the difference is 1.4 errors; of one that errs twice as much, 2.2."""


@dataclass(frozen=True)
class Row:
    """One tensor of one layer after one step; every figure a relative difference.

    ``difference``: between the two backends. ``yardstick``: between eager and eager in the next higher
    precision. ``error`` and ``eager_error``: of the first backend and of eager, against eager in float64.
    ``ratio``: of the difference to what eager's own allows; above the tolerance it is past it.
    """

    step: int
    layer: str
    quantity: str
    difference: float
    yardstick: float
    error: float
    eager_error: float
    ratio: float


def compare(
    recipe: Recipe,
    dataset: Dataset,
    first: Choice,
    second: Choice,
    *,
    seed: int = 0,
    steps: int = 4,
    drift: bool = False,
    log: Log | None = None,
) -> Iterator[list[Row]]:
    """Run the two choices in lockstep for ``steps`` steps; gives the rows of each step as it is done.

    Convolutions in float32 are IEEE's here, without TF32, which torch else takes on a GPU.
    """
    import torch

    from cifar_fast.augment import draw_epoch
    from cifar_fast.backends import Eager, on
    from cifar_fast.model import CNN
    from cifar_fast.progress import silent
    from cifar_fast.trainer import set_up

    device, dtype = first.device, first.dtype
    steps_per_epoch = dataset.steps_per_epoch(recipe.batch_size)
    dataset = dataclasses.replace(dataset, test_images=dataset.test_images[:2], test_labels=dataset.test_labels[:2])  # none is needed
    next_higher = higher_precision(dtype)
    gpu = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpu), on(device), _without_tf32():
        torch.manual_seed(seed)
        model = CNN(recipe, dataset.num_classes)
        ours, theirs = (set_up(choice, recipe, dataset, log or silent) for choice in (first, second))
        layout = first.memory_format
        same_layout = type(theirs) is Eager and theirs.memory_format == layout
        eager = theirs if same_layout else Eager(recipe, dataset, device, dtype, layout)
        higher = Eager(recipe, dataset, device, next_higher, layout)
        truth = higher if next_higher == torch.float64 else Eager(recipe, dataset, device, torch.float64, layout)
        for side in (higher, truth):
            side.train_images = eager.train_images.to(side.dtype)
        sides = list({id(side): side for side in (ours, theirs, eager, higher, truth)}.values())
        for side in sides:
            side.prepare(copy.deepcopy(model))
        followers = [side for side in sides if side is not theirs]

        for step in range(1, steps + 1):
            epoch, position = divmod(step - 1, steps_per_epoch)
            if position == 0:
                draws = draw_epoch(len(dataset.train_images), device=device, recipe=recipe)
                training = [side.train_epoch(epoch, draws) for side in sides]
            if step == 1 or not drift:
                for side in followers:
                    _follow(side, theirs)
            losses = [next(trained)[0] for trained in training]
            seen = {id(side): _tensors(side, loss) for side, loss in zip(sides, losses)}
            yield [
                _row(step, *key, *(seen[id(side)][key] for side in (ours, theirs, eager, higher, truth)), dtype) for key in seen[id(theirs)]
            ]


def higher_precision(dtype: torch.dtype) -> torch.dtype:
    """The next higher precision that eager can be run in."""
    import torch

    return torch.float64 if dtype == torch.float32 else torch.float32


def _follow(side: Eager, leader: Eager) -> None:
    """Give ``side`` the weights, statistics and momentum of ``leader``, in place and in its own types."""
    side.model.load_state_dict(leader.model.state_dict())
    for mine, its in zip(side.model.parameters(), leader.model.parameters()):
        if its in leader.optimizer.state and mine in side.optimizer.state:  # not before a first step
            side.optimizer.state[mine]["momentum_buffer"].copy_(leader.optimizer.state[its]["momentum_buffer"])


def _tensors(side: Eager, loss: torch.Tensor) -> dict[tuple[str, str], torch.Tensor]:
    """What is compared after a step, under layer and quantity."""
    found = {("loss", "of each picture"): loss}
    counts: dict[str, int] = {}
    for module in side.model.seq:
        parameters = dict(module.named_parameters())
        if not parameters:
            continue
        kind = "norm" if hasattr(module, "running_mean") else "conv" if hasattr(module, "kernel_size") else "linear"
        counts[kind] = counts.get(kind, 0) + 1
        layer = f"{kind} {counts[kind]}"
        if kind == "norm":
            found |= {(layer, f"statistics, {name}"): getattr(module, f"running_{name}") for name in ("mean", "var")}
        found |= {(layer, f"gradient of {name}"): parameter.grad for name, parameter in parameters.items()}
        found |= {(layer, name): parameter.detach() for name, parameter in parameters.items()}
    return {key: tensor.detach().double() for key, tensor in found.items()}


def _row(
    step: int,
    layer: str,
    quantity: str,
    ours: torch.Tensor,
    theirs: torch.Tensor,
    eager: torch.Tensor,
    higher: torch.Tensor,
    truth: torch.Tensor,
    dtype: torch.dtype,
) -> Row:
    import torch

    def relative(a: torch.Tensor, b: torch.Tensor) -> float:
        distance, size = float((a - b).norm()), float(b.norm())
        return distance / size if size else distance

    difference, yardstick = relative(ours, theirs), relative(eager, higher)
    excess = max(difference - torch.finfo(dtype).eps / 4, 0.0)  # stays what it is where that is no number
    ratio = excess / yardstick if yardstick else math.inf if excess else 0.0
    return Row(step, layer, quantity, difference, yardstick, relative(ours, truth), relative(eager, truth), ratio)


def past_tolerance(rows: list[Row], tolerance: float) -> list[tuple[str, str, float]]:
    """Layer, quantity and ratio of what makes the comparison fail."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row.layer, row.quantity), []).append(row.ratio)
    bad = []
    for (layer, quantity), ratios in found.items():
        continuous = layer == "loss" or quantity.startswith("statistics")
        ratio = max(ratios) if continuous else statistics.median(ratios)
        if not ratio <= tolerance or not all(map(math.isfinite, ratios)):
            bad.append((layer, quantity, ratio))
    return bad


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    import torch

    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def main(argv: list[str] | None = None) -> int:
    """Run the command with ``argv`` (default: the process's own); gives 0, 1 past the tolerance, 2 for bad input."""
    return run_command(lambda: _command(argv))


def _command(argv: list[str] | None) -> int:
    args = _parser().parse_args(argv)
    recipe = recipe_of(args)
    if args.steps < 1:
        raise InputError(f"--steps must be at least 1, not {args.steps}")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed must lie between 0 and 2^63, not {args.seed}")
    if not args.tolerance > 0:
        raise InputError(f"--tolerance must be above 0, not {args.tolerance:g}")

    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

    from cifar_fast.choose import choose
    from cifar_fast.results import environment

    first, second = (choose(backend, args.device, args.dtype) for backend in (args.backend, args.against))
    dataset = load_dataset(args.dataset, args.data_dir)
    names = [choice.backends[0].name for choice in (first, second)]
    dtype, higher = (str(kind).removeprefix("torch.") for kind in (first.dtype, higher_precision(first.dtype)))
    facts = environment(first.device)
    print(f"torch {facts['torch']}, {facts['device_name']}, {' against '.join(names)}, {dtype}; relative differences")
    if first.device.type == "cpu" and "fused" in names:
        print("no GPU: the kernels run in Triton's interpreter, slowly; narrow --widths and a small --batch-size help")

    rows: list[Row] = []
    how = dict(seed=args.seed, steps=args.steps, drift=args.drift, log=print)
    for step in compare(recipe, dataset, first, second, **how):
        rows += step
        print(f"\nstep {step[0].step:<31}{names[0]}-{names[1]:<8} eager-{higher:<9}{names[0]}-float64   eager-float64")
        for row in step:
            figures = "".join(f"{figure:16.1e}" for figure in (row.difference, row.yardstick, row.error, row.eager_error))
            print(f"{row.layer:8} {row.quantity:20}{figures}{'' if row.ratio <= args.tolerance else '   past the tolerance'}")
    bad = past_tolerance(rows, args.tolerance)
    if args.json:
        report = dict(environment=facts, recipe=dataclasses.asdict(recipe), dataset=dataset.facts())
        report |= dict(backend=names[0], against=names[1], dtype=dtype, higher_precision=higher, seed=args.seed, drift=args.drift)
        report |= dict(tolerance=args.tolerance, within=not bad, rows=[_finite(dataclasses.asdict(row)) for row in rows])
        _write(args.json, report)
    print()
    for layer, quantity, ratio in bad:
        print(f"{layer}, {quantity}: {ratio:.1f} times eager's own difference")
    several = len(rows) // args.steps
    print(f"{several - len(bad)} of {several} tensors are within {args.tolerance:g} times eager's own difference, over {args.steps} steps")
    return 1 if bad else 0


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no number for what is not finite: None."""
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}


def _write(path: Path, report: dict[str, Any]) -> None:
    try:
        with replacing(path) as draft:
            draft.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise InputError(f"--json {path}: cannot be written ({error.strerror or error}); choose another file") from None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m cifar_fast.compare", description="Run two backends in lockstep and tell how far apart each layer is.")
    add_run_flags(parser)
    parser.set_defaults(backend="fused")
    group = parser.add_argument_group("the comparison")
    group.add_argument("--against", choices=("eager", "compiled", "fused"), default="eager", help="the other backend (default: eager)")
    group.add_argument("--steps", type=int, default=4, metavar="K", help="steps of training (default: 4)")
    group.add_argument("--drift", action="store_true", help="let the sides go their own ways after the first step")
    group.add_argument(
        "--tolerance", type=float, default=TOLERANCE, metavar="X", help=f"allowed times eager's own difference (default: {TOLERANCE:g})"
    )
    group.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
