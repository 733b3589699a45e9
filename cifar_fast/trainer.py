"""The training loop, and :func:`fit`, which runs it as often as wanted."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cifar_fast.augment import draw_epoch
from cifar_fast.backends import Eager, keep_freed_memory, on
from cifar_fast.choose import Choice, choose
from cifar_fast.data import Dataset
from cifar_fast.errors import InputError
from cifar_fast.model import CNN
from cifar_fast.progress import Log, progress_bar, silent
from cifar_fast.recipe import Recipe
from cifar_fast.results import EpochRow, Output, Result, Run, environment


def fit(
    recipe: Recipe,
    dataset: Dataset,
    *,
    backend: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    memory_format: str = "auto",
    seed: int = 0,
    runs: int = 1,
    output: str | Path | None = None,
    overwrite: bool = False,
    log: Log | None = print,
) -> Result:
    """Train ``recipe`` on ``dataset`` from scratch, ``runs`` times.

    Run i (from 0) is seeded with ``seed + i`` and is the run that this seed gives alone. The random
    generators of the caller are left as they were. On a CPU the process keeps its freed memory, see
    :func:`cifar_fast.backends.keep_freed_memory`.

    Args:
        backend: auto, eager, compiled, fused.
        device: auto, cpu, cuda, cuda:N.
        dtype: auto, float16, bfloat16, float32.
        memory_format: contiguous_format (NCHW, the reference script's), channels_last; auto is the first for
            eager by name, the second for all others.
        output: folder for metrics.jsonl, summary.json, curves.png and model.pt; None writes nothing.
        overwrite: replace the results that ``output`` holds already.
        log: takes the lines that a person reads; None is silent, without a progress bar too.

    Raises:
        InputError: something given cannot work here, or the loss stopped being finite.
    """
    log = log or silent
    choice = check(
        backend=backend,
        device=device,
        dtype=dtype,
        memory_format=memory_format,
        seed=seed,
        runs=runs,
        output=output,
        overwrite=overwrite,
    )
    dataset.steps_per_epoch(recipe.batch_size)
    dtype, memory_format = (str(chosen).removeprefix("torch.") for chosen in (choice.dtype, choice.memory_format))
    facts = environment(choice.device)
    clock = synchronised_clock(choice.device)
    rows: list[EpochRow] = []
    done: list[Run] = []

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(Output(output, overwrite)) if output is not None else None
        gpu = [choice.device] if choice.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=gpu))
        stack.enter_context(on(choice.device))

        def on_row(row: EpochRow) -> None:
            rows.append(row)
            if folder:
                folder.add(row)
            log(str(row))

        machine = f"torch {facts['torch']}, {facts['device_name']}, {facts['threads']} threads"
        log(f"{machine}, backend {choice.backends[0].name}, {memory_format}, {dtype}")
        if choice.reason:
            log(f"auto: {choice.reason}")
        if choice.device.type == "cpu":
            keep_freed_memory()
        start = clock()
        trained = set_up(choice, recipe, dataset, log)
        for run in range(runs):
            if runs > 1:
                log(f"run {run + 1} of {runs}, seed {seed + run}")
            torch.manual_seed(seed + run)
            trained.prepare(CNN(recipe, dataset.num_classes))
            setup_seconds = clock() - start
            train_seconds, evaluation_seconds = train_once(trained, len(dataset.train_images), run, clock, on_row, log)
            done.append(Run(run, seed + run, rows[-1].test_accuracy, train_seconds, setup_seconds, evaluation_seconds))
            start = clock()

        result = Result(
            recipe=recipe,
            environment=facts,
            backend=trained.name,
            dtype=dtype,
            memory_format=memory_format,
            dataset=dataset.facts(),
            rows=rows,
            runs=done,
            state_dict={name: tensor.detach().cpu() for name, tensor in trained.state_dict().items()},
        )
        if folder:
            folder.finish(result)
    log(result.closing_line())
    return result


def check(
    *,
    backend: str,
    device: str,
    dtype: str,
    memory_format: str,
    seed: int,
    runs: int,
    output: str | Path | None,
    overwrite: bool,
) -> Choice:
    """What :func:`fit` makes of its arguments; :class:`InputError` for what is wrong with them whatever the data."""
    if runs < 1:
        raise InputError(f"runs must be at least 1, not {runs}")
    if not 0 <= seed < 2**63 - runs:
        raise InputError(f"seed must lie between 0 and 2^63, not {seed}")
    if output is not None:
        Output(output, overwrite)
    choice = choose(backend, device, dtype, memory_format)
    if choice.dtype == torch.float16 and choice.device.type == "cpu":
        raise InputError("--dtype float16 needs a GPU (on a CPU torch has no fast float16 convolutions); use bfloat16 or float32")
    return choice


def set_up(choice: Choice, recipe: Recipe, dataset: Dataset, log: Log) -> Eager:
    """The first backend of ``choice`` that works here, set up: compiled, and captured, for every run to come.

    It is left prepared with weights of no use. Where a backend fails and there is another, a line says
    so; where there is none, :class:`InputError` does.
    """
    for backend, following in zip(choice.backends, (*choice.backends[1:], None)):
        if backend is not Eager:
            log(f"setting up the {backend.name} backend, which compiles: a minute or so, less when it has been done before")
        try:
            ready = backend(recipe, dataset, choice.device, choice.dtype, choice.memory_format)
            ready.prepare(CNN(recipe, dataset.num_classes))
            return ready
        except InputError:
            raise
        except Exception as error:  # compiler, driver, memory: each layer below raises its own
            said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            trouble = f"the {backend.name} backend cannot be set up here ({type(error).__name__}: {said})"
            if following is None:
                raise InputError(f"{trouble}; see --backend for others") from error
            log(f"auto: {trouble}, {following.name} instead")
    raise AssertionError("a choice has at least one backend")


def train_once(
    backend: Eager, n: int, run: int, clock: Callable[[], float], on_row: Callable[[EpochRow], None], log: Log
) -> tuple[float, float]:
    """All epochs of one run; gives the seconds of training and those of evaluation."""
    recipe, on_cpu = backend.recipe, backend.device.type == "cpu"
    steps = n // recipe.batch_size
    train_seconds = evaluation_seconds = 0.0
    for epoch in range(recipe.epochs):
        with progress_bar(steps, f"epoch {epoch + 1}/{recipe.epochs}", "step", log) as bar:
            start = clock()
            scores = []
            for scored in backend.train_epoch(epoch, draw_epoch(n, device=backend.device, recipe=recipe)):
                scores.append(scored)
                bar.update()
                if on_cpu:  # elsewhere reading a loss would make the device wait
                    _check_finite(scored[0][None], epoch * steps + len(scores), steps)
            train_seconds += clock() - start
        losses, corrects = (torch.stack(values) for values in zip(*scores))
        _check_finite(losses, epoch * steps + 1, steps)

        start = clock()
        test_corrects = backend.evaluate()
        evaluation_seconds += clock() - start
        means = [values.float().mean().item() for values in (losses, corrects, test_corrects)]
        on_row(EpochRow(run, epoch + 1, *means, train_seconds))
    return train_seconds, evaluation_seconds


def _check_finite(losses: torch.Tensor, first_step: int, steps_per_epoch: int) -> None:
    """Raise :class:`InputError` at the first of the steps, a row of ``losses`` each, with a loss that is not finite."""
    bad = ~losses.isfinite().all(dim=1)
    if bad.any():
        step = first_step + int(bad.int().argmax())
        epoch = (step - 1) // steps_per_epoch + 1
        raise InputError(f"the loss is not finite at step {step} (epoch {epoch}); try smaller --lr-values, or --dtype float32")


def synchronised_clock(device: torch.device) -> Callable[[], float]:
    """Seconds, read when the device has done what it was given."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock
