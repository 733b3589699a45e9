"""The processes that torchrun started: how they agree, split work, and notice the loss of one."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from cifar_fast.utils.errors import Diverged, InputError, MissingRuns, first_line

T = TypeVar("T")

PATIENCE = timedelta(days=365)
"""How long a rank waits for the others, whose runs may take days. The death of one is noticed at once."""


class ReportedOnRank0(InputError):
    """An error that rank 0 raises too, and reports."""


@dataclass(frozen=True)
class World:
    """The processes of a launch. ``local_rank`` counts on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_env(cls) -> World:
        """Read what torchrun has put into the environment; without it, return a world of one process."""
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
    def process_group(self) -> Iterator[World]:
        """Join the other processes inside the block, over gloo, which needs no GPU."""
        if self.size == 1:
            yield self
            return
        from torch import distributed

        try:
            store, rank, size = next(distributed.rendezvous("env://"))
            if os.environ.get("GROUP_WORLD_SIZE") == "1":  # a restart on one machine finds the same store again
                store = distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise InputError(f"rank {self.rank}: cannot join the others at {where} ({first_line(error)})") from error
        try:
            yield self
        finally:
            distributed.destroy_process_group()

    def gather(self, value: T, waiting: Callable[[], None] = lambda: None) -> list[T]:
        """Return the ``value`` of each rank, when all have come here; call ``waiting`` until then."""
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
    def all_or_none(self) -> Iterator[None]:
        """Let all ranks pass the block, or none: an :class:`InputError` on one is raised on all.

        Rank 0 raises it with the messages of all ranks, the others as :class:`ReportedOnRank0`.
        """
        raised = None
        try:
            yield
        except InputError as error:
            raised = error
        if self.size == 1 and raised:
            raise raised
        messages = self.gather(raised.message if raised else None)
        if not any(messages):
            return
        if self.rank:
            raise ReportedOnRank0("an error that rank 0 reports") from raised
        if len(set(messages)) == 1:
            raise InputError(messages[0]) from raised
        first_rank = {message: messages.index(message) for message in messages if message}
        raise InputError("; ".join(f"rank {rank}: {message}" for message, rank in first_rank.items())) from raised

    def broadcast(self, call: Callable[[], T]) -> T:
        """Call ``call`` on rank 0 alone; return its value on all ranks."""
        with self.all_or_none():
            value: Any = None if self.rank else call()
        return self.gather(value)[0]

    def rank0_first(self, call: Callable[[], T]) -> T:
        """Call ``call`` on rank 0, and then on the others, which find on disk what rank 0 left there."""
        value: Any = None
        for turn in (True, False):
            with self.all_or_none():
                if (self.rank == 0) == turn:
                    value = call()
        return value

    def split(self, items: Sequence[T], do: Callable[[T], object], waiting: Callable[[], None] = lambda: None) -> None:
        """Call ``do`` with this rank's items: ``items[rank]``, ``items[rank + size]``, ...

        Returns when all ranks are done, and calls ``waiting`` until then.
        """
        for item in items[self.rank :: self.size]:
            try:
                do(item)
            except (InputError, Diverged) as error:
                if self.size == 1:
                    raise
                raise type(error)(f"rank {self.rank}: {error.message}") from error
        self.gather(None, waiting)
