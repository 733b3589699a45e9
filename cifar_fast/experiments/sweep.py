"""Variants of the recipe, trained in turn: a :class:`Sweep`, which a TOML file states, and :func:`fit_sweep`."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from cifar_fast.backends.select import BackendCache, BackendConfig, resolve_backend
from cifar_fast.data.sources import check_named, read_dataset
from cifar_fast.recipe import Recipe
from cifar_fast.training.checkpoint import Checkpoint, begun_alone, read_checkpoint, read_parts
from cifar_fast.training.fit import Part, check, fit_plan, gather, runs_left
from cifar_fast.training.results import Result
from cifar_fast.training.run_folder import Output
from cifar_fast.utils.distributed import World
from cifar_fast.utils.errors import Diverged, InputError, first_line
from cifar_fast.utils.files import PARTS, atomic_write, check_writable, locked, remove_drafts, remove_empty, writing
from cifar_fast.utils.progress import LOGGER, LogFn, lines_to, prefix_lines, print_line
from cifar_fast.utils.seeds import Seeds
from cifar_fast.utils.torch_defaults import DEFAULT_NUM_THREADS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SWEEP = "sweep.json"
"""What a sweep's folder holds besides a folder for each variant: the :class:`Sweep`, its variants in their order."""

KINDS = {str: "text", int: "a whole number", dict: "a table"}
"""How a type is called for a person."""


