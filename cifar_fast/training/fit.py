""":func:`fit`, which trains a recipe as often as wanted, and what several processes share of that: a part of the folder
for each run, and one result of all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cifar_fast.backends.base import Backend
from cifar_fast.backends.select import BackendCache, BackendConfig, resolve_backend
from cifar_fast.data.dataset import Dataset
from cifar_fast.data.eval_sets import read_eval_sets
from cifar_fast.data.tensors import DeviceData, device_data
from cifar_fast.model import CustomModel, Model
from cifar_fast.recipe import Recipe
from cifar_fast.training.checkpoint import Checkpoint, part_folder, read_parts, without_runs
from cifar_fast.training.evaluate import accuracy, plain_logits
from cifar_fast.training.metrics import Run
from cifar_fast.training.results import Result
from cifar_fast.training.run_folder import Output
from cifar_fast.training.trainer import train
from cifar_fast.utils.device import device_guard, device_timer, environment, short_name
from cifar_fast.utils.distributed import World
from cifar_fast.utils.errors import InputError, MissingRuns, out_of_memory
from cifar_fast.utils.files import CHECKPOINT, PARTS, atomic_write, remove_empty, writing
from cifar_fast.utils.progress import LOGGER, LogFn, lines_to, print_line
from cifar_fast.utils.seeds import Seeds
from cifar_fast.utils.torch_defaults import DEFAULT_NUM_THREADS, torch_defaults

MakeBackend = Callable[[BackendConfig, Recipe, Callable[[], DeviceData]], tuple[Backend, list[str]]]
"""Takes and returns the same as :meth:`BackendCache.get`."""


def fit(
    recipe: Recipe,
    dataset: Dataset,
    *,
    model: Model | None = None,
    backend: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    memory_format: str = "auto",
    seed: int = 0,
    init_seed: int | None = None,
    order_seed: int | None = None,
    augment_seed: int | None = None,
    runs: int = 1,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: str | Path | None = None,
    checkpoint_every: int = 1,
    also_test: Mapping[str, str | Path] | None = None,
    save_logits: bool = False,
    threads: int | None = None,
    log: LogFn | None = print_line,
) -> Result:
    """Train ``recipe`` on ``dataset`` from scratch, ``runs`` times.

    Run i (from 0) is seeded with ``seed + i`` and is the run that this seed gives alone, whatever surrounds the call:
    torch's settings that a result depends on are at their defaults meanwhile (:mod:`cifar_fast.isolation`), and random
    numbers come from generators of the run's own, so that those of the caller are left as they were. On a CPU a step
    takes 15 to 30 % less time after :func:`cifar_fast.utils.device.tune_malloc`, which the command calls. In workers
    of one's own, start processes with ``spawn``: torch's threads do not survive a fork. torchrun shares out the runs of
    the commands; this function trains all in each process.

    Args:
        model: in the place of the recipe's network, a module from images ``[B, 3, 32, 32]`` to logits ``[B, classes]``.
            Each run starts from its weights, in a copy; for fresh ones give what makes a module, ``MyNet`` or a
            function, called for each run under the run's seed. What the recipe says of the network, its output scale
            too, does not hold for it. What it draws while it trains, for dropout, goes with the run's seed, from
            torch's own generators, which are given back as they were. What a step changes must be in its state dict.
        backend: auto, eager, compiled, fused.
        device: auto, cpu, cuda, cuda:N.
        dtype: auto, float16, bfloat16, float32.
        memory_format: contiguous_format (NCHW, the reference script's), channels_last; auto is the first for
            eager by name, the second for all others.
        init_seed, order_seed, augment_seed: of the initial weights, the order and the augmentation alone, the same in
            each run; see :class:`cifar_fast.utils.seeds.Seeds`.
        output: folder for metrics.jsonl, summary.json, curves.png and model.pt; None writes nothing.
        overwrite: replace the results that ``output`` holds already.
        resume: in the place of ``output``, the folder of the same call that was stopped: goes on from its checkpoint
            and ends with the same bits. ``runs`` may have grown; ``auto`` is what it was. Of a training that has ended
            the result is read.
        checkpoint_every: epochs from a checkpoint in ``output`` to the next; each run leaves one when it ends, with 0
            that one alone.
        also_test: names and paths of other test sets, see :func:`cifar_fast.data.eval_sets.read_eval_sets`; their
            accuracies stand in each run.
        save_logits: keep each run's logits of the test images in ``Result.logits``, and in logits.npz of ``output``.
        threads: of the CPU; None takes those that torch had when this package was imported, whatever
            ``torch.set_num_threads`` said since, because the last bits depend on it.
        log: takes the lines that a person reads; None is silent, without a progress bar too.

    Raises:
        InputError: something given cannot work here.
        Diverged: the loss stopped being finite.

    A file of ``output`` that cannot be written takes nothing else with it: see ``Result.unwritten``.
    """
    if resume is not None and (output is not None or overwrite):
        raise InputError("resume stands in the place of output, without overwrite; give one of them")
    place = output if resume is None else resume
    folder = Output(place, overwrite, resume=resume is not None) if place is not None else None
    standing = folder.checkpoint if folder else None
    plan = (standing.plan if standing else resolve_backend)(backend, device, dtype, memory_format)
    seeds = Seeds(seed, init_seed, order_seed, augment_seed)
    own = None if model is None else CustomModel(model)
    asked: Any = (recipe, plan, seeds, runs, also_test, save_logits, own.name if own else None)
    if folder and standing and standing.nothing_left(folder.name, *asked):
        with lines_to(log):
            LOGGER.info(nothing_to_do(folder))
        return standing.result
    how: dict[str, Any] = dict(also_test=also_test, save_logits=save_logits, threads=threads)
    how |= dict(seeds=seeds, runs=runs, output=folder, checkpoint_every=checkpoint_every)
    with lines_to(log), own.preserve_rng(plan.device) if own else contextlib.nullcontext():
        make_backend = functools.partial(BackendCache().get, custom_model=own)
        result = fit_shared(World(), recipe, dataset, plan, make_backend=make_backend, **how)
    assert result is not None
    return result


def nothing_to_do(output: Output) -> str:
    """What is said where a training that has ended is told to go on; of its parts a kill may have left some."""
    shutil.rmtree(output.path / PARTS, ignore_errors=True)
    return f"nothing to do: all runs in {output.path} have ended; a higher --runs adds to them"


class Part(Output):
    """The folder of a run in that of its training: rows and ``checkpoint.pt``, which stays, with the run when it has
    ended. What another process has begun goes on.
    """

    def __init__(self, training: Path, run: int) -> None:
        path = part_folder(training, run)
        super().__init__(path, overwrite=True, resume=(path / CHECKPOINT).exists())
        self.training, self.run = training, run

    @property
    def events(self) -> Path:
        return self.training

    def finish(self, result: Result, test_labels: np.ndarray) -> None:
        """Leave the run in ``checkpoint.pt``, and of the last one the weights."""
        last = self.run == result.settings["runs"] - 1
        self.save(Checkpoint(result if last else dataclasses.replace(result, state_dict={})))


def fit_shared(
    world: World,
    recipe: Recipe,
    dataset: Dataset,
    plan: BackendConfig,
    *,
    output: Output | None,
    seeds: Seeds,
    runs: int,
    threads: int | None = None,
    make_backend: MakeBackend | None = None,
    **how: Any,
) -> Result | None:
    """As :func:`cifar_fast.training.fit.fit_plan`, the runs shared by the processes of ``world``: rank r takes every size-th
    from the r-th on. Goes on with what any number of processes has left. The result is the first process's, None in the
    others.
    """
    if world.size == 1 and not (output and output.resume and (output.path / PARTS).exists()):
        alone: dict[str, Any] = dict(output=output, seeds=seeds, runs=runs, threads=threads)
        return fit_plan(recipe, dataset, plan, make_backend=make_backend, **alone, **how)
    assert output is not None, "what is shared goes over the disk"
    make_backend = make_backend or BackendCache().get

    with contextlib.ExitStack() as stack:

        def begin() -> tuple[Path, int, list[int]]:
            used = dataset.for_recipe(recipe)
            used.steps_per_epoch(recipe.batch_size)
            read_eval_sets(how.get("also_test") or {}, dataset.num_classes, recipe.classes)
            stack.enter_context(output).report = LOGGER.info
            standing = output.checkpoint
            if standing:
                standing.refuse_other_data(output.name, used)
            else:
                output.delete_earlier()
            then = standing.result.settings["threads"] if standing else DEFAULT_NUM_THREADS
            return output.path, then if threads is None else threads, runs_left(output.path, standing, runs)

        folder, threads, left = world.from_first(begin)
        if world.size > 1:
            LOGGER.info(f"runs to do: {len(left)}, shared by {world.size} processes; what follows is the first one's")

        def train(run: int) -> None:
            part = Part(folder, run)
            part.tensorboard = output.tensorboard
            alike: dict[str, Any] = dict(seeds=seeds, runs=runs, threads=threads, make_backend=make_backend)
            fit_plan(recipe, dataset, plan, only=run, output=part, **alike, **how)

        world.share(left, train, how.get("on_step", lambda: None))
        return None if world.rank else gather(output, runs, dataset.for_recipe(recipe).test_labels)


def runs_left(folder: Path, standing: Checkpoint | None, runs: int) -> list[int]:
    """Which of the ``runs`` in ``folder`` have not ended, ``standing`` being what one process alone has left of the
    first of them; the one that it has under way is made a part.
    """
    ended = len(standing.result.runs) if standing else 0
    for run in range(ended):  # that a kill has left when all had ended
        shutil.rmtree(part_folder(folder, run), ignore_errors=True)
    remove_empty([folder / PARTS])
    parts = read_parts(folder, str(folder))
    if standing and standing.state and ended not in parts:
        rows = [row for row in standing.result.rows if row.run == ended]
        result = dataclasses.replace(without_runs(standing.result), rows=rows)
        with writing(str(folder)):
            part_folder(folder, ended).mkdir(parents=True, exist_ok=True)
            with atomic_write(part_folder(folder, ended) / CHECKPOINT) as draft:
                dataclasses.replace(standing, result=result).save(draft)
    return [run for run in range(ended, runs) if run not in parts or not parts[run].result.runs]


def gather(output: Output, runs: int, test_labels: np.ndarray) -> Result:
    """Write what a training of one process leaves to ``output``, out of its parts, which go; :class:`MissingRuns` where
    one of the ``runs`` is missing.
    """
    standing = output.checkpoint
    ended = len(standing.result.runs) if standing else 0
    parts = read_parts(output.path, output.name)
    for run in range(ended, runs):
        if run not in parts or not parts[run].result.runs:
            raise MissingRuns(
                f"{output.path}: run {run + 1} is not there, it could not be written; start again, train with --resume"
            )
    results = [parts[run].result for run in range(ended, runs)]
    before = standing.result if standing else without_runs(results[0])
    for run, one in enumerate(results, ended):
        if (one.backend, one.dtype, one.memory_format) != (before.backend, before.dtype, before.memory_format):
            raise MissingRuns(
                f"{output.path}: run {run + 1} was trained by {one.backend}, and others by {before.backend}; name a "
                "--backend, and start again with --overwrite"
            )
    epochs = before.recipe.epochs
    result = dataclasses.replace(
        results[-1],
        environment=results[0].environment,
        rows=[*before.rows[: ended * epochs], *(row for one in results for row in one.rows)],
        runs=[*before.runs, *(run for one in results for run in one.runs)],
        logits=[*before.logits, *(logits for one in results for logits in one.logits)],
    )
    output.save(standing or Checkpoint(before))  # to go on from, if this is killed halfway
    output.set_rows(result.rows)
    LOGGER.info(result.summary_line())
    output.finish(result, test_labels)
    if not (output.path / CHECKPOINT).exists():
        shutil.rmtree(output.path / PARTS, ignore_errors=True)
    return result


def fit_plan(
    recipe: Recipe,
    dataset: Dataset,
    plan: BackendConfig,
    *,
    seeds: Seeds = Seeds(),  # noqa: B008  (frozen)
    runs: int = 1,
    only: int | None = None,
    output: Output | None = None,
    checkpoint_every: int = 1,
    also_test: Mapping[str, str | Path] | None = None,
    save_logits: bool = False,
    threads: int | None = None,
    on_step: Callable[[], None] = lambda: None,
    make_backend: MakeBackend | None = None,
) -> Result:
    """As :func:`cifar_fast.fit`, with device, dtype and backend settled by :func:`cifar_fast.backends.select.resolve_backend`; goes on
    from the checkpoint of ``output`` where it has one. ``on_step`` is called after each step; what it raises ends the
    training. ``make_backend`` may give one that was used before. ``only`` is the number of the one run of ``runs`` that
    is trained, to an ``output`` of its own.
    """
    seeds, runs = check(plan, seeds, runs, threads, checkpoint_every)
    test_sets = read_eval_sets(also_test or {}, dataset.num_classes, recipe.classes)
    dataset = dataset.for_recipe(recipe)
    dataset.steps_per_epoch(recipe.batch_size)
    if output and output.checkpoint:
        output.checkpoint.refuse_other_data(output.name, dataset)
        threads = output.checkpoint.result.settings["threads"] if threads is None else threads
    threads = DEFAULT_NUM_THREADS if threads is None else int(threads)

    with contextlib.ExitStack() as stack:
        if output:
            stack.enter_context(output).report = LOGGER.info
        standing = output.checkpoint if output else None
        stack.enter_context(device_guard(plan.device))
        stack.enter_context(torch_defaults(plan.device, threads))
        stack.enter_context(oom_hint("training", recipe.batch_size))
        facts = environment(plan.device)
        data_facts = dataset.facts()
        clock = device_timer(plan.device)

        LOGGER.info(f"torch {facts['torch']}, {facts['device_name']}, {facts['threads']} threads, backend {plan}")
        if plan.reason:
            LOGGER.info(f"auto: {plan.reason}")
        for line in standing.moved(facts) if standing else ():
            LOGGER.info(line)
        start = clock()
        make_backend = make_backend or BackendCache().get
        for line in dataset.remarks:
            LOGGER.info(line)
        backend, failures = make_backend(plan, recipe, lambda: device_data(dataset, plan.device))
        normalization = backend.data.normalization.mean, backend.data.normalization.std
        mean, std = (statistic.tolist() for statistic in normalization)
        custom_model, weights_now = backend.custom_model, backend.state_dict()
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
            model=custom_model.name if custom_model else None,
            parameters=sum(weights_now[name].numel() for name, _ in backend.model.named_parameters()),
            remarks=[*dataset.remarks, *backend.notes],
        )
        standing = standing or Checkpoint(result)
        if output and not standing.state:
            output.save(Checkpoint(result))
        for run in range(len(result.runs), runs) if only is None else [only]:
            if runs > 1:
                LOGGER.info(f"run {run + 1} of {runs}, seed {seeds.seed + run}")
            own = seeds.for_run(run)
            weights, *drawing = own.generators(plan.device)
            order, augmentation = drawing
            drawing += custom_model.generators(plan.device, own.seed) if custom_model else []
            backend.reset(backend.new_model(weights))
            after = standing.restore(backend, drawing)
            if after:
                LOGGER.info(f"going on after epoch {after.epoch}")
            setup_seconds = standing.setup_seconds + clock() - start
            standing = Checkpoint(result)  # of the runs to come
            n = len(dataset.train_images)
            for row in train(backend, n, augmentation, run, clock, order=order, after=after, on_step=on_step):
                result.rows.append(row)
                if output:
                    output.add(row)
                LOGGER.info(str(row))
                due = checkpoint_every and row.epoch % checkpoint_every == 0
                if output and (due or row.epoch == recipe.epochs):
                    states = [generator.get_state() for generator in drawing]
                    output.save(Checkpoint(result, setup_seconds, backend.training_state(), states))
            also = {}
            for test in test_sets:
                also[test.name] = accuracy(backend, dataset, normalization, test)
                LOGGER.info(f"also tested on {test.name}, {len(test.places)} images: {also[test.name]:.2f} %")
            if save_logits:
                logits = plain_logits(backend, dataset, normalization, dataset.test_images)
                result.logits.append(logits.to("cpu", torch.float16))
            last = result.rows[-1]
            seconds = last.train_seconds, setup_seconds, last.evaluation_seconds
            apart = own.init_seed, own.order_seed, own.augment_seed
            result.runs.append(Run(run, own.seed, *apart, last.test_accuracy, *seconds, also))
            start = clock()

        result.state_dict.update((name, tensor.detach().cpu()) for name, tensor in backend.state_dict().items())
        LOGGER.info(result.summary_line())
        if output:
            output.finish(result, dataset.test_labels)
    return result


@contextlib.contextmanager
def oom_hint(where: str, batch_size: int) -> Iterator[None]:
    """Raise :class:`InputError` with the batch size where memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise InputError(f"out of memory in {where} at --batch-size {batch_size}; try a smaller one") from error


def check(
    plan: BackendConfig, seeds: Seeds, runs: int = 1, threads: int | None = None, checkpoint_every: int = 1
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
