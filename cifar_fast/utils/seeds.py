"""Seeds and generators of a run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


def make_generators(seed: int, device: torch.device) -> tuple[torch.Generator, torch.Generator]:
    """The generators of a run's initial weights and of its draws, in the state in which ``torch.manual_seed(seed)``
    leaves torch's own; on a CPU both are one.

    They belong to the run alone: whoever draws elsewhere in the process changes nothing here, nor is changed.
    """
    weights = torch.Generator().manual_seed(seed)
    return weights, weights if device.type == "cpu" else torch.Generator(device).manual_seed(seed)


@dataclass(frozen=True)
class Seeds:
    """Where the random numbers of a training's runs come from.

    Run i has ``seed + i``. With none of the other three given, all its numbers come from one stream, as the reference
    script's. With any of them, initial weights, order and augmentation have a stream each: the one that is given is
    the same in all runs, the others go with ``seed + i``.
    """

    seed: int = 0
    init_seed: int | None = None
    order_seed: int | None = None
    augment_seed: int | None = None

    def for_run(self, run: int) -> Seeds:
        """The seeds of run ``run``, from 0; the last three all None or all numbers."""
        seed, apart = self.seed + run, (self.init_seed, self.order_seed, self.augment_seed)
        if apart == (None, None, None):
            return Seeds(seed)
        return Seeds(seed, *(seed if given is None else given for given in apart))

    def generators(self, device: torch.device) -> tuple[torch.Generator, torch.Generator, torch.Generator]:
        """Those of a run's initial weights, order and augmentation, for seeds as :meth:`for_run` gives them.

        The weights of an ``init_seed`` are those of the same ``seed``. The other streams are mixed from theirs, so that
        equal seeds do not make equal draws: crops that go with the order.
        """
        if self.init_seed is None or self.order_seed is None or self.augment_seed is None:
            weights, draws = make_generators(self.seed, device)
            return weights, draws, draws
        order, augmentation = (
            torch.Generator(device).manual_seed(derive_seed(seed, stream))
            for stream, seed in enumerate((self.order_seed, self.augment_seed), 1)
        )
        return torch.Generator().manual_seed(self.init_seed), order, augmentation


def derive_seed(seed: int, stream: int) -> int:
    """A seed for the random numbers of another kind, ``stream``, of the same run."""
    return int(np.random.SeedSequence(seed, spawn_key=(stream,)).generate_state(1, np.uint64)[0])
