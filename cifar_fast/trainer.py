"""The training loop, and :func:`fit_plan`, which runs it as often as wanted."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from cifar_fast.also_test import accuracy, plain_logits, read_test_sets
from cifar_fast.augment import Seeds, draw_epoch
from cifar_fast.backends import Backend, channel_statistics, device_guard
from cifar_fast.checkpoint import Checkpoint
from cifar_fast.data import Dataset
from cifar_fast.environment import environment
from cifar_fast.errors import Diverged, InputError, out_of_memory
from cifar_fast.isolation import THREADS, isolated
from cifar_fast.model import CNN
from cifar_fast.output import Output
from cifar_fast.plan import Plan, SetUp, set_up, short_name
from cifar_fast.progress import Log, encodable, print_line, progress_bar, silent
from cifar_fast.recipe import Recipe
from cifar_fast.results import EpochRow, Result, Run


def fit_plan(
    recipe: Recipe,
    dataset: Dataset,
    plan: Plan,
    *,
    seeds: Seeds = Seeds(),  # noqa: B008  (frozen)
    runs: int = 1,
    only: int | None = None,
    output: Output | None = None,
    checkpoint_every: int = 1,
    also_test: Mapping[str, str | Path] | None = None,
    save_logits: bool = False,
    threads: int | None = None,
    log: Log | None = print_line,
    on_step: Callable[[], None] = lambda: None,
    make_backend: SetUp = set_up,
) -> Result:
    """As :func:`cifar_fast.fit`, with device, dtype and backend settled by :func:`cifar_fast.plan.resolve`; goes on
    from the checkpoint of ``output`` where it has one. ``on_step`` is called after each step; what it raises ends the
    training. ``make_backend`` may give one that was used before. ``only`` is the number of the one run of ``runs`` that
    is trained, to an ``output`` of its own.
    """
    log = encodable(log)
    seeds, runs = check(plan, seeds, runs, threads, checkpoint_every)
    test_sets = read_test_sets(also_test or {}, dataset.num_classes, recipe.classes)
    dataset = dataset.for_recipe(recipe)
    dataset.steps_per_epoch(recipe.batch_size)
    if output and output.checkpoint:
        output.checkpoint.refuse_other_data(output.name, dataset)
        threads = output.checkpoint.result.settings["threads"] if threads is None else threads
    threads = THREADS if threads is None else int(threads)

    with contextlib.ExitStack() as stack:
        if output:
            stack.enter_context(output).report = log
        standing = output.checkpoint if output else None
        stack.enter_context(device_guard(plan.device))
        stack.enter_context(isolated(plan.device, threads))
        stack.enter_context(naming_the_batch_size("training", recipe.batch_size))
        facts = environment(plan.device)
        data_facts = dataset.facts()
        clock = synchronized_clock(plan.device)

        log(f"torch {facts['torch']}, {facts['device_name']}, {facts['threads']} threads, backend {plan}")
        if plan.reason:
            log(f"auto: {plan.reason}")
        for line in standing.moved(facts) if standing else ():
            log(line)
        start = clock()
        backend, failures = make_backend(plan, recipe, dataset, log)
        normalization = channel_statistics(torch.from_numpy(dataset.train_images).to(plan.device))
        mean, std = (statistic.tolist() for statistic in normalization)
        own_model, weights_now = backend.own_model, backend.state_dict()
        result = Result(
            recipe=recipe,
            environment=facts,
            backend=backend.name,
            dtype=short_name(plan.dtype),
            memory_format=short_name(plan.memory_format),
            auto=standing.result.auto if standing else [line for line in (plan.reason, *failures) if line],
            dataset=data_facts,
            settings=dict(
                **vars(seeds),
                runs=runs,
                checkpoint_every=checkpoint_every,
                also_test={str(name): str(path) for name, path in (also_test or {}).items()},
                save_logits=save_logits,
                tensorboard=bool(output and output.tensorboard),
                threads=threads,
                data_source=str(dataset.source),
            ),
            rows=standing.result.rows if standing else [],
            runs=standing.result.runs if standing else [],
            logits=standing.result.logits if standing else [],
            mean=mean,
            std=std,
            state_dict={},
            model=own_model.name if own_model else None,
            parameters=sum(weights_now[name].numel() for name, _ in backend.model.named_parameters()),
            remarks=[*dataset.remarks, *backend.remarks],
        )
        standing = standing or Checkpoint(result)
        if output and not standing.state:
            output.save(Checkpoint(result))
        for run in range(len(result.runs), runs) if only is None else [only]:
            if runs > 1:
                log(f"run {run + 1} of {runs}, seed {seeds.seed + run}")
            own = seeds.of_run(run)
            weights, *drawing = own.generators(plan.device)
            order, augmentation = drawing
            drawing += own_model.generators(plan.device, own.seed) if own_model else []
            backend.reset((own_model or CNN)(recipe, dataset.num_classes, weights))
            after = standing.restore(backend, drawing)
            if after:
                log(f"going on after epoch {after.epoch}")
            setup_seconds = standing.setup_seconds + clock() - start
            standing = Checkpoint(result)  # of the runs to come
            n = len(dataset.train_images)
            for row in train(backend, n, augmentation, run, clock, log, order=order, after=after, on_step=on_step):
                result.rows.append(row)
                if output:
                    output.add(row)
                log(str(row))
                due = checkpoint_every and row.epoch % checkpoint_every == 0
                if output and (due or row.epoch == recipe.epochs):
                    states = [generator.get_state() for generator in drawing]
                    output.save(Checkpoint(result, setup_seconds, backend.training_state(), states))
            also = {}
            for test in test_sets:
                also[test.name] = accuracy(backend, dataset, normalization, test)
                log(f"also tested on {test.name}, {len(test.places)} images: {also[test.name]:.2f} %")
            if save_logits:
                logits = plain_logits(backend, dataset, normalization, dataset.test_images)
                result.logits.append(logits.to("cpu", torch.float16))
            last = result.rows[-1]
            seconds = last.train_seconds, setup_seconds, last.evaluation_seconds
            apart = own.init_seed, own.order_seed, own.augment_seed
            result.runs.append(Run(run, own.seed, *apart, last.test_accuracy, *seconds, also))
            start = clock()

        result.state_dict.update((name, tensor.detach().cpu()) for name, tensor in backend.state_dict().items())
        log(result.closing_line())
        if output:
            output.finish(result, dataset.test_labels)
    return result


@contextlib.contextmanager
def naming_the_batch_size(where: str, batch_size: int) -> Iterator[None]:
    """Raise :class:`InputError` with the batch size where memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise InputError(f"out of memory in {where} at --batch-size {batch_size}; try a smaller one") from error