@dataclass(frozen=True)
class Sweep:
    """What is to be trained: each of ``variants``, recipes by their names, ``runs`` times, into ``output``/NAME.

    The other fields are the flags of ``cifar-fast train``, the same for all variants.
    """

    variants: dict[str, Recipe]
    output: str
    dataset: str = "cifar10"
    data_dir: str | None = None
    data_url: str | None = None
    runs: int = 1
    seed: int = 0
    init_seed: int | None = None
    order_seed: int | None = None
    augment_seed: int | None = None
    backend: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    memory_format: str = "auto"
    checkpoint_every: int = 1
    also_test: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> Sweep:
        """The sweep that the TOML file ``path`` states; ``output`` is runs/STEM where it says none."""
        path = Path(path)
        try:
            return cls.from_toml(path.read_text(encoding="utf-8-sig"), output=f"runs/{path.stem}")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the sweep {path}: {getattr(error, 'strerror', None) or error}") from None
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    @classmethod
    def from_toml(cls, text: str, output: str) -> Sweep:
        """The sweep that ``text`` states: the fields by their names, ``[recipe]`` for all variants, ``[variants.NAME]``
        for each; ``output`` where it states none.

        A list of values, where the recipe has one value, stands for a variant each; see :func:`expand`.
        """
        try:
            spec = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise InputError(f"a sweep must be TOML: {first_line(error)}") from None
        types = get_type_hints(cls)
        refuse_unknown(spec, [*types, "recipe"], "at the top")
        base, tables = spec.pop("recipe", {}), spec.pop("variants", {})
        for where, table in {"recipe": base, "variants": tables}.items():
            need_kind(where, table, dict)
        for name, value in spec.items():
            need_kind(name, value, types[name])
        for name, value in spec.get("also_test", {}).items():
            need_kind(f"also_test.{name}", value, str)
        refuse_unknown(base, recipe_fields(), "in [recipe]")
        common = recipe_of("recipe", Recipe(), base)
        variants: dict[str, Recipe] = {}
        for name, table in tables.items():
            where = f"variants.{name}"
            need_kind(where, table, dict)
            refuse_unknown(table, recipe_fields(), f"in [{where}]")
            for full_name, values in expand(name, table):
                if not re.fullmatch(r"\w[\w.+=,-]*", full_name):
                    raise InputError(
                        f"{where}: {full_name!r} cannot name a folder; use letters, digits and . + = , - _"
                    )
                if full_name in variants:
                    raise InputError(f"{where}: there are two variants {full_name}; give each another name or value")
                variants[full_name] = recipe_of(where, common, values)
        if not variants:
            raise InputError("states no variant; add a table [variants.NAME] for each, empty for the recipe as it is")
        return cls(**{"output": output} | spec, variants=variants)

    @property
    def seeds(self) -> Seeds:
        return Seeds(self.seed, self.init_seed, self.order_seed, self.augment_seed)

    def folder(self, name: str) -> Path:
        """Where the results of the variant ``name`` are."""
        return Path(self.output).expanduser() / name

    def save(self) -> None:
        """Write it to ``sweep.json`` in its folder."""
        with atomic_write(Path(self.output).expanduser() / SWEEP) as draft:
            draft.write_text(json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n")


def changes(recipe: Recipe, base: Recipe) -> str:
    """What ``recipe`` has otherwise than ``base``, such as "epochs 4, widths 8 16"."""
    values = {name: value for name, value in vars(recipe).items() if value != getattr(base, name)}
    shown = {name: " ".join(map(str, value)) if isinstance(value, tuple) else value for name, value in values.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def recipe_fields() -> list[str]:
    return [field.name for field in dataclasses.fields(Recipe)]


def refuse_unknown(table: Mapping[str, Any], known: list[str], where: str) -> None:
    """Raise :class:`InputError` for the first key of ``table`` that is none of ``known``, with those like it."""
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
            raise InputError(f"there is no key {key!r} {where}; {hint}")


def need_kind(where: str, value: Any, hint: Any) -> None:
    """Raise :class:`InputError` unless ``value`` is of the type ``hint``, as annotations state it."""
    kind = get_origin(hint) if get_origin(hint) is dict else next(iter(get_args(hint)), hint)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputError(f"{where} must be {KINDS[kind]}, not {value!r}")


def recipe_of(where: str, base: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """``base`` with ``changes``; an :class:`InputError` says ``where``."""
    try:
        return dataclasses.replace(base, **changes)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def expand(name: str, table: Mapping[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """The variants that ``table`` of the name ``name`` states, names and what each changes.

    Lists of values make a variant of each combination, named NAME-VALUE or NAME-VALUE-VALUE, in the order of the keys:
    ``[variants.m]`` with ``momentum = [0.8, 0.85]`` makes m-0.8 and m-0.85. A value that is itself a list, as widths
    are, has commas between its numbers.
    """
    several = {key: value for key, value in table.items() if is_several(key, value)}
    for key, value in several.items():
        if not value:
            raise InputError(f"variants.{name}: {key} is an empty list; give it a value")
    for values in itertools.product(*several.values()):
        yield "-".join((name, *map(in_name, values))), dict(table) | dict(zip(several, values))


def is_several(key: str, value: Any) -> bool:
    """Whether ``value`` is a list of values of the recipe's field ``key``, some of which are lists themselves."""
    if isinstance(getattr(Recipe, key), tuple):
        return isinstance(value, list) and all(isinstance(item, list) for item in value)
    return isinstance(value, list)


def in_name(value: Any) -> str:
    """``value`` as a part of a variant's name."""
    return ",".join(map(in_name, value)) if isinstance(value, list) else str(value).lower()


def fit_sweep(
    sweep: Sweep,
    *,
    log: LogFn | None = print_line,
    on_step: Callable[[], None] = lambda: None,
    world: World = World(),  # noqa: B008  (frozen)
) -> dict[str, Result]:
    """Train each variant of ``sweep`` once, then each a second time, and so on, so that what changes on a machine with
    time is met by all alike; goes on where the same sweep was stopped, and ends with the same bits.

    A folder is what :func:`cifar_fast.fit` writes with ``output``, whole after each run. A variant that diverges is
    told and left out from there on. Compiled and captured backends are kept from a run of a variant to the next, see
    :class:`BackendCache`.

    Args:
        log: takes the lines that a person reads, the variant's name before them; None is silent.
        on_step: called after each step; what it raises ends the sweep.
        world: processes that share the runs in the same order; a folder is then whole at the end alone.

    Returns:
        The results by the variants' names, those that diverged left out; none but in the first process of ``world``.
    """
    with lines_to(None if world.rank else log):
        return _fit_sweep(sweep, on_step, world)


def _fit_sweep(sweep: Sweep, on_step: Callable[[], None], world: World) -> dict[str, Result]:
    with world.together():
        stands = standing(sweep)
        plans = {name: world.own_device(plan, sweep.device) for name, plan in plans_of(sweep, stands).items()}
    dataset = world.first_before_others(lambda: read_dataset(sweep.dataset, sweep.data_dir, data_url=sweep.data_url))
    with world.together():
        for name, checkpoint in stands.items():
            checkpoint.refuse_other_data(str(sweep.folder(name)), dataset.for_recipe(sweep.variants[name]))
    results = {name: checkpoint.result for name, checkpoint in stands.items()}
    threads = next((result.settings["threads"] for result in results.values()), None)  # the last bits depend on them
    diverged: dict[str, str] = {}
    how: dict[str, Any] = dict(seeds=sweep.seeds, checkpoint_every=sweep.checkpoint_every, also_test=sweep.also_test)
    how |= dict(on_step=on_step, make_backend=BackendCache().get)

    if world.size == 1 and not any((sweep.folder(name) / PARTS).exists() for name in sweep.variants):
        how["threads"] = threads
        with held(sweep):
            for run in range(sweep.runs):
                LOGGER.info(f"round {run + 1} of {sweep.runs}")
                for name, recipe in sweep.variants.items():
                    if name in diverged or (name in results and len(results[name].runs) > run):
                        continue
                    output = Output(sweep.folder(name), resume=begun(sweep.folder(name)))
                    how |= dict(runs=run + 1, output=output)
                    try:
                        with prefix_lines(f"{name}: "):
                            results[name] = fit_plan(recipe, dataset, plans[name], **how)
                    except Diverged as error:
                        LOGGER.info(f"{name}: {error}; it is left out from here on")
                        diverged[name] = str(error)
        return {name: results[name] for name in sweep.variants if name not in diverged}

    def begin() -> tuple[int, list[tuple[str, int]]]:
        stack.enter_context(held(sweep))
        left = {name: runs_left(sweep.folder(name), stands.get(name), sweep.runs) for name in sweep.variants}
        in_turn = [(name, run) for run in range(sweep.runs) for name in sweep.variants if run in left[name]]
        return threads or DEFAULT_NUM_THREADS, in_turn

    def train(name_and_run: tuple[str, int]) -> None:
        name, run = name_and_run
        if name not in diverged:
            part = Part(sweep.folder(name), run)
            try:
                fit_plan(sweep.variants[name], dataset, plans[name], only=run, output=part, **how)
            except Diverged as error:
                diverged[name] = str(error)

    with contextlib.ExitStack() as stack:
        how["threads"], in_turn = world.from_first(begin)
        how["runs"] = sweep.runs
        world.share(in_turn, train, on_step)
        for found in world.gather(diverged):
            diverged |= found
        if world.rank:
            return {}
        for name in sweep.variants:
            if name in diverged:
                LOGGER.info(f"{name}: {diverged[name]}; it is left out")
            elif name not in results or len(results[name].runs) < sweep.runs:
                with Output(sweep.folder(name), resume=True) as output:
                    results[name] = gather(output, sweep.runs, dataset.test_labels)
    return {name: results[name] for name in sweep.variants if name not in diverged}


def outline(sweep: Sweep) -> Iterable[str]:
    """The variants with what they change of the reference's recipe, and the runs in their order with where each stands,
    a line each; :class:`InputError` where :func:`fit_sweep` would raise it before it reads the data.
    """
    stands = standing(sweep)
    plans = plans_of(sweep, stands)
    yield f"{len(sweep.variants)} variants, {sweep.runs} runs each, on {sweep.dataset}, to {sweep.output}"
    for name, recipe in sweep.variants.items():
        yield f"{name}: {plans[name]}; {changes(recipe, Recipe()) or 'the recipe as published'}"
    parts = {name: read_parts(sweep.folder(name), str(sweep.folder(name))) for name in stands}
    for run in range(sweep.runs):
        for name in sweep.variants:
            found = [stands[name].result, *(part.result for part in parts[name].values())] if name in stands else []
            ended = any(one.run == run for result in found for one in result.runs)
            after = max((row.epoch for result in found for row in result.rows if row.run == run), default=0)
            state = "has ended" if ended else f"goes on after epoch {after}" if after else "to do"
            yield f"run {run + 1} of {name}, seed {sweep.seed + run}: {state}"


def begun(folder: Path) -> bool:
    """Whether a training has left something in ``folder`` to go on from."""
    return begun_alone(folder) or (folder / PARTS).exists()


def standing(sweep: Sweep) -> dict[str, Checkpoint]:
    """Where the variants stand that have been begun, by their names; :class:`InputError` where what is in their folders
    is not of this sweep. There may be more runs and more variants now.
    """
    cure = "take the sweep back to that, or give it another output"
    check(plan_of(sweep), sweep.seeds, sweep.runs, checkpoint_every=sweep.checkpoint_every)
    check_named(sweep.dataset, sweep.data_dir)
    check_writable(folder := Path(sweep.output).expanduser(), f"output {sweep.output}")
    for name in variants_in(folder) if (folder / SWEEP).exists() else ():
        if name not in sweep.variants and begun(folder / name):
            raise InputError(f"{folder}: the variant {name} was trained there, and is no part of the sweep now; {cure}")
    found = {}
    for name, recipe in sweep.variants.items():
        where = sweep.folder(name)
        if not begun(where):
            continue
        found[name] = checkpoint = read_checkpoint(where, str(where))
        changed = checkpoint.difference(recipe, plan_of(sweep, checkpoint), sweep.seeds, sweep.also_test)
        if (was := checkpoint.result.dataset["name"]) != sweep.dataset:
            changed = ("dataset", was, sweep.dataset)
        if (runs := checkpoint.result.settings["runs"]) > sweep.runs:
            changed = ("runs", f"{runs}, and may grow", str(sweep.runs))
        if changed:
            raise InputError(f"{where}: {changed[0]} was {changed[1]}, not {changed[2]}; {cure}")
    return found


def plan_of(sweep: Sweep, checkpoint: Checkpoint | None = None) -> BackendConfig:
    """What ``sweep`` asks for, ``auto`` as it was where ``checkpoint`` stands."""
    return (checkpoint.plan if checkpoint else resolve_backend)(
        sweep.backend, sweep.device, sweep.dtype, sweep.memory_format
    )


def plans_of(sweep: Sweep, stands: Mapping[str, Checkpoint]) -> dict[str, BackendConfig]:
    """The plan of each variant: its own where it was begun, that of the first begun for the others, so that they are
    trained alike.
    """
    first = next(iter(stands.values()), None)
    return {name: plan_of(sweep, stands.get(name, first)) for name in sweep.variants}


def variants_in(folder: Path) -> list[str]:
    """The names of the variants of the sweep in ``folder``, in their order."""
    try:
        return list(json.loads((folder / SWEEP).read_text())["variants"])
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        raise InputError(
            f"{folder / SWEEP}: cannot be read ({first_line(error)}); remove it, and sweep again"
        ) from None


@contextlib.contextmanager
def held(sweep: Sweep) -> Iterator[None]:
    """The sweep's folder with its ``sweep.json``, this process's own meanwhile; gone again if nothing was trained."""
    folder = Path(sweep.output).expanduser()
    what = f"output {sweep.output}"
    made = [above for above in (folder, *folder.absolute().parents) if not above.exists()]

    def refuse() -> None:
        raise InputError(f"{what}: another sweep is at work there; choose another folder")

    with contextlib.ExitStack() as stack:
        stack.callback(remove_empty, made)
        with writing(what):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder, refuse))
            remove_drafts(folder / SWEEP)
            sweep.save()
        try:
            yield
        finally:
            if not any(begun(folder / name) for name in variants_in(folder)):
                (folder / SWEEP).unlink()
