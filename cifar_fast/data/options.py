"""How a data set is read, as one value: :class:`DataOptions`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_fast.data.arrays import split_key
from cifar_fast.recipe import IMAGE_SIZE, plain
from cifar_fast.utils.errors import InputError, option
from cifar_fast.utils.files import known_path

VALIDATION = ("val", "valid", "validation")
"""Names of the split that is the test split of data without one."""


def _field(default: Any, kind: type, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "kind": kind})


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Options of reading a data set.

    Each is an argument of :func:`cifar_fast.load_dataset`, a flag of the commands with the help text of the field, and
    a key of a sweep's file.

    Raises:
        InputError: a value is wrong for any data.
    """

    resize: int | None = _field(
        None,
        int,
        f"{IMAGE_SIZE}: crop images of other sizes to the largest central square and scale it to {IMAGE_SIZE} x "
        f"{IMAGE_SIZE}, bicubic with antialiasing",
    )
    test_fraction: float | None = _field(
        None, float, "fraction of the training images, of each class, to hold out for testing if there is no test split"
    )
    test_fraction_seed: int = _field(0, int, "seed of the choice of these images, the same in all runs")
    train_labels: str | None = _field(
        None,
        str,
        "labels to train on in place of the data set's: a .npy, .npz or .pt file, and after a colon the name of one of "
        "its arrays, such as CIFAR-10_human.pt:worse_label of CIFAR-10N",
    )
    test_labels: str | None = _field(
        None, str, "labels to test on in place of the data set's, such as cifar10h-probs.npy of CIFAR-10H"
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = plain(getattr(self, field.name))
            if value is None and field.default is None:
                continue
            kind = field.metadata["kind"]
            if kind is str and not isinstance(value, bool | int | float):
                value = str(value)  # a path
            if kind is float and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
            if not isinstance(value, kind) or isinstance(value, bool):
                what = {int: "a whole number", float: "a number", str: "a path"}[kind]
                raise InputError(f"{option(field.name)} must be {what}, not {value!r}")
            object.__setattr__(self, field.name, value)
        if self.resize not in (None, IMAGE_SIZE):
            raise InputError(f"{option('resize')} must be {IMAGE_SIZE}, the size that is trained on, not {self.resize}")
        if self.test_fraction is not None and not 0 < self.test_fraction < 1:
            raise InputError(f"{option('test_fraction')} must lie between 0 and 1, not {self.test_fraction:g}")
        if not 0 <= self.test_fraction_seed < 2**63:
            raise InputError(
                f"{option('test_fraction_seed')} must lie between 0 and 2^63, not {self.test_fraction_seed}"
            )

    @staticmethod
    def names() -> list[str]:
        """Return the names of the options."""
        return [field.name for field in dataclasses.fields(DataOptions)]

    def given(self) -> dict[str, Any]:
        """Return the options that differ from their defaults."""
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }

    def label_files(self) -> dict[str, tuple[Path, str]]:
        """Return the path of each given file of labels, and the name of its array, by the option."""
        given = {name: getattr(self, name) for name in ("train_labels", "test_labels")}
        return {name: split_key(value) for name, value in given.items() if value}

    def relocated(self, known: Mapping[str, str]) -> DataOptions:
        """Return the options with the absolute paths of files that a training read in another working folder.

        ``known`` has these paths, as :func:`known_path` takes them.
        """
        files = {name: (known_path(known, path, name), key) for name, (path, key) in self.label_files().items()}
        changes: dict[str, Any] = {name: f"{path}:{key}" if key else str(path) for name, (path, key) in files.items()}
        return dataclasses.replace(self, **changes)

    def test_split(self, splits: Iterable[str], source: str) -> str | None:
        """Return which of the ``splits`` of ``source`` to test on; None: test images are held out of the training ones.

        Raises:
            InputError: there is no split to test on and no fraction to hold out, or both.
        """
        found = [split for split in ("test", *VALIDATION) if split in splits]
        if found and self.test_fraction is not None:
            raise InputError(f"{source}: has the split {found[0]} to test on; leave {option('test_fraction')} out")
        if not found and self.test_fraction is None:
            raise InputError(
                f"{source}: has no split test or val; hold out a part of the training images with "
                f"{option('test_fraction')}, such as 0.2"
            )
        return found[0] if found else None
