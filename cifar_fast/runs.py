""":func:`fit`, which trains a recipe as often as wanted, and what several processes share of that: a part of the folder
for each run, and one result of all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cifar_fast.also_test import read_test_sets
from cifar_fast.augment import Seeds
from cifar_fast.backends import Backend
from cifar_fast.checkpoint import CHECKPOINT, PARTS, Checkpoint, part_folder, read_parts, without_runs
from cifar_fast.data import Dataset
from cifar_fast.distributed import World
from cifar_fast.errors import Incomplete, InputError
from cifar_fast.files import atomic_write, remove_empty, writing
from cifar_fast.isolation import THREADS
from cifar_fast.output import Output
from cifar_fast.own_model import Model, OwnModel
from cifar_fast.plan import Plan, SetUp, resolve, set_up
from cifar_fast.progress import Log, encodable, print_line
from cifar_fast.recipe import Recipe
from cifar_fast.results import Result
from cifar_fast.trainer import fit_plan


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
    log: Log | None = print_line,
) -> Result:
    """Train ``recipe`` on ``dataset`` from scratch, ``runs`` times.

    Run i (from 0) is seeded with ``seed + i`` and is the run that this seed gives alone, whatever surrounds the call:
    torch's settings that a result depends on are at their defaults meanwhile (:mod:`cifar_fast.isolation`), and random
    numbers come from generators of the run's own, so that those of the caller are left as they were. On a CPU a step
    takes 15 to 30 % less time after :func:`cifar_fast.backends.keep_freed_memory`, which the command calls. In workers
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
            each run; see :class:`cifar_fast.augment.Seeds`.
        output: folder for metrics.jsonl, summary.json, curves.png and model.pt; None writes nothing.
        overwrite: replace the results that ``output`` holds already.
        resume: in the place of ``output``, the folder of the same call that was stopped: goes on from its checkpoint
            and ends with the same bits. ``runs`` may have grown; ``auto`` is what it was. Of a training that has ended
            the result is read.
        checkpoint_every: epochs from a checkpoint in ``output`` to the next; each run leaves one when it ends, with 0
            that one alone.
        also_test: names and paths of other test sets, see :func:`cifar_fast.also_test.read_test_sets`; their
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
    plan = (standing.plan if standing else resolve)(backend, device, dtype, memory_format)
    seeds = Seeds(seed, init_seed, order_seed, augment_seed)
    own = None if model is None else OwnModel(model)
    asked: Any = (recipe, plan, seeds, runs, also_test, save_logits, own.name if own else None)
    if folder and standing and standing.nothing_left(folder.name, *asked):
        encodable(log)(nothing_to_do(folder))
        return standing.result
    how: dict[str, Any] = dict(also_test=also_test, save_logits=save_logits, threads=threads, log=log)
    how |= dict(seeds=seeds, runs=runs, output=folder, checkpoint_every=checkpoint_every)
    with own.forked(plan.device) if own else contextlib.nullcontext():
        result = fit_shared(World(), recipe, dataset, plan, make_backend=own.set_up if own else set_up, **how)
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
    plan: Plan,
    *,
    output: Output | None,
    seeds: Seeds,
    runs: int,
    log: Log | None,
    threads: int | None = None,
    make_backend: SetUp = set_up,
    **how: Any,
) -> Result | None:
    """As :func:`cifar_fast.trainer.fit_plan`, the runs shared by the processes of ``world``: rank r takes every size-th
    from the r-th on. Goes on with what any number of processes has left. The result is the first process's, None in the
    others.
    """
    if world.size == 1 and not (output and output.resume and (output.path / PARTS).exists()):
        alone: dict[str, Any] = dict(output=output, seeds=seeds, runs=runs, log=log, threads=threads)
        return fit_plan(recipe, dataset, plan, make_backend=make_backend, **alone, **how)
    assert output is not None, "what is shared goes over the disk"
    log = encodable(log)
    make_backend = once(make_backend)

    with contextlib.ExitStack() as stack:

        def begin() -> tuple[Path, int, list[int]]:
            used = dataset.for_recipe(recipe)
            used.steps_per_epoch(recipe.batch_size)
            read_test_sets(how.get("also_test") or {}, dataset.num_classes, recipe.classes)
            stack.enter_context(output).report = log
            standing = output.checkpoint
            if standing:
                standing.refuse_other_data(output.name, used)
            else:
                output.delete_earlier()
            then = standing.result.settings["threads"] if standing else THREADS
            return output.path, then if threads is None else threads, runs_left(output.path, standing, runs)

        folder, threads, left = world.from_first(begin)
        if world.size > 1:
            log(f"runs to do: {len(left)}, shared by {world.size} processes; what follows is the first one's")

        def train(run: int) -> None:
            part = Part(folder, run)
            part.tensorboard = output.tensorboard
            alike: dict[str, Any] = dict(seeds=seeds, runs=runs, threads=threads, log=log, make_backend=make_backend)
            fit_plan(recipe, dataset, plan, only=run, output=part, **alike, **how)

        world.share(left, train, how.get("on_step", lambda: None))
        return None if world.rank else gather(output, runs, dataset.for_recipe(recipe).test_labels, log)


def once(set_up: SetUp) -> SetUp:
    """``set_up`` for one recipe, which is set up at the first call."""
    made: list[tuple[Backend, list[str]]] = []

    def make(plan: Plan, recipe: Recipe, dataset: Dataset, log: Log) -> tuple[Backend, list[str]]:
        if not made:
            made.append(set_up(plan, recipe, dataset, log))
        return made[0]

    return make


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


def gather(output: Output, runs: int, test_labels: np.ndarray, log: Log) -> Result:
    """Write what a training of one process leaves to ``output``, out of its parts, which go; :class:`Incomplete` where
    one of the ``runs`` is missing.
    """
    standing = output.checkpoint
    ended = len(standing.result.runs) if standing else 0
    parts = read_parts(output.path, output.name)
    for run in range(ended, runs):
        if run not in parts or not parts[run].result.runs:
            raise Incomplete(
                f"{output.path}: run {run + 1} is not there, it could not be written; start again, train with --resume"
            )
    results = [parts[run].result for run in range(ended, runs)]
    before = standing.result if standing else without_runs(results[0])
    for run, one in enumerate(results, ended):
        if (one.backend, one.dtype, one.memory_format) != (before.backend, before.dtype, before.memory_format):
            raise Incomplete(
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
    log(result.closing_line())
    output.finish(result, test_labels)
    if not (output.path / CHECKPOINT).exists():
        shutil.rmtree(output.path / PARTS, ignore_errors=True)
    return result
