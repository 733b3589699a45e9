"""``checkpoint.pt``: the state of a run between two epochs, for a resume with the same bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cifar_fast.backends.base import Backend
from cifar_fast.training.metrics import EpochRow, rows_of
from cifar_fast.utils.device import AFFECTS_FIGURES
from cifar_fast.utils.errors import InputError, first_line
from cifar_fast.utils.files import CHECKPOINT
from cifar_fast.utils.typed import check_types, check_values

FORMAT = 1
"""Version of the format of ``checkpoint.pt``, increased when the meaning of its contents changes."""


@dataclass(frozen=True)
class Checkpoint:
    """The rows of the epochs that have ended, and the state that the next epoch of the run depends on.

    ``state`` is the value of :meth:`cifar_fast.backends.base.Backend.training_state`. ``generators`` are the uint8
    states of the generators of order, augmentation and a custom model. ``environments`` are those of the epochs, as in
    :class:`cifar_fast.training.results.RunResult`.
    """

    rows: list[EpochRow]
    setup_seconds: float
    environments: list[dict[str, Any]]
    state: dict[str, Any] = field(repr=False)
    generators: list[torch.Tensor] = field(repr=False)

    def save(self, path: Path) -> None:
        """Write the checkpoint to the file ``path`` as plain tensors and numbers."""
        torch.save({"format": FORMAT} | vars(self) | {"rows": [dataclasses.asdict(row) for row in self.rows]}, path)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a checkpoint from the file ``path``. A damaged file may raise any exception."""
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if type(found := saved.pop("format")) is not int or found != FORMAT:
            raise ValueError("of another format")
        rows = saved["rows"]
        checkpoint = cls(**saved | {"rows": rows_of(rows[0]["run"], rows)})
        check_types(checkpoint)
        check_values(checkpoint.environments[-1], dict.fromkeys(AFFECTS_FIGURES, Any))
        if checkpoint.state["epoch"] != checkpoint.rows[-1].epoch:
            raise ValueError("the state is not that of its last epoch")
        return checkpoint

    def restore(self, backend: Backend, generators: Iterable[torch.Generator]) -> None:
        """Load the state into ``backend``, which was reset before, and into ``generators``.

        Raises:
            InputError: the state does not fit ``backend``.
        """
        try:
            backend.load_training_state(self.state)
        except InputError as error:
            raise InputError(f"{error.message}; resume with the model that was trained") from error
        except Exception as error:  # a damaged file may raise any exception
            raise self._misfit(error) from error
        try:
            for generator, state in zip(generators, self.generators, strict=True):
                generator.set_state(state)
        except Exception as error:
            raise self._misfit(error) from error

    def _misfit(self, error: Exception) -> InputError:
        run = self.rows[0].run
        return InputError(
            f"run {run}: its {CHECKPOINT} does not fit ({first_line(error)}); remove that file to train the run again"
        )
