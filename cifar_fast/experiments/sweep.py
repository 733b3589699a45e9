"""Variants of the recipe, trained in turn: :class:`Sweep`, which is read from a TOML file, and :func:`fit_sweep`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from cifar_fast.backends.select import BackendCache
from cifar_fast.data.options import DataOptions
from cifar_fast.data.sources import check_named, place_of, read_dataset
from cifar_fast.experiments.ranking import default_metric, ranking_line
from cifar_fast.recipe import Recipe
from cifar_fast.training.config import TrainConfig
from cifar_fast.training.fit import Training, settle_backend, train_all
from cifar_fast.training.results import Result, RunResult
from cifar_fast.training.run_folder import RunFolder
from cifar_fast.utils.distributed import World
from cifar_fast.utils.errors import InputError, did_you_mean, first_line, require_instance
from cifar_fast.utils.files import (
    TRAINING,
    as_path,
    atomic_write,
    check_writable,
    expand_home,
    locked,
    made_folder,
    os_error_as_input_error,
    regular,
)
from cifar_fast.utils.progress import LOGGER, LogFn, heartbeat, lines_to, print_line
from cifar_fast.utils.provenance import without_secrets

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VARIANT = re.compile(r"\w[\w.+=,-]*")
"""Name of a variant, and of its folder in that of the sweep."""
PER_VARIANT = ("backend", "dtype", "memory_format", "save_logits")
"""Options of a training that a variant may change."""

SWEEP = "sweep.json"
"""The sweep as JSON, in its folder beside a folder for each variant."""

TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "a table"}
"""Names of types in errors."""


@dataclass(frozen=True)
class Sweep(TrainConfig):
    """Trainings of several recipes with the same options.

    ``variants`` holds the recipes by name; each is trained into ``output``/NAME. ``recipe`` is the one that the
    variants change. ``options`` holds those of :data:`PER_VARIANT` that a variant changes, by its name. ``dataset``,
    ``data_dir`` and ``data_url`` are as for :func:`cifar_fast.load_dataset`, and ``data_options`` are its other
    arguments. The other options are those of :class:`TrainConfig`.
    """

    variants: dict[str, Recipe]
    output: str
    dataset: str = "cifar10"
    data_dir: str | None = None
    data_url: str | None = None
    data_options: DataOptions = dataclasses.field(default=DataOptions())
    options: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> Sweep:
        """Read a sweep from the TOML file ``path``. Its ``output`` is by default runs/STEM."""
        path = as_path(path, "path")
        try:
            return cls.from_toml(path.read_text(encoding="utf-8-sig"), output=f"runs/{path.stem}")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the sweep {path}: {getattr(error, 'strerror', None) or error}") from None
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    @classmethod
    def from_toml(cls, text: str, output: str) -> Sweep:
        """Read a sweep from TOML: the options at the top, ``[recipe]`` for all variants, ``[variants.NAME]`` for each.

        If a field takes a single value, a list of values makes a variant for each value; see :func:`expand`.
        """
        try:
            spec = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise InputError(f"a sweep must be TOML: {first_line(error)}") from None
        types = get_type_hints(cls)
        if (log := spec.pop("log", None)) is not None:
            if log not in ("none", "tensorboard"):
                raise InputError(f"log must be none or tensorboard, not {log!r}")
            spec["tensorboard"] = log == "tensorboard"
        names = ["variants", "output", "dataset", "data_dir", "data_url", *DataOptions.names(), *cls.names()]
        refuse_unknown(spec, [*names, "recipe"], "at the top")
        base, tables = spec.pop("recipe", {}), spec.pop("variants", {})
        data_options = DataOptions(**{name: spec.pop(name) for name in DataOptions.names() if name in spec})
        start = Recipe()
        if isinstance(base, str):
            start, base = Recipe.load(base), {}
        require_type("recipe", base, dict)
        require_type("variants", tables, dict)
        for name, value in spec.items():
            require_type(name, value, dict if name == "also_test" else types[name])
        for name, value in spec.get("also_test", {}).items():
            require_type(f"also_test.{name}", value, str)
        fields = list(vars(Recipe()))
        refuse_unknown(base, fields, "in [recipe]")
        common = changed_recipe("recipe", start, base)
        variants: dict[str, Recipe] = {}
        options: dict[str, dict[str, Any]] = {}
        for name, table in tables.items():
            where = f"variants.{name}"
            require_type(where, table, dict)
            refuse_unknown(table, [*fields, *PER_VARIANT, "recipe"], f"in [{where}]")
            own_start = table.pop("recipe", None)
            require_type(f"{where}: recipe", own_start or "", str)
            variant_start = common if own_start is None else Recipe.load(own_start)
            for full_name, values in expand(name, table):
                if not VARIANT.fullmatch(full_name):
                    rule = "use letters, digits and . + = , - _"
                    raise InputError(f"{where}: {full_name!r} cannot name a folder; {rule}")
                if full_name in variants:
                    raise InputError(f"{where}: there are two variants {full_name}; give each another name or value")
                own = {key: values.pop(key) for key in PER_VARIANT if key in values}
                for key, value in own.items():
                    require_type(f"{where}: {key}", value, types[key])
                options |= {full_name: own} if own else {}
                variants[full_name] = changed_recipe(where, variant_start, values)
        if not variants:
            raise InputError("states no variant; add a table [variants.NAME] for each, empty for the recipe as it is")
        whole = {"output": output} | spec
        sweep = cls(**whole, recipe=common, variants=variants, data_options=data_options, options=options)
        for name in variants:
            try:
                sweep.config(name).check_runs_differ()
            except InputError as error:
                raise InputError(f"variant {name}: {error}") from None
        return sweep

    @property
    def path(self) -> Path:
        """The folder of the sweep."""
        return expand_home(self.output)

    def config(self, name: str) -> TrainConfig:
        """Return the config of the variant ``name``."""
        options = {option_name: getattr(self, option_name) for option_name in self.names()}
        return TrainConfig(recipe=self.variants[name], **options | self.options.get(name, {}))


def changes(recipe: Recipe, base: Recipe) -> str:
    """Return what ``recipe`` changes of ``base``, such as "epochs 4, widths 8 16"."""
    values = {name: value for name, value in vars(recipe).items() if value != getattr(base, name)}
    shown = {name: " ".join(map(str, value)) if isinstance(value, tuple) else value for name, value in values.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def refuse_unknown(table: Mapping[str, Any], known: list[str], where: str) -> None:
    """Raise :class:`InputError` for the first key of ``table`` that is not ``known``, with similar names."""
    for key in table:
        if key not in known:
            hint = did_you_mean(key, known) or f"; there are {', '.join(known)}"
            raise InputError(f"there is no key {key!r} {where}{hint}")


def require_type(where: str, value: Any, hint: Any) -> None:
    """Raise :class:`InputError` unless ``value`` has the type of the annotation ``hint``."""
    kinds = (dict,) if get_origin(hint) is dict else get_args(hint) or (hint,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        kind = float if float in kinds else kinds[0]
        raise InputError(f"{where} must be {TYPE_NAMES[kind]}, not {value!r}")


def changed_recipe(where: str, base: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Return ``base`` with ``values`` replaced. The message of an :class:`InputError` starts with ``where``."""
    try:
        return dataclasses.replace(base, **values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def expand(name: str, table: Mapping[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield the variants of the table ``[variants.NAME]``: their names, and what each changes.

    Lists of values make a variant of each combination, named NAME-VALUE or NAME-VALUE-VALUE in the order of the keys:
    ``[variants.m]`` with ``momentum = [0.8, 0.85]`` makes m-0.8 and m-0.85. A value that is a list itself, such as
    widths, has commas between its numbers.
    """
    several = {}
    for key, value in table.items():
        is_list = isinstance(getattr(Recipe, key, None), tuple)  # several values are then a list of lists
        if isinstance(value, list) and (not is_list or all(isinstance(item, list) for item in value)):
            if not value:
                raise InputError(f"variants.{name}: {key} is an empty list; give it a value")
            several[key] = value
    for values in itertools.product(*several.values()):
        yield "-".join((name, *map(in_name, values))), dict(table) | dict(zip(several, values))


def in_name(value: Any) -> str:
    """Return ``value`` as part of a variant's name."""
    return ",".join(map(in_name, value)) if isinstance(value, list) else str(value).lower()


def fit_sweep(
    sweep: Sweep,
    *,
    log: LogFn | None = print_line,
    on_step: Callable[[], None] = lambda: None,
    world: World = World(),  # noqa: B008  (frozen)
) -> dict[str, Result]:
    """Train each variant once, then each a second time, and so on, so that slow drift affects all variants equally.

    An interrupted sweep is resumed by the same call, and ends with the same bits. The folder of a variant is what
    :func:`cifar_fast.fit` writes with ``output``. A run that diverges or fails is reported, and the others are trained.
    Compiled and captured backends are kept from one run of a variant to the next.

    Args:
        log: called with each line that a person reads, the variant's name before it; None prints nothing.
        on_step: called after each step. An error that it raises ends the sweep.
        world: processes that split the runs, in the same order.

    Returns:
        The results by the variants' names, without variants of which no run has ended; empty on ranks other than 0.
        ``Result.diverged`` and ``Result.missing`` of a variant name the runs that it has no accuracy of.
    """
    require_instance("sweep", sweep, Sweep, "a Sweep, as Sweep.load reads one")
    with lines_to(None if world.rank else log):
        return train_sweep(sweep, world, on_step, {})


def train_sweep(
    sweep: Sweep, world: World, on_step: Callable[[], None], failed: dict[str, str], command: str | None = None
) -> dict[str, Result]:
    """Train as :func:`fit_sweep` does, with lines on the logger alone.

    ``failed`` is as in :func:`train_all`, and ``command`` as in :class:`Training`.
    """
    with world.all_or_none():
        trainings = trainings_of(sweep, world, command)
        data_dir = place_of(sweep.dataset, sweep.data_dir, trainings[0].paths)
        options = sweep.data_options.relocated(trainings[0].paths)
    with heartbeat(lambda: f"reading the data set {sweep.dataset}"):
        dataset = world.rank0_first(lambda: read_dataset(sweep.dataset, data_dir, sweep.data_url, options))
    with world.all_or_none():
        for training in trainings:
            training.prepare(dataset)
    with contextlib.ExitStack() as stack:
        world.broadcast(lambda: stack.enter_context(sweep_lock(sweep)))
        results = train_all(trainings, world, on_step=on_step, failed=failed)
    found = {training.name: result for training, result in zip(trainings, results) if result}
    if line := ranking_line(found, default_metric(found)):
        LOGGER.info(line)
    return found


def trainings_of(
    sweep: Sweep,
    world: World = World(),  # noqa: B008  (frozen)
    command: str | None = None,
) -> list[Training]:
    """Return the training of each variant, each resumed if it has begun. There may be more runs and variants now.

    Raises:
        InputError: the options cannot work, or a folder holds something else than this sweep.
    """
    check_named(sweep.dataset, sweep.data_dir)
    check_writable(sweep.path, f"output {sweep.output}")
    for name in variants_in(sweep.path) if (sweep.path / SWEEP).exists() else ():
        if name not in sweep.variants and has_training(sweep.path / name):
            raise InputError(
                f"{sweep.path}: the variant {name} was trained there, but is no longer part of the sweep; "
                "add it again, or give another output"
            )
    folders = {name: RunFolder(sweep.path / name, resume=has_training(sweep.path / name)) for name in sweep.variants}
    common = (folder.earlier for name, folder in folders.items() if name not in sweep.options)
    begun = next((earlier for earlier in common if earlier), None)
    backends, trainings = BackendCache(), []
    for name, folder in folders.items():
        folder.name = str(folder.path)
        config = sweep.config(name)
        if folder.earlier and folder.earlier.dataset["name"] != sweep.dataset:
            raise InputError(f"{folder.name}: dataset was {folder.earlier.dataset['name']}, not {sweep.dataset}")
        if begun and not folder.earlier:  # so that new variants are trained as the others were
            config = config.resuming(begun.config)
        training = Training(config, folder, backends=backends, command=command, world=world)
        if begun and not folder.earlier:
            training.paths = dict(begun.paths)
            training.auto = begun.auto
            if name in sweep.options:  # it may have other reasons than the variants without options
                found = settle_backend(sweep.config(name))
                training.auto = [found.reason] if str(found) == str(training.backend_config) else None
        trainings.append(training)
    return trainings


def dry_run(sweep: Sweep) -> Iterable[str]:
    """Yield the variants with what they change, and the runs in their order with their states, a line each.

    Raises:
        InputError: :func:`fit_sweep` would raise it before it reads the data.
    """
    trainings = trainings_of(sweep)
    yield f"{len(sweep.variants)} variants, {sweep.runs} runs each, on {sweep.dataset}, to {sweep.output}"
    for training in trainings:
        recipe = training.config.recipe
        yield f"{training.name}: {training.backend_config}; {changes(recipe, Recipe()) or 'the recipe as published'}"
    for run in range(sweep.runs):
        for training in trainings:
            yield f"run {run} of {training.name}, seed {sweep.seed + run}: {run_state(training, run)}"


def run_state(training: Training, run: int) -> str:
    """Return the state of a run, for a person."""
    assert training.folder is not None
    if ended := training.folder.run_result(run, logits=False):
        return "has ended" if isinstance(ended, RunResult) else f"diverged at step {ended.run.step}"
    unfinished = training.folder.unfinished(run)
    return f"will resume after epoch {unfinished.checkpoint.epoch}" if unfinished else "to do"


def has_training(folder: Path) -> bool:
    """Return whether a training has begun in ``folder``."""
    return (folder / TRAINING).exists()


def variants_in(folder: Path) -> list[str]:
    """Return the names of the variants of the sweep in ``folder``, in their order."""
    try:
        names = list(json.loads(regular(folder / SWEEP).read_text())["variants"])
        if wrong := [name for name in names if not (isinstance(name, str) and VARIANT.fullmatch(name))]:
            raise ValueError(f"{wrong[0]!r} is no name of a variant")
        return names
    except Exception as error:  # damage raises as many kinds of errors as there are bytes
        what = f"{folder / SWEEP}: cannot be read ({first_line(error)})"
        raise InputError(f"{what}; move it away, and sweep again") from None


@contextlib.contextmanager
def sweep_lock(sweep: Sweep) -> Iterator[None]:
    """Own the folder of the sweep inside the block, with its ``sweep.json``; remove both if nothing was trained."""
    folder, what = sweep.path, f"output {sweep.output}"

    def refuse() -> None:
        raise InputError(f"{what}: another sweep is at work there; choose another folder")

    def write() -> None:
        with os_error_as_input_error(what), atomic_write(folder / SWEEP) as temporary:
            values = dataclasses.asdict(sweep)
            if sweep.data_url:
                values["data_url"] = without_secrets(sweep.data_url)
            temporary.write_text(json.dumps(values, indent=2, default=str) + "\n")

    with contextlib.ExitStack() as stack:
        with os_error_as_input_error(what):
            stack.enter_context(made_folder(folder))
            stack.enter_context(locked(folder, refuse))
            write()
        try:
            yield
        finally:
            if not any(has_training(folder / name) for name in sweep.variants):
                (folder / SWEEP).unlink(missing_ok=True)
            elif not (folder / SWEEP).exists():  # the folder was removed, and the trainings made it again
                write()
