"""The options of a training as one value, without torch: :class:`TrainConfig`."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cifar_fast.recipe import BACKENDS, DTYPES, MEMORY_FORMATS, Recipe, plain
from cifar_fast.utils.errors import InputError, option, require_instance

MAX_RUNS = 1_000_000

Config = TypeVar("Config", bound="TrainConfig")


def _field(default: Any, help: str, *, choices: tuple[str, ...] = (), may_change: bool = False) -> Any:
    """Return a field with its help text. ``may_change``: a resumed training may use another value."""
    metadata = {"help": help, "choices": choices, "may_change": may_change}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All options of a training.

    Each is an argument of ``fit``, a flag of ``cifar-fast train`` with the help text of the field, and a key of a
    sweep's file. ``summary.json`` and ``training.json`` hold the values under the same names.

    Raises:
        InputError: a value is wrong for any data and any device.
    """

    recipe: Recipe = dataclasses.field(default=Recipe(), metadata={"help": "recipe to train", "may_change": False})
    backend: str = _field(
        "auto",
        "eager: the reference; compiled: torch.compile; fused: our kernels, on a GPU in one CUDA graph; "
        "auto: the fastest here",
        choices=BACKENDS,
    )
    device: str = _field("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = _field(
        "auto",
        "float16 and float32: all tensors have this dtype; bfloat16: autocast in training, with float32 weights",
        choices=DTYPES,
    )
    memory_format: str = _field(
        "auto",
        "memory format of the batches; the reference script uses contiguous_format (NCHW); auto means "
        "contiguous_format if the backend is given as eager, and channels_last otherwise",
        choices=MEMORY_FORMATS,
    )
    seed: int = _field(0, "seed of the weights, the order and the augmentation; run i uses seed + i")
    init_seed: int | None = _field(None, "seed of the initial weights alone, the same in all runs")
    order_seed: int | None = _field(None, "seed of the order alone, the same in all runs")
    augment_seed: int | None = _field(None, "seed of the augmentation alone, the same in all runs")
    validation: int | float = _field(
        0,
        "training images to hold out, a number or a fraction of all, with the same share of each class; each epoch is "
        "then also evaluated on them",
    )
    validation_seed: int = _field(0, "seed of the choice of the validation images, which is the same in all runs")
    runs: int = _field(1, "number of trainings from scratch, each with the next seed", may_change=True)
    checkpoint_every: int = _field(
        1,
        "epochs between checkpoints; each run also writes a checkpoint at its end; 0: only this last one",
        may_change=True,
    )
    verify_every: int = _field(
        0,
        "steps between checks that train a step twice from the same state; if a bit differs, the run ends with an "
        "error; 0: no check",
        may_change=True,
    )
    also_test: Mapping[str, str | Path] = _field(
        {},
        "also report the accuracy at the end of each run on another test set: CIFAR-10.1, CIFAR-10.2, CIFAR-10-C as "
        "published, or a .npz file with images and labels; can be given several times",
    )
    save_logits: bool = _field(False, "keep the logits of the test images of each run, in logits.npz")
    tta: bool = _field(
        False,
        "also report the test accuracy with test-time augmentation: logits averaged over six views of each image",
    )
    tensorboard: bool = _field(
        False, "also write loss, accuracies and learning rate for TensorBoard, under tensorboard/", may_change=True
    )
    threads: int | None = _field(
        None, "CPU threads; by default those that torch had when this package was imported", may_change=True
    )

    def __post_init__(self) -> None:
        require_instance("recipe", self.recipe, Recipe, "a Recipe, such as Recipe(epochs=6)")
        object.__setattr__(self, "validation", _held_out(plain(self.validation)))
        seeds = ("seed", "init_seed", "order_seed", "augment_seed", "validation_seed")
        for name in (*seeds, "runs", "checkpoint_every", "verify_every", "threads"):
            value = getattr(self, name)
            if value is None and getattr(TrainConfig, name) is None:  # the default
                continue
            try:
                object.__setattr__(self, name, operator.index(plain(value)))
            except TypeError:
                raise InputError(f"{option(name)} must be a whole number, not {value!r}") from None
        for name, lowest in {"runs": 1, "checkpoint_every": 0, "verify_every": 0, "threads": 1}.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise InputError(f"{option(name)} must be at least {lowest}, not {value}")
        if self.runs > MAX_RUNS:
            raise InputError(f"{option('runs')} must be at most {MAX_RUNS}, not {self.runs}")
        for name in seeds:
            value = getattr(self, name)
            if value is not None and not 0 <= value < 2**63 - self.runs:
                raise InputError(f"{option(name)} must lie between 0 and 2^63, not {value}")
        for name in ("save_logits", "tta", "tensorboard"):
            value = plain(getattr(self, name))
            if not isinstance(value, bool):
                raise InputError(f"{option(name)} must be true or false, not {value!r}")
            object.__setattr__(self, name, value)
        if not isinstance(self.also_test or {}, Mapping):
            raise InputError(f"{option('also_test')} must be paths by names, not {self.also_test!r}")
        also_test = {str(name): str(path) for name, path in (self.also_test or {}).items()}
        object.__setattr__(self, "also_test", also_test)

    def check_runs_differ(self) -> None:
        """Raise :class:`InputError` if several runs have the same seeds, because their results would be equal."""
        names = ["init_seed", "order_seed", *(["augment_seed"] if self.recipe.augments else [])]
        if self.runs > 1 and all(getattr(self, name) is not None for name in names):
            given = " and ".join(", ".join(map(option, names)).rsplit(", ", 1))
            without = "" if self.recipe.augments else ", and nothing is augmented"
            raise InputError(
                f"{option('runs')} {self.runs}: the runs would be equal, because {given} are the same in all of "
                f"them{without}; leave one of the seeds out, or ask for one run"
            )

    @staticmethod
    def names() -> list[str]:
        """Return the names of the options other than the recipe."""
        return [field.name for field in dataclasses.fields(TrainConfig) if field.name != "recipe"]

    @staticmethod
    def help(name: str) -> str:
        """Return the help text of an option."""
        return _metadata(name)["help"]

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON stores them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Return the config that :meth:`to_dict` gave."""
        return TrainConfig(**dict(values) | {"recipe": Recipe(**values["recipe"])})

    def replace(self: Config, **changes: Any) -> Config:
        """Return a copy with ``changes``."""
        return dataclasses.replace(self, **changes)

    def resuming(self: Config, earlier: TrainConfig) -> Config:
        """Return this config with values from ``earlier`` for ``auto``, and for ``threads`` if it is None.

        ``earlier`` is the config of the training that is resumed.
        """
        names = ("backend", "device", "dtype", "memory_format")
        kept = {name: getattr(earlier, name) for name in names if getattr(self, name) == "auto"}
        return self.replace(**kept, threads=earlier.threads if self.threads is None else self.threads)

    def difference(self, earlier: TrainConfig) -> tuple[str, str, str] | None:
        """Find the first option that differs but must not change on a resume.

        Return its name, its earlier value and its new value, or None if there is no such option.
        """
        pairs = [(name, getattr(earlier.recipe, name), getattr(self.recipe, name)) for name in vars(self.recipe)]
        for name in self.names():
            if not _metadata(name)["may_change"]:
                before, now = getattr(earlier, name), getattr(self, name)
                if name == "also_test":  # the files may have moved
                    before, now = tuple(before), tuple(now)
                if name == "device":  # one of several GPUs may be gone
                    before, now = before.partition(":")[0], now.partition(":")[0]
                pairs.append((name, before, now))
        return next(((name, _shown(before), _shown(now)) for name, before, now in pairs if before != now), None)


def _held_out(value: Any) -> int | float:
    """Return a number of validation images from 0, or a fraction of the training images below 1."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if is_count or (isinstance(value, float) and 0 <= value < 1):
        return value or 0
    raise InputError(f"{option('validation')} must be a number of images or a fraction between 0 and 1, not {value!r}")


def _metadata(name: str) -> Mapping[str, Any]:
    return TrainConfig.__dataclass_fields__[name].metadata


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "not given"
    return "not given" if value is None else str(value)
