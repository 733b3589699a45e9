"""The processes that torchrun started: how they agree, split work, and notice the loss of one."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from cifar_fast.utils.errors import InputError, MissingRuns, first_line
from cifar_fast.utils.progress import LOGGER

T = TypeVar("T")

PATIENCE = timedelta(days=365)
"""How long a rank waits for the others, whose runs may take days. The death of one is noticed at once."""

REMIND_SECONDS = 60.0
"""Seconds between two lines about a wait for other ranks."""

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables of torchrun that a world of several processes needs."""

LAUNCHERS = {"SLURM_NTASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}
"""Variables with the number of processes that another launcher started, and its command."""


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
        if not set(TORCHRUN) <= os.environ.keys():
            return cls()
        rank = os.environ["RANK"]
        try:
            world = cls(int(rank), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", rank)))
            port = int(os.environ["MASTER_PORT"])
        except ValueError as error:
            raise InputError(
                "RANK, WORLD_SIZE, LOCAL_RANK and MASTER_PORT must be numbers, as torchrun sets them "
                f"({first_line(error)})"
            ) from None
        if not 0 <= world.rank < world.size:
            raise InputError(
                f"RANK is {world.rank} and WORLD_SIZE is {world.size}, but ranks count from 0 to WORLD_SIZE - 1; start "
                "the processes with torchrun, or unset both"
            )
        if not 0 <= port < 2**16:
            raise InputError(f"MASTER_PORT must be from 0 to 65535, not {port}")
        return world

    def warn_if_alone(self) -> None:
        """Log a line if this process will train everything, although others seem to have started with it."""
        if set(TORCHRUN) <= os.environ.keys():
            return
        missing = ", ".join(name for name in TORCHRUN if name not in os.environ)
        for name in ("WORLD_SIZE", *LAUNCHERS):
            count = os.environ.get(name, "")
            if count.isdecimal() and int(count) > 1:
                task = f"task of {LAUNCHERS[name]}" if name in LAUNCHERS else "process"
                LOGGER.warning(
                    f"{name} is {count}, but torchrun's {missing} are not set: each {task} trains everything; start "
                    "the command with torchrun to split the runs"
                )
                return

    @contextlib.contextmanager
    def process_group(self) -> Iterator[World]:
        """Join the other processes inside the block, over gloo, which needs no GPU.

        A line says so while they are awaited. Ctrl-C ends the wait.
        """
        if self.size == 1:
            yield self
            return
        from torch import distributed

        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        try:
            _in_thread(
                self._join,
                f"rank {self.rank} waits for the other ranks of {self.size} at {where}, because RANK and WORLD_SIZE "
                "are set; to train in one process, press Ctrl-C and unset them",
            )
        except (RuntimeError, ValueError) as error:
            raise InputError(f"rank {self.rank}: cannot join the others at {where} ({first_line(error)})") from error
        with contextlib.ExitStack() as stack:
            stack.callback(distributed.destroy_process_group)
            try:
                yield self
            except BaseException as error:
                if not isinstance(error, Exception):  # an interrupt; destroying waits for ranks that still work
                    stack.pop_all()
                raise

    @staticmethod
    def _join() -> None:
        # Imported later, this module keeps the group in default arguments, beyond destroy_process_group: threads go on,
        # and one that frees a tensor while Python ends aborts the process.
        import torch.distributed.nn  # noqa: F401
        from torch import distributed

        store, rank, size = next(distributed.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # a restart on one machine finds the same store again
            store = distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)

    def gather(self, value: T, waiting: Callable[[], None] = lambda: None) -> list[T]:
        """Return the ``value`` of each rank, when all have come here; call ``waiting`` until then."""
        if self.size == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.size
        try:
            arrived = distributed.barrier(async_op=True)
            remind = time.monotonic() + REMIND_SECONDS
            while not arrived.is_completed():  # a wait in Python, which a signal ends
                time.sleep(0.05)
                waiting()
                if time.monotonic() >= remind:
                    LOGGER.info(f"rank {self.rank} waits for the other ranks, which are still at work")
                    remind += REMIND_SECONDS
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

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this rank's share of ``items``: ``items[rank]``, ``items[rank + size]``, ..."""
        return items[self.rank :: self.size]


def _in_thread(call: Callable[[], None], line: str) -> None:
    """Return when ``call``, which a signal cannot end, is done. Log ``line`` soon, and again each minute until then."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            call()
            future.set_result(None)
        except BaseException as error:  # raised again below
            future.set_exception(error)

    # Python waits for other threads at its end, but not for a daemon.
    threading.Thread(target=run, daemon=True).start()
    pause = 1.0  # ranks that start together arrive sooner
    while not wait([future], pause).done:
        LOGGER.warning(line)
        pause = REMIND_SECONDS
    future.result()
