"""``checkpoint.pt``: where a training stands, so that ``--resume`` goes on with the same bits."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cifar_fast.backends.base import Backend
from cifar_fast.backends.select import BackendConfig, resolve_backend
from cifar_fast.data.dataset import Dataset
from cifar_fast.recipe import Recipe
from cifar_fast.training.metrics import EpochRow
from cifar_fast.training.results import Result, plain, restored
from cifar_fast.utils.device import short_name
from cifar_fast.utils.errors import InputError, first_line, out_of_memory
from cifar_fast.utils.files import CHECKPOINT, PARTS, SUMMARY
from cifar_fast.utils.seeds import Seeds

FORMAT = 1
"""Of ``checkpoint.pt``; raised when what it holds changes its meaning."""

MOVES_BITS = ("torch", "triton", "cuda", "cudnn", "device_name", "threads")
"""What of the environment the last bits of a training depend on."""


@dataclass(frozen=True)
class Checkpoint:
    """The result so far, and what the run under way needs to go on after its last row.

    ``setup_seconds`` are that run's. ``state`` is as :meth:`cifar_fast.backends.base.Backend.training_state` gives it, None
    before the run's first epoch; ``generators`` are the states, uint8, of those of the order and the augmentation, and
    of those that an own model draws from.
    """

    result: Result
    setup_seconds: float = 0.0
    state: dict[str, Any] | None = field(default=None, repr=False)
    generators: list[torch.Tensor] = field(default_factory=list, repr=False)

    def save(self, path: Path) -> None:
        """Write it to the file ``path``, as plain tensors and numbers."""
        torch.save({"format": FORMAT} | vars(self) | {"result": plain(self.result)}, path)

    def restore(self, backend: Backend, generators: Iterable[torch.Generator]) -> EpochRow | None:
        """Take ``backend``, which was reset, and ``generators`` to where the run stands; gives the last row of the run,
        None at its start.
        """
        if self.state is None:
            return None
        try:
            backend.load_training_state(self.state)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise InputError(
                "the checkpoint's weights are not those of this model; go on with the one that was trained"
            ) from error
        for generator, state in zip(generators, self.generators):
            generator.set_state(state)
        return self.result.rows[-1]

    def plan(self, backend: str, device: str, dtype: str, memory_format: str) -> BackendConfig:
        """As :func:`cifar_fast.backends.select.resolve_backend`, where ``auto`` is what it was."""
        then = self.result
        own = torch.device(then.environment["device"])
        # Of several GPUs that shared the runs, one may not be here.
        there = own.type == "cpu" or (own.index or 0) < torch.cuda.device_count()
        was = (then.backend, str(own) if there else own.type, then.dtype, then.memory_format)
        now = (backend, device, dtype, memory_format)
        return resolve_backend(*(before if name == "auto" else name for name, before in zip(now, was)))

    def nothing_left(
        self,
        where: str,
        recipe: Recipe,
        plan: BackendConfig,
        seeds: Seeds,
        runs: int,
        also_test: Mapping[str, Any] | None,
        save_logits: bool,
        model: str | None = None,
    ) -> bool:
        """Whether all ``runs`` have ended; :class:`InputError`, which begins with ``where``, where this is another
        training than the one that is asked for. There may be more runs now.
        """
        if changed := self.difference(recipe, plan, seeds, also_test, save_logits, model):
            name, before, now = changed
            if name == "model":
                raise InputError(
                    f"{where}: the model was {before}, now {now}; go on in Python with the one that was trained, by "
                    "fit(..., model=, resume=)"
                )
            raise InputError(
                f"{where}: --{name.replace('_', '-')} was {before}, not {now}; leave the flag out, or start "
                "another training with --output"
            )
        if runs < (had := self.result.settings["runs"]):
            raise InputError(f"{where}: --runs was {had}, and may grow, but not shrink to {runs}")
        return len(self.result.runs) >= runs

    def difference(
        self,
        recipe: Recipe,
        plan: BackendConfig,
        seeds: Seeds,
        also_test: Mapping[str, Any] | None = None,
        save_logits: bool = False,
        model: str | None = None,
    ) -> tuple[str, str, str] | None:
        """The first of what the bits depend on that was another in this training: its name, what it was, and what it
        is now. None where all is the same.
        """
        settings, device = self.result.settings, torch.device(self.result.environment["device"])
        was: dict[str, Any] = dataclasses.asdict(self.result.recipe) | dict(
            backend=self.result.backend,
            device=device.type,
            dtype=self.result.dtype,
            memory_format=self.result.memory_format,
            **{name: settings[name] for name in vars(seeds)},
            also_test=tuple(settings["also_test"]),
            save_logits=settings.get("save_logits", False),
            model=self.result.model,
        )
        now: dict[str, Any] = dataclasses.asdict(recipe) | dict(
            backend=plan.backends[0],
            device=plan.device.type,
            dtype=short_name(plan.dtype),
            memory_format=short_name(plan.memory_format),
            **vars(seeds),
            also_test=tuple(also_test or {}),
            save_logits=save_logits,
            model=model,
        )
        for name, before in was.items():
            if now[name] != before:
                return name, _shown(before), _shown(now[name])
        return None

    def flags(self, given: argparse.Namespace) -> dict[str, Any]:
        """What the training was told, by the names of the flags of ``given``, as defaults for those left out there."""
        settings = self.result.settings
        names = ("seed", "init_seed", "order_seed", "augment_seed", "runs", "checkpoint_every")
        flags: dict[str, Any] = {name: settings[name] for name in names}
        flags["also_test"] = [] if given.also_test else [*settings["also_test"].items()]  # the flag adds to its default
        flags |= {"dataset": self.result.dataset["name"], "data_dir": settings["data_source"]}
        # Which files of before these flags lack.
        flags["save_logits"] = settings.get("save_logits", False)
        flags["log"] = "tensorboard" if settings.get("tensorboard") else "none"
        return flags if given.recipe else flags | dataclasses.asdict(self.result.recipe)

    def refuse_other_data(self, where: str, dataset: Dataset) -> None:
        """Raise :class:`InputError`, which begins with ``where``, if ``dataset`` is not the one that was trained on."""
        if dataset.digest != (was := self.result.dataset["digest"]):
            raise InputError(
                f"{where}: {dataset.source} is not the data set that was trained on (digest {dataset.digest[:12]}, not "
                f"{was[:12]}); name that one with --data-dir"
            )

    def moved(self, environment: Mapping[str, Any]) -> list[str]:
        """A line for each part of ``environment`` that is another than then and may change the last bits."""
        then = self.result.environment
        return [
            f"{name} was {then[name]}, now {environment[name]}: the last bits may differ"
            for name in MOVES_BITS
            if then[name] != environment[name]
        ]


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "not given"
    return "not given" if value is None else str(value)


def read_checkpoint(folder: Path, where: str) -> Checkpoint:
    """Where the training in ``folder`` stands, at its end too, as far as one process alone has taken it;
    :class:`InputError`, which begins with ``where``, where there is none to read.
    """
    parts = read_parts(folder, where).values()
    shared = max((part.result for part in parts), key=lambda result: result.settings["runs"], default=None)
    if shared is None:
        return _read(folder, where)
    if not begun_alone(folder):
        return Checkpoint(without_runs(shared))
    found = _read(folder, where)
    return dataclasses.replace(found, result=dataclasses.replace(found.result, settings=shared.settings))


def read_parts(folder: Path, where: str) -> dict[int, Checkpoint]:
    """Where the runs of the training in ``folder`` stand that processes share, by their numbers, in order."""
    begun = sorted(int(path.parent.name.partition("-")[2]) for path in folder.glob(f"{PARTS}/run-*/{CHECKPOINT}"))
    return {run: _read(part_folder(folder, run), where) for run in begun}


def part_folder(folder: Path, run: int) -> Path:
    """Where a process that takes that run alone, from 0, of the training in ``folder`` has it."""
    return folder / PARTS / f"run-{run}"


def begun_alone(folder: Path) -> bool:
    """Whether a training of one process has left something in ``folder`` to go on from."""
    return any((folder / name).exists() for name in (CHECKPOINT, SUMMARY))


def without_runs(result: Result) -> Result:
    """``result`` as it was before its first run."""
    return dataclasses.replace(result, rows=[], runs=[], logits=[], state_dict={})


def _read(folder: Path, where: str) -> Checkpoint:
    path = folder / CHECKPOINT
    try:
        if not path.exists():
            return Checkpoint(Result.load(folder))
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved.pop("format") != FORMAT:
            raise ValueError("of another format")
        return Checkpoint(**saved | {"result": restored(saved["result"])})
    except FileNotFoundError as error:
        raise InputError(
            f"{where}: holds no {CHECKPOINT}, and no {Path(error.filename).name} of a training that ended; nothing to "
            "go on from, start with --output"
        ) from None
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        name = path.name if path.exists() else "the results there"
        raise InputError(
            f"{where}: {name} cannot be read ({first_line(error)}); start again with --output and --overwrite"
        ) from None
