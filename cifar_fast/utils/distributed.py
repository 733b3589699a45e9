"""The processes that torchrun started, which share runs out: how they agree, and what happens when one is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from cifar_fast.utils.errors import Diverged, InputError, MissingRuns, first_line

if TYPE_CHECKING:
    from cifar_fast.backends.select import BackendConfig

T = TypeVar("T")

PATIENCE = timedelta(days=365)
"""How long a process waits for the others, whose runs may take days; one that has died is noticed at once."""


@dataclass(frozen=True)
class World:
    """The processes of a launch, as the one of this ``rank`` sees them; ``local_rank`` is its number on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def stated(cls) -> World:
        """What torchrun states in the environment; one process alone where it states nothing."""
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            return cls()
        rank = os.environ["RANK"]
        try:
            return cls(int(rank), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", rank)))
        except ValueError as error:
            raise InputError(
                f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers, as torchrun sets them ({error})"
            ) from None

    @contextlib.contextmanager
    def joined(self) -> Iterator[World]:
        """With the others meanwhile, over gloo, which needs no GPU."""
        if self.size == 1:
            yield self
            return
        from torch import distributed

        try:
            store, rank, size = next(distributed.rendezvous("env://"))
            if os.environ.get("GROUP_WORLD_SIZE") == "1":  # one machine, on which a restart finds the same store again
                store = distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise InputError(f"rank {self.rank}: cannot join the others at {where} ({first_line(error)})") from error
        try:
            yield self
        finally:
            distributed.destroy_process_group()

    def own_device(self, plan: BackendConfig, asked: str) -> BackendConfig:
        """``plan`` on the GPU of this process's number, where ``asked``, the device's name, leaves open which."""
        import torch

        if self.size == 1 or plan.device.type != "cuda" or asked not in ("auto", "cuda"):
            return plan
        if self.local_rank >= (count := torch.cuda.device_count()):
            raise InputError(
                f"more processes than GPUs, {count} on this machine; start torchrun with --nproc-per-node {count}, or "
                "give --device cpu"
            )
        return dataclasses.replace(plan, device=torch.device("cuda", self.local_rank))

    def gather(self, value: T, waiting: Callable[[], None] = lambda: None) -> list[T]:
        """The ``value`` of each process, by rank, when all have come here; ``waiting`` is called meanwhile."""
        if self.size == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.size
        try:
            arrived = distributed.barrier(async_op=True)
            while not arrived.is_completed():  # a wait in Python, which a signal ends
                time.sleep(0.05)
                waiting()
            arrived.wait()
            distributed.all_gather_object(values, value)
        except RuntimeError as error:
            raise MissingRuns(f"rank {self.rank}: another process has ended before its runs had") from error
        return values

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """All processes go on after this, or none: where some raise :class:`InputError`, the first tells it for all."""
        raised = None
        try:
            yield
        except InputError as error:
            raised = error
        if self.size == 1 and raised:
            raise raised
        told = self.gather(str(raised) if raised else None)
        if not any(told):
            return
        if self.rank:
            raise SystemExit(2)
        lines: dict[str, int] = {}
        for rank, line in enumerate(told):
            if line:
                lines.setdefault(line, rank)
        alike = len(set(told)) == 1
        raise InputError(
            "; ".join(line if alike else f"rank {rank}: {line}" for line, rank in lines.items())
        ) from raised

    def from_first(self, call: Callable[[], T]) -> T:
        """What ``call`` gives in the first process, in all."""
        with self.together():
            value: Any = None if self.rank else call()
        return self.gather(value)[0]

    def first_before_others(self, call: Callable[[], T]) -> T:
        """What ``call`` gives in each process, the first before the others, which find on disk what it has left."""
        value: Any = None
        for turn in (True, False):
            with self.together():
                if (self.rank == 0) == turn:
                    value = call()
        return value

    def share(self, items: Sequence[T], do: Callable[[T], object], waiting: Callable[[], None] = lambda: None) -> None:
        """``do`` with every size-th of ``items`` from the one of this rank's number; ends when all processes have, and
        calls ``waiting`` until then.
        """
        for item in items[self.rank :: self.size]:
            try:
                do(item)
            except (InputError, Diverged) as error:
                if self.size == 1:
                    raise
                raise type(error)(f"rank {self.rank}: {error}") from error
        self.gather(None, waiting)
