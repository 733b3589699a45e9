"""``checkpoint.pt``: the state of a run between two epochs, for a resume with the same bits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cifar_fast.backends.base import Backend
from cifar_fast.training.metrics import EpochRow
from cifar_fast.utils.device import AFFECTS_FIGURES
from cifar_fast.utils.errors import InputError, first_line, out_of_memory
from cifar_fast.utils.files import load_tensors, save_tensors
from cifar_fast.utils.typed import check_types, check_values

FORMAT = 2
"""Version of the format of ``checkpoint.pt``, increased when the meaning of its contents changes."""


@dataclass(frozen=True)
class Checkpoint:
    """The state that the next epoch of a run depends on.

    ``rows_digest`` is the value of :func:`cifar_fast.training.metrics.rows_digest` for the epochs that have ended. The
    rows themselves are in ``metrics.jsonl``, so a checkpoint does not grow with the epochs.
    ``state`` is the value of :meth:`cifar_fast.backends.base.Backend.training_state`. ``generators`` are the uint8
    states of the generators of order, augmentation and a custom model. ``environments`` are those of the epochs, as in
    :class:`cifar_fast.training.results.RunResult`.
    """

    rows_digest: str
    setup_seconds: float
    environments: list[dict[str, Any]]
    state: dict[str, Any] = field(repr=False)
    generators: list[torch.Tensor] = field(repr=False)

    @property
    def epoch(self) -> int:
        """Number of epochs that have ended."""
        return int(self.state["epoch"])

    def save(self, path: Path) -> None:
        """Write the checkpoint to the file ``path`` as plain tensors and numbers."""
        save_tensors({"format": FORMAT} | vars(self), path)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a checkpoint from the file ``path``. A damaged file may raise any exception."""
        saved = load_tensors(path)
        if type(found := saved.pop("format")) is not int or found != FORMAT:
            raise ValueError("of another format")
        checkpoint = cls(**saved)
        check_types(checkpoint)
        check_values(checkpoint.environments[-1], dict.fromkeys(AFFECTS_FIGURES, Any))
        return checkpoint

    def restore(self, backend: Backend, generators: Iterable[torch.Generator]) -> None:
        """Load the state into ``backend``, which was reset before, and into ``generators``.

        Raises:
            InputError: the state does not fit ``backend``.
        """
        try:
            backend.load_training_state(self.state)
            for generator, state in zip(generators, self.generators, strict=True):
                generator.set_state(state)
        except InputError as error:
            raise InputError(f"{error.message}; resume with the model that was trained") from error
        except Exception as error:  # a damaged file may raise any exception
            if out_of_memory(error) or isinstance(error, torch.AcceleratorError):
                raise
            hint = "move the folder of that run away to train it again"
            raise InputError(
                f"the checkpoint of an unfinished run does not fit ({first_line(error)}); {hint}"
            ) from error


class Unfinished(NamedTuple):
    """A run that can continue: its checkpoint, the rows of its epochs, and the name of the checkpoint's file."""

    checkpoint: Checkpoint
    rows: list[EpochRow]
    file: str
