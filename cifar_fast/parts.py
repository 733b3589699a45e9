"""Runs of a training that several processes share: a part of its folder for each, and one result of all."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from cifar_fast.also_test import read_test_sets
from cifar_fast.augment import Seeds
from cifar_fast.backends import Backend
from cifar_fast.checkpoint import CHECKPOINT, PARTS, Checkpoint, part_folder, read_parts, without_runs
from cifar_fast.data import Dataset
from cifar_fast.distributed import World
from cifar_fast.errors import Incomplete
from cifar_fast.files import atomic_write, remove_empty, writing
from cifar_fast.isolation import THREADS
from cifar_fast.output import Output
from cifar_fast.plan import Plan, SetUp, set_up
from cifar_fast.progress import Log, encodable
from cifar_fast.recipe import Recipe
from cifar_fast.results import Result
from cifar_fast.trainer import fit_plan


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
    **how: Any,
) -> Result | None:
    """As :func:`cifar_fast.trainer.fit_plan`, the runs shared by the processes of ``world``: rank r takes every size-th
    from the r-th on. Goes on with what any number of processes has left. The result is the first process's, None in the
    others.
    """
    if world.size == 1 and not (output and output.resume and (output.path / PARTS).exists()):
        alone: dict[str, Any] = dict(output=output, seeds=seeds, runs=runs, log=log, threads=threads)
        return fit_plan(recipe, dataset, plan, **alone, **how)
    assert output is not None, "what is shared goes over the disk"
    log = encodable(log)
    make_backend = once()

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

        world.share(left, train)
        return None if world.rank else gather(output, runs, dataset.for_recipe(recipe).test_labels, log)


def once() -> SetUp:
    """A :func:`cifar_fast.plan.set_up` for one recipe, which is set up at the first call."""
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
