"""Seeds and random number generators of a run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Seeds:
    """Seeds of the runs of a training.

    Run i uses ``seed + i``. If the other three seeds are None, one random stream per run gives all its numbers, as in
    the reference script. If any of them is set, initial weights, data order and augmentation have a stream each. A
    stream with a seed of its own is the same in all runs; the others use ``seed + i``.
    """

    seed: int = 0
    init_seed: int | None = None
    order_seed: int | None = None
    augment_seed: int | None = None

    def for_run(self, run: int) -> Seeds:
        """Return the seeds of run index ``run``. The last three are either all None or all numbers."""
        seed = self.seed + run
        separate = (self.init_seed, self.order_seed, self.augment_seed)
        if separate == (None, None, None):
            return Seeds(seed)
        return Seeds(seed, *(seed if fixed is None else fixed for fixed in separate))

    def generators(self, device: torch.device) -> tuple[torch.Generator, torch.Generator, torch.Generator]:
        """Return the generators of initial weights, data order and augmentation, for the seeds of one run.

        ``init_seed`` gives the same weights as an equal ``seed``. The seeds of order and augmentation are hashed, so
        that equal seeds do not give correlated draws, such as crops that depend on the order.
        """
        if self.init_seed is None or self.order_seed is None or self.augment_seed is None:
            weights, draws = make_generators(self.seed, device)
            return weights, draws, draws
        weights = torch.Generator().manual_seed(self.init_seed)
        order = torch.Generator(device).manual_seed(derive_seed(self.order_seed, 1))
        augmentation = torch.Generator(device).manual_seed(derive_seed(self.augment_seed, 2))
        return weights, order, augmentation


def make_generators(seed: int, device: torch.device) -> tuple[torch.Generator, torch.Generator]:
    """Return the generators of a run's initial weights and of its draws; on a CPU both are the same object.

    Their states equal the states that ``torch.manual_seed(seed)`` gives torch's default generators. The run owns them:
    other random draws in the process neither affect the run nor are affected by it.
    """
    weights = torch.Generator().manual_seed(seed)
    return weights, weights if device.type == "cpu" else torch.Generator(device).manual_seed(seed)


def derive_seed(seed: int, stream: int) -> int:
    """Return the seed of another random stream of the same run, as a hash of ``seed`` and ``stream``."""
    return int(np.random.SeedSequence(seed, spawn_key=(stream,)).generate_state(1, np.uint64)[0])