def check(
    plan: Plan, seeds: Seeds, runs: int = 1, threads: int | None = None, checkpoint_every: int = 1
) -> tuple[Seeds, int]:
    """``seeds`` and ``runs`` as Python's integers; :class:`InputError` for what is wrong with a training whatever the
    data.
    """
    given = dataclasses.asdict(seeds)
    try:
        whole: Any = {name: None if seed is None else operator.index(seed) for name, seed in given.items()}
        seeds, runs = Seeds(**whole), operator.index(runs)
    except TypeError:
        shown = ", ".join(repr(value) for value in given.values() if value is not None)
        raise InputError(f"seed and runs must be whole numbers, not {shown} and {runs!r}") from None
    if threads is not None and threads < 1:
        raise InputError(f"threads must be at least 1, not {threads}")
    if not (isinstance(checkpoint_every, int) and checkpoint_every >= 0):
        raise InputError(f"checkpoint_every must be a whole number from 0, not {checkpoint_every}")
    if runs < 1:
        raise InputError(f"runs must be at least 1, not {runs}")
    for name, seed in dataclasses.asdict(seeds).items():
        if seed is not None and not 0 <= seed < 2**63 - runs:
            raise InputError(f"{name} must lie between 0 and 2^63, not {seed}")
    if plan.dtype == torch.float16 and plan.device.type == "cpu":
        raise InputError(
            "--dtype float16 needs a GPU (on a CPU torch has no fast float16 convolutions); use bfloat16 or float32"
        )
    return seeds, runs


def train(
    backend: Backend,
    n: int,
    draws: torch.Generator,
    run: int,
    clock: Callable[[], float],
    log: Log = silent,
    *,
    order: torch.Generator | None = None,
    after: EpochRow | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Iterator[EpochRow]:
    """Train all epochs of a run on the ``n`` training images of ``backend``, which was reset; gives a row as each ends.
    With ``after``, the row of the last epoch that ``backend`` has trained, those that follow it.

    ``draws`` is the generator of the epochs' draws, ``order`` that of their permutations where it is another; ``clock``
    gives seconds, read when the device is done, see :func:`synchronized_clock`; ``on_step`` is called after each step.
    """
    recipe, on_cpu = backend.recipe, backend.device.type == "cpu"
    steps = n // recipe.batch_size
    train_seconds, evaluation_seconds = (after.train_seconds, after.evaluation_seconds) if after else (0.0, 0.0)
    for epoch in range(after.epoch if after else 0, recipe.epochs):
        with progress_bar(steps, f"epoch {epoch + 1}/{recipe.epochs}", "step", log) as bar:
            start = clock()
            scores = []
            drawn = draw_epoch(n, device=backend.device, recipe=recipe, generator=draws, order=order)
            for scored in backend.train_epoch(drawn):
                scores.append(scored)
                bar.update()
                if on_cpu:  # elsewhere reading a loss would make the device wait
                    _check_finite(scored[0][None], epoch * steps + len(scores), steps)
                on_step()
            train_seconds += clock() - start
        losses, correct = (torch.stack(values) for values in zip(*scores))
        _check_finite(losses, epoch * steps + 1, steps)

        start = clock()
        test_correct = backend.evaluate()
        evaluation_seconds += clock() - start
        # 100 where right and 0 elsewhere, averaged: the reference script's arithmetic, to its last bit.
        accuracy, test_accuracy = ((right * 100).float().mean().item() for right in (correct, test_correct))
        loss = losses.float().mean().item()
        yield EpochRow(run, epoch + 1, loss, accuracy, test_accuracy, train_seconds, evaluation_seconds)


def _check_finite(losses: torch.Tensor, first_step: int, steps_per_epoch: int) -> None:
    """Raise :class:`Diverged` at the first of the steps, a row of ``losses`` each, with a loss that is not finite."""
    bad = ~losses.isfinite().all(dim=1)
    if bad.any():
        step = first_step + int(bad.int().argmax())
        epoch = (step - 1) // steps_per_epoch + 1
        raise Diverged(
            f"the loss is not finite at step {step} (epoch {epoch}); try smaller --lr-values, or --dtype float32"
        )


def synchronized_clock(device: torch.device) -> Callable[[], float]:
    """Seconds, read when the device has done what it was given."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock
