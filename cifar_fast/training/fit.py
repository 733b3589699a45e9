"""Training as often as wanted: :func:`fit`, and :class:`Training` for the commands and sweeps."""

from __future__ import annotations

import contextlib
import dataclasses
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cifar_fast.backends.base import Backend
from cifar_fast.backends.select import BackendCache, BackendConfig, local_device, resolve_backend
from cifar_fast.data.class_names import ClassNames
from cifar_fast.data.dataset import Dataset
from cifar_fast.data.eval_sets import EvalSet, read_eval_sets
from cifar_fast.data.from_python import as_dataset
from cifar_fast.data.sources import has_files
from cifar_fast.data.tensors import DeviceData, device_data
from cifar_fast.model import CustomModel, Model
from cifar_fast.recipe import Recipe
from cifar_fast.training.checkpoint import Checkpoint
from cifar_fast.training.config import TrainConfig
from cifar_fast.training.evaluate import VIEWS, also_accuracies, confusion_matrix, plain_logits
from cifar_fast.training.metrics import DivergedRun, EpochRow, Run, rows_digest
from cifar_fast.training.results import DivergedResult, Result, RunResult
from cifar_fast.training.run_folder import RunFolder
from cifar_fast.training.schedule import schedule_notes
from cifar_fast.training.tensorboard import TensorBoard
from cifar_fast.training.time_to_go import EVALUATED, TimeToGo
from cifar_fast.training.trainer import train
from cifar_fast.utils.device import AFFECTS_FIGURES, device_guard, device_timer, environment, short_name
from cifar_fast.utils.distributed import World
from cifar_fast.utils.errors import (
    Diverged,
    InputError,
    MissingRuns,
    StopTraining,
    UserError,
    first_line,
    oom_hint,
    option,
    plain,
)
from cifar_fast.utils.files import absolute_paths, known_path
from cifar_fast.utils.progress import LOGGER, LogFn, heartbeat, lines_to, prefix_lines, print_line
from cifar_fast.utils.provenance import now
from cifar_fast.utils.seeds import Seeds
from cifar_fast.utils.torch_defaults import DEFAULT_NUM_THREADS, torch_defaults


def fit(
    recipe: Recipe,
    dataset: Any,
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
    validation: int | float = 0,
    validation_seed: int = 0,
    runs: int = 1,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: str | Path | None = None,
    checkpoint_every: int = 1,
    verify_every: int = 0,
    also_test: Mapping[str, str | Path] | None = None,
    save_logits: bool = False,
    tta: bool = False,
    tensorboard: bool = False,
    threads: int | None = None,
    on_epoch: Callable[[EpochRow], object] | None = None,
    log: LogFn | None = print_line,
) -> Result:
    """Train ``recipe`` on ``dataset`` from scratch, ``runs`` times.

    Run i, from 0, uses ``seed + i`` and equals the run that this seed gives alone. Nothing around the call changes it:
    torch's settings are at their defaults inside (:mod:`cifar_fast.utils.torch_defaults`), and random numbers come from
    generators of the run. The caller's settings and generators are as before afterwards.

    On a CPU a step takes 15 to 30 % less time after :func:`cifar_fast.utils.device.tune_malloc`, which the command
    calls. Start worker processes with ``spawn``: torch's threads do not survive a fork. Under torchrun this function
    trains all runs in each process; the commands split them.

    Args:
        dataset: a :class:`Dataset`; a torchvision or Hugging Face data set of 32 x 32 images; arrays or tensors. See
            :func:`cifar_fast.data.from_python.as_dataset`.
        model: a module to train instead of the recipe's network, from images ``[B, 3, 32, 32]`` to logits
            ``[B, classes]``. Each run starts from a copy of its weights. For fresh weights give a function without
            arguments, such as a class; it is called for each run under the run's seed. The recipe's options of the
            network, output scale included, do not apply. Random numbers that the model draws in training, such as
            dropout, follow the run's seed. All that a step changes must be in the model's state dict.
        backend: auto, eager, compiled, fused.
        device: auto, cpu, cuda, cuda:N.
        dtype: auto, float16, bfloat16, float32.
        memory_format: auto, contiguous_format (NCHW), channels_last. auto means contiguous_format if ``backend`` is
            "eager", and channels_last otherwise.
        init_seed, order_seed, augment_seed: seeds of the initial weights, the order and the augmentation alone, the
            same in each run; see :class:`cifar_fast.utils.seeds.Seeds`.
        validation: training images to hold out, a number or a fraction, with the same share of each class. Each epoch
            is also evaluated on them, so that a choice between trainings needs no test images. ``validation_seed``
            chooses the images, the same in each run.
        output: folder for the results; None writes nothing. See :mod:`cifar_fast.training.run_folder`.
        overwrite: replace the results that ``output`` holds.
        resume: ``output`` of an earlier, interrupted call with the same arguments; do not give ``output`` too. The
            training continues from its checkpoints and ends with the same bits. ``runs`` may grow. ``auto`` keeps its
            meaning. A finished training is read.
        checkpoint_every: epochs between checkpoints. Each run also writes one at its end. 0: only this last one.
        verify_every: steps between checks that train a step twice from the same state and compare weights, statistics,
            momentum and losses. Other bits end the run. 0: no check.
        also_test: names and paths of other test sets, see :func:`cifar_fast.data.eval_sets.read_eval_sets`.
        save_logits: keep the logits of the test images in ``Result.logits``, and in logits.npz.
        tta: also evaluate each run with test-time augmentation, for ``Run.tta_accuracy``.
        tensorboard: also write TensorBoard's files to ``output``.
        threads: CPU threads. None uses those that torch had when this package was imported, whatever
            ``torch.set_num_threads`` set since, because the last bits depend on it.
        on_epoch: called with the row of each epoch as it ends. :class:`cifar_fast.StopTraining` raised in it ends the
            run there; the run counts as finished, with ``stopped`` set.
        log: called with each line that a person reads; None prints nothing and shows no progress bar. The lines also
            go to the logger ``cifar_fast``.

    Raises:
        InputError: an argument cannot work here.
        Diverged: all runs have diverged. If only some have, the others are returned, and ``Result.diverged`` has these.
        MissingRuns: a run has failed, such as by ``verify_every``. The results of the others are written.

    A file that cannot be written does not stop the training: see ``Result.unwritten``.
    """
    config = TrainConfig(
        recipe=recipe,
        backend=backend,
        device=device,
        dtype=dtype,
        memory_format=memory_format,
        seed=seed,
        init_seed=init_seed,
        order_seed=order_seed,
        augment_seed=augment_seed,
        validation=validation,
        validation_seed=validation_seed,
        runs=runs,
        checkpoint_every=checkpoint_every,
        verify_every=verify_every,
        also_test=also_test or {},
        save_logits=save_logits,
        tta=tta,
        tensorboard=tensorboard,
        threads=threads,
    )
    if resume is not None and (output is not None or overwrite):
        raise InputError(f"give {option('resume')} alone, without {option('output')} and {option('overwrite')}")
    place = output if resume is None else resume
    folder = None if place is None else RunFolder(place, overwrite, resume=resume is not None)
    custom_model = None if model is None else CustomModel(model)
    with lines_to(log):
        training = Training(config, folder, custom_model=custom_model, on_epoch=on_epoch)
        training.prepare(as_dataset(dataset))  # first, because it refuses another data set
        if finished := training.finished():
            return with_a_run(finished)
        (result,) = train_all([training])
        assert result is not None
        return with_a_run(result)


class Training:
    """The runs of one config, trained one at a time.

    The constructor raises for options that cannot work with any data. :meth:`prepare` then takes and checks the data.

    Args:
        folder: folder for the results; None keeps them in memory.
        custom_model: a model instead of the recipe's network.
        on_epoch: as in :func:`fit`.
        backends: backends that other trainings have used, to use again.
        command: the command line; None for a training from Python.
        world: the processes that share the runs.

    Raises:
        InputError: an option cannot work here, or differs from the training in ``folder`` that is resumed.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder | None = None,
        *,
        custom_model: CustomModel | None = None,
        on_epoch: Callable[[EpochRow], object] | None = None,
        backends: BackendCache | None = None,
        command: str | None = None,
        world: World = World(),  # noqa: B008  (frozen)
    ) -> None:
        config.check_runs_differ()
        earlier = folder.earlier if folder else None
        asked = config if earlier is None else config.resuming(earlier.config)
        number = asked.device.removeprefix("cuda:")
        if config.device == "auto" and number.isdecimal() and int(number) >= torch.cuda.device_count():
            asked = asked.replace(device="cuda")  # of several GPUs that shared the runs, this one is gone
        self.backend_config = local_device(settle_backend(asked), world.size, world.local_rank, asked.device)
        self.config = used_options(asked, self.backend_config)
        self.folder, self.custom_model, self.on_epoch, self.command = folder, custom_model, on_epoch, command
        self.backends = backends or BackendCache()
        self.result = None if earlier is None else dataclasses.replace(earlier, config=self.config)
        self.paths = dict(earlier.paths) if earlier else {}
        self.auto: list[str] | None = None  # reasons of an earlier choice that this training follows
        self._runs: dict[int, RunResult | DivergedResult] = {}  # trained by this process
        self._other_backends: dict[int, str] = {}  # the backends of runs that do not belong to the result
        self._weights_of: int | None = None  # the run whose weights ``result`` has
        self._reported: list[str] = []  # changes of the environment
        if folder and earlier:
            self._refuse_differences(folder.name, earlier)
        if folder and config.tensorboard:
            folder.tensorboard = TensorBoard(config.recipe)

    def _refuse_differences(self, where: str, earlier: Result) -> None:
        model = self.custom_model.name if self.custom_model else None
        if model != earlier.model:
            raise InputError(
                f"{where}: the model was {earlier.model or 'not given'}, now {model or 'not given'}; resume in Python "
                "with the model that was trained, by fit(..., model=, resume=)"
            )
        digest = self.custom_model.digest if self.custom_model else None
        if digest != earlier.model_digest:
            raise InputError(
                f"{where}: the model {model} has other layers or other initial weights than the one that was trained; "
                "resume with that one"
            )
        if changed := self.config.difference(earlier.config):
            name, before, now = changed
            raise InputError(
                f"{where}: {option(name)} was {before}, not {now}; leave it out, or start another training with "
                f"{option('output')}"
            )
        runs, fewer = earlier.config.runs, self.config.runs
        if fewer < runs:
            raise InputError(f"{where}: {option('runs')} was {runs}, and may grow, but not shrink to {fewer}")

    @property
    def device(self) -> torch.device:
        return self.backend_config.device

    @property
    def has_trained(self) -> bool:
        """Whether a run has ended in this process."""
        return bool(self._runs)

    @property
    def name(self) -> str:
        """The name of the folder, which a sweep names after the variant."""
        return self.folder.path.name if self.folder else ""

    def finished(self) -> Result | None:
        """Return the result of a resumed training if all its runs have ended and are written, else None."""
        if not (self.folder and self.folder.earlier and self.folder.all_written(self.config.runs)):
            return None
        LOGGER.info(f"nothing to do: all runs in {self.folder.path} have ended; ask for more runs to add to them")
        return self.folder.result()

    def prepare(self, dataset: Dataset) -> None:
        """Prepare the data for all runs: the recipe's selection of it, and the extra test sets.

        Raises:
            InputError: the data cannot be trained on, or is not what the resumed training was trained on.
        """
        config = self.config
        classes = dataset.class_numbers(config.recipe.classes)
        also_test = {name: known_path(self.paths, path, "also_test") for name, path in config.also_test.items()}
        self.eval_sets: list[EvalSet] = read_eval_sets(
            also_test, dataset.class_names, classes, dataset.options.resize is not None
        )
        with data_oom_hint(dataset):
            self.dataset = dataset.for_recipe(config.recipe, config.validation, config.validation_seed)
            self.dataset.check_trainable(config.recipe.batch_size)
        names = self.dataset.class_names
        self.also_test = {one.name: {"digest": one.digest(names), "images": len(one.indices)} for one in self.eval_sets}
        self.schedule_notes = schedule_notes(config.recipe, self.dataset)
        if self.folder and self.folder.earlier:
            before, now = self.folder.earlier.dataset["digest"], self.dataset.digest
            names = ClassNames(self.folder.earlier.dataset["class_names"])
            if now == before and names != self.dataset.class_names:
                raise InputError(
                    f"{self.folder.name}: the classes of {dataset.source} were {names}, not "
                    f"{ClassNames(self.dataset.class_names)}; name the data set that was trained on with "
                    f"{option('data_dir')}"
                )
            if now != before:
                raise InputError(
                    f"{self.folder.name}: {dataset.source} is not the data set that was trained on (digest {now[:12]}, "
                    f"not {before[:12]}); name that one with {option('data_dir')}"
                )
            sets_before = self.folder.earlier.dataset["also_test"]
            for name in sets_before | self.also_test:
                if sets_before.get(name) != self.also_test.get(name):
                    raise InputError(
                        f"{self.folder.name}: the test set {name} is not the one that the training began with, its "
                        f"images or labels differ; name that one with {option('also_test')}"
                    )

        labels = [path for path, _ in dataset.options.label_files().values()]
        source = [dataset.source] if has_files(dataset.name) else []
        read = absolute_paths([*also_test.values(), *source, *labels])
        self.paths |= {given: path for given, path in read.items() if path not in self.paths.values()}
        if self.result:
            self.result = dataclasses.replace(self.result, paths=self.paths)

    def missing(self) -> list[int]:
        """Return the indices of the runs to train."""
        return self.folder.missing(self.config.runs) if self.folder else list(range(self.config.runs))

    def epoch_work(self) -> float:
        """Return the work of an epoch and its evaluation, as :class:`TimeToGo` counts it."""
        size = self.config.recipe.batch_size
        return self.dataset.steps_per_epoch(size) * size + EVALUATED * self.dataset.evaluated_count

    def run_work(self) -> float:
        """Return the work of a run."""
        views = 1 + VIEWS * self.config.tta
        last = [views * len(self.dataset.test_images), *(len(one.indices) for one in self.eval_sets)]
        return self.config.recipe.epochs * self.epoch_work() + EVALUATED * sum(last)

    def train(self, run: int, on_step: Callable[[], None], to_go: TimeToGo) -> None:
        """Train the run with that index, or the rest of it, and keep its result in memory and in the folder."""
        config, device, folder = self.config, self.device, self.folder
        with contextlib.ExitStack() as stack:
            stack.enter_context(heartbeat(to_go.line))
            if folder:
                stack.enter_context(folder.run_lock(run))
            if self.custom_model:
                stack.enter_context(self.custom_model.preserve_rng(device))
            stack.enter_context(device_guard(device))
            stack.enter_context(torch_defaults(device, config.threads or DEFAULT_NUM_THREADS))
            size = config.recipe.batch_size
            stack.enter_context(oom_hint(f"in training at {option('batch_size')} {size}", "try a smaller one"))
            clock = device_timer(device)
            start = clock()
            facts = environment(device)
            backend, result = self._backend(facts)
            if config.runs > 1:
                LOGGER.info(f"run {run} of {config.runs}, seed {config.seed + run}")

            seeds = seeds_of(config).for_run(run)
            weights, order, augmentation = seeds.generators(device)
            generators = [order, augmentation]
            if self.custom_model:
                generators += self.custom_model.generators(device, seeds.seed)
            backend.reset(backend.new_model(weights))
            rows: list[EpochRow] = []
            digest, setup_seconds, environments = "", 0.0, []
            if unfinished := folder.unfinished(run) if folder else None:
                checkpoint, rows, _ = unfinished
                checkpoint.restore(backend, generators)
                digest, setup_seconds = checkpoint.rows_digest, checkpoint.setup_seconds
                environments = checkpoint.environments
                LOGGER.info(f"resuming after epoch {checkpoint.epoch}")
                self._tell_changes(environments[-1], facts)
            setup_seconds += clock() - start

            stopped = False
            after = rows[-1] if rows else EpochRow.before_first(run)
            if not environments or environments[-1] | facts != environments[-1]:
                environments = [*environments, {"first_epoch": after.epoch + 1} | facts]
            to_go.skip(after.epoch * self.epoch_work())
            try:
                options: dict[str, Any] = dict(on_step=on_step, to_go=to_go, verify_every=config.verify_every)
                for row in train(backend, order, augmentation, clock, after=after, **options):
                    to_go.add(EVALUATED * self.dataset.evaluated_count)
                    rows.append(row)
                    digest = rows_digest([row], digest)
                    if folder:
                        folder.add_row(row)
                    LOGGER.info(f"{row}  {to_go}".rstrip())
                    due = config.checkpoint_every and row.epoch % config.checkpoint_every == 0
                    if folder and (due or row.epoch == config.recipe.epochs):
                        states = [generator.get_state() for generator in generators]
                        state = backend.training_state()
                        folder.save_checkpoint(run, Checkpoint(digest, setup_seconds, environments, state, states))
                    try:
                        if self.on_epoch:
                            with callback_errors():
                                self.on_epoch(row)
                    except StopTraining as reason:
                        cause = f": {reason}" if str(reason) else ""
                        LOGGER.info(f"run {run} is stopped after epoch {row.epoch}{cause}")
                        stopped = True
                        break
            except Diverged as error:
                LOGGER.info(str(error))
                diverged = DivergedRun(run, **dataclasses.asdict(seeds), step=error.step, epoch=error.epoch)
                self._end(result, DivergedResult(diverged, rows, backend.name, environments))
                return

            also_test, severities = also_accuracies(backend, self.eval_sets, self.dataset.class_names, to_go)
            to_go.status = "classifying the test images"
            logits = plain_logits(backend, self.dataset.test_images).cpu()
            to_go.add(EVALUATED * len(logits))
            confusion = confusion_matrix(self.dataset.test_labels, logits)
            kept = logits if config.save_logits else None
            tta_accuracy = None
            if config.tta:
                views = plain_logits(backend, self.dataset.test_images, tta=True).cpu().argmax(dim=1).numpy()
                to_go.add(EVALUATED * VIEWS * len(views))
                tta_accuracy = 100 * float((views == self.dataset.test_labels).mean())
                LOGGER.info(f"test accuracy with test-time augmentation (six views): {tta_accuracy:.2f} %")
            last = rows[-1]
            record = Run(
                run,
                **dataclasses.asdict(seeds),
                test_accuracy=last.test_accuracy,
                train_seconds=last.train_seconds,
                setup_seconds=setup_seconds,
                evaluation_seconds=last.evaluation_seconds,
                also_test=also_test,
                also_test_severities=severities,
                stopped=stopped,
                test_loss=last.test_loss,
                validation_accuracy=last.validation_accuracy,
                validation_loss=last.validation_loss,
                tta_accuracy=tta_accuracy,
            )
            for name, tensor in backend.state_dict().items():
                result.state_dict[name] = tensor.detach().cpu().clone()
            self._weights_of = run
            self._end(result, RunResult(record, rows, backend.name, environments, confusion, kept))

    def _end(self, result: Result, run: RunResult | DivergedResult) -> None:
        self._runs[run.run.run] = run
        if self.folder:
            self.folder.finish_run(result, run)

    def _backend(self, facts: dict[str, Any]) -> tuple[Backend, Result]:
        """Return the backend, built at the first call, and the result without runs."""
        first, config = not self._runs, self.config
        if first:
            LOGGER.info(
                f"torch {facts['torch']}, {facts['device_name']}, {facts['threads']} threads, backend "
                f"{self.backend_config}"
            )
            if self.backend_config.reason:
                LOGGER.info(f"auto: {self.backend_config.reason}")
            self._tell_changes(self.result.environment if self.result else facts, facts)
            for line in (*self.dataset.notes, *self.schedule_notes):
                LOGGER.info(line)

        def make_data() -> DeviceData:
            with data_oom_hint(self.dataset):
                return device_data(self.dataset, self.device)

        backend, failures = self.backends.get(self.backend_config, config.recipe, make_data, self.custom_model)
        if self.result is None:
            self.config = config.replace(backend=backend.name)
            trained = {name for name, _ in backend.model.named_parameters()}
            normalization = backend.data.normalization
            self.result = Result(
                config=self.config,
                environment=facts,
                auto=[line for line in self.auto or (self.backend_config.reason, *failures) if line],
                dataset=self.dataset.metadata() | {"source": str(self.dataset.source), "also_test": self.also_test},
                mean=normalization.mean.tolist(),
                std=normalization.std.tolist(),
                notes=[*self.dataset.notes, *backend.notes],
                model=self.custom_model.name if self.custom_model else None,
                model_digest=self.custom_model.digest if self.custom_model else None,
                parameters=sum(tensor.numel() for name, tensor in backend.state_dict().items() if name in trained),
                command=self.command,
                started=now(),
                paths=self.paths,
            )
            if self.folder:
                self.folder.begin(self.result)
        return backend, self.result

    def _tell_changes(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        """Log a line, once, for each part of the environment that the figures depend on and that has changed."""
        for name in AFFECTS_FIGURES:
            line = f"{name} was {before[name]}, now {now[name]}: the last bits may differ"
            if before[name] != now[name] and line not in self._reported:
                self._reported.append(line)
                LOGGER.info(line)

    def finish(self) -> Result | None:
        """Return the result of the runs that have ended, of other processes too, or None if there are none.

        Also write the files made from the runs.

        A run that another backend trained is left out.
        """
        folder = self.folder
        found = [self._runs.get(run) or (folder.run_result(run) if folder else None) for run in range(self.config.runs)]
        ended = [run for run in found if run]
        if not ended:
            return None
        result = self.result or (folder.training() if folder else None)
        assert result is not None
        self._other_backends = {run.run.run: run.backend for run in ended if run.backend != result.backend}
        result = result.with_runs([run for run in ended if run.run.run not in self._other_backends])
        for line in (*result.environment_changes(), result.class_line(), result.summary_line()):
            if line:
                LOGGER.info(line)
        if folder:
            if self.has_trained or not folder.all_written(self.config.runs):
                folder.finish(result, self.dataset.test_labels)
            if result.runs and result.runs[-1].run != self._weights_of:
                result = dataclasses.replace(result, state_dict=folder.state_dict())
        return result

    def missing_line(self, result: Result | None) -> str:
        """Return a line about the first run that is not in ``result``; empty if there is none."""
        missing = result.missing if result else [0]
        if result and missing and (other := self._other_backends.get(missing[0])):
            return (
                f"{self._where(missing[0])} was trained by {other}, and others by {result.backend}; name a "
                f"{option('backend')}, and start again"
            )
        return f"{self._where(missing[0])} is missing; start again with {option('resume')}" if missing else ""

    def _where(self, run: int) -> str:
        return f"{self.folder.path if self.folder else 'memory'}: run {run}"


class CallbackError(BaseException):
    """Carries an error of the caller's function past the code that keeps errors of runs."""

    def __init__(self, error: Exception) -> None:
        self.error = error


@contextlib.contextmanager
def callback_errors() -> Iterator[None]:
    """Let an error of the block, which calls the caller's function, end all trainings and not only the run."""
    try:
        yield
    except (StopTraining, Diverged):
        raise
    except Exception as error:
        raise CallbackError(error) from None


def refuse_other_ranks(trainings: Sequence[Training], world: World) -> None:
    """Raise :class:`InputError` unless all ranks train the same: each reads flags and files on its own machine."""
    if world.size == 1:
        return
    content = [(one.dataset.digest, one.dataset.class_names, one.also_test) for one in trainings]
    ranks = world.gather(([one.config for one in trainings], content))
    configs, first = ranks[0]
    with world.all_or_none():
        for rank, (others, its_content) in enumerate(ranks):
            for mine, other in zip(configs, others):
                changed = other.difference(mine)
                if not changed and other.runs != mine.runs:
                    changed = "runs", str(mine.runs), str(other.runs)
                if changed:
                    name, here, there = changed
                    raise InputError(
                        f"{option(name)} is {here} on rank 0, and {there} on rank {rank}; give both the same value"
                    )
            if its_content != first:
                raise InputError(
                    f"the images, labels, classes or variants of rank {rank} differ from those of rank 0; give both "
                    "the same files"
                )


def train_all(
    trainings: Sequence[Training],
    world: World = World(),  # noqa: B008  (frozen)
    *,
    on_step: Callable[[], None] = lambda: None,
    failed: dict[str, str] | None = None,
) -> list[Result | None]:
    """Train what is missing of ``trainings``, run 0 of each, then run 1 of each, split over the ranks of ``world``.

    An error of a run does not end the others. The training's other runs are left out on this rank if the first two fail
    or no backend can be set up, because they would fail too. The error is raised when the files of all others are
    written, as :class:`MissingRuns` if it is bad input for some of the runs alone.

    Args:
        on_step: called after each step, and while this rank waits for others. An error that it raises ends the
            training.
        failed: dict that receives the first error of each training, with its name as key. If it is given, each log line
            of a training starts with its name, and a :class:`UserError` is only raised if no run has ended.

    Returns:
        On rank 0 the result of each training, None if no run of it has ended; nothing on the other ranks.
    """
    refuse_other_ranks(trainings, world)
    with contextlib.ExitStack() as stack:

        def begin() -> tuple[list[tuple[int, int]], list[Path | None], list[int | None]]:
            for training in trainings:
                if folder := training.folder:
                    stack.enter_context(folder)
                    if world.size > 1:  # other ranks write there too
                        folder.replace_earlier()
                    if training.result:
                        folder.begin(training.result)
            missing = sorted((run, number) for number, one in enumerate(trainings) for run in one.missing())
            paths = [one.folder.path if one.folder else None for one in trainings]
            return missing, paths, [one.config.threads for one in trainings]

        missing, paths, threads = world.broadcast(begin)
        for training, path, number in zip(trainings, paths, threads) if world.rank else ():
            training.config = training.config.replace(threads=number)  # the last bits depend on them
            if training.folder and path:
                training.folder.join(path)
        if world.size > 1:
            shared = f"split over {world.size} processes; the lines are those of rank 0"
            LOGGER.info(f"{len(missing)} runs to train, {shared}")
            if (idle := world.size - len(missing)) > 0:
                LOGGER.info(f"{idle} of {world.size} processes have nothing to do; start fewer, or ask for more runs")
        own = world.share(missing)
        ahead = {
            number: [one.run_work() for _, other in own if other == number] for number, one in enumerate(trainings)
        }
        to_go = TimeToGo(ahead)
        rounds: list[int] = []
        errors: dict[int, Exception] = {}  # the first of each training on this rank
        left_out: set[int] = set()  # trainings without hope

        def prefixed(training: Training) -> contextlib.AbstractContextManager[None]:
            return prefix_lines("" if failed is None else f"{training.name}: ")

        def step() -> None:
            with callback_errors():
                on_step()

        def train_one(run: int, number: int) -> None:
            training = trainings[number]
            if len(trainings) > 1 and run not in rounds:
                rounds.append(run)
                LOGGER.info(f"round {run} of {training.config.runs}")
            with prefixed(training):
                to_go.begin(number, run, training.config.runs)
                try:
                    training.train(run, step, to_go)
                except Exception as error:
                    if not training.has_trained and (number in errors or training.result is None):
                        left_out.add(number)
                    if failed is not None or training.config.runs > 1:
                        others = "left out" if number in left_out else "trained"
                        LOGGER.info(f"run {run} failed: {error}; the other runs are {others}")
                    LOGGER.debug("run %d failed", run, exc_info=error)
                    free_frames(error)
                    errors.setdefault(number, error)
                finally:
                    to_go.end(number in left_out)

        lost = None
        try:
            for run, number in own:
                if number not in left_out:
                    train_one(run, number)
            told = world.gather({number: message_of(error) for number, error in errors.items()}, on_step)
        except MissingRuns as error:
            lost, told = error, []
        except CallbackError as stopped:
            raise stopped.error from stopped.error.__cause__
        results: list[Result | None] = []
        problems: dict[int, str] = {}
        for rank, messages in enumerate(told):
            for number, message in messages.items():
                problems.setdefault(number, message if world.size == 1 else f"rank {rank}: {message}")
        for number, training in enumerate(trainings) if world.rank == 0 else ():
            result = None
            with prefixed(training):
                try:
                    result = training.finish()
                except Exception as error:
                    errors.setdefault(number, error)
                    problems.setdefault(number, message_of(error))
            results.append(result)
            if missing_run := training.missing_line(result):
                problems.setdefault(number, missing_run)
    for raised in errors.values():
        if not isinstance(raised, UserError):
            raise raised
    if lost:
        raise lost
    if problems and world.rank == 0:
        if failed is None or not any(results):
            if errors and world.size == 1 and not any(results):
                raise errors[min(errors)]
            raise MissingRuns(problems[min(problems)]) from errors.get(min(problems))
        failed.update((trainings[number].name, plain(message)) for number, message in problems.items())
    return results


def message_of(error: Exception) -> str:
    """Return the message of ``error`` for a person, with marked options."""
    return error.message if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"


def free_frames(error: BaseException | None) -> None:
    """Clear the variables of the frames that ``error`` and its causes hold, such as tensors."""
    while error:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def data_oom_hint(dataset: Dataset) -> contextlib.AbstractContextManager[None]:
    """Blame the data set if memory runs out inside the block, which no batch size changes."""
    megabytes = sum(getattr(dataset, name).nbytes for name in dataset.arrays) / 1e6
    what = (
        f"for the images of {dataset.source}, {megabytes:.0f} MB and up to twice as much again while they are prepared"
    )
    return oom_hint(what, f"train on fewer, by {option('train_subset')} or {option('classes')}, or free memory")


def settle_backend(config: TrainConfig) -> BackendConfig:
    """Return what ``auto`` means here for ``config``. Raise :class:`InputError` for what cannot work here."""
    found = resolve_backend(config.backend, config.device, config.dtype, config.memory_format)
    if found.dtype == torch.float16 and found.device.type == "cpu":
        raise InputError(
            f"{option('dtype')} float16 needs a GPU, since torch has no fast float16 convolutions on a CPU; use "
            "bfloat16 or float32"
        )
    return found


def with_a_run(result: Result) -> Result:
    """Return ``result`` if a run has finished, else raise the error of the first run."""
    if result.runs:
        return result
    raise result.diverged[0].error(result.config.runs)


def seeds_of(config: TrainConfig) -> Seeds:
    """Return the seeds of ``config``."""
    return Seeds(config.seed, config.init_seed, config.order_seed, config.augment_seed)


def used_options(config: TrainConfig, found: BackendConfig) -> TrainConfig:
    """Return ``config`` with the values that are used in place of ``auto`` and of a missing number of threads."""
    return config.replace(
        backend=found.backends[0],
        device=str(found.device),
        dtype=short_name(found.dtype),
        memory_format=short_name(found.memory_format),
        threads=config.threads or DEFAULT_NUM_THREADS,
    )
