"""The time that all runs of a process still take, on the bar of an epoch and in lines."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

from cifar_fast.utils.progress import LOGGER, duration, progress_bar

EVALUATED = 1 / 3
"""Work of an evaluated image. That of a trained image is 1, because a backward pass takes about two forward passes."""

FIRST_SECONDS = 5.0
"""Seconds of the first epoch before a line has the time to go. In a shorter epoch its own line is the first."""


class TimeToGo:
    """Estimate of the time that all runs of this process still take, with all epochs and evaluations.

    The unit of work is a trained image. A training has the speed of its own work so far, or that of all trainings
    before it has done any. ``ahead`` has the work of each run that has not begun, by the number of its training.
    """

    def __init__(self, ahead: Mapping[int, list[float]] | None = None) -> None:
        self.ahead = dict(ahead or {})
        self._waiting = {training: sum(works) for training, works in self.ahead.items()}  # a step costs no sum of runs
        self.status = "setting up"
        self._training, self._run, self._left, self._since = 0, "", 0.0, time.monotonic()
        self._done: dict[int, float] = defaultdict(float)
        self._seconds: dict[int, float] = defaultdict(float)
        self._announced = False

    def begin(self, training: int, run: int, runs: int) -> None:
        """Begin a run with its set-up."""
        self._training = training
        self._left = self.ahead[training].pop() if self.ahead.get(training) else 0.0
        self._waiting[training] = sum(self.ahead.get(training, ()))
        self._run = f"run {run} of {runs}, " if runs > 1 else ""
        self.status = f"{self._run}setting up"

    def skip(self, work: float) -> None:
        """Begin the steps of the run, of which ``work`` was done earlier."""
        self._left, self._since = self._left - work, time.monotonic()

    def end(self, is_last: bool = False) -> None:
        """End the run. ``is_last``: its training has no hope, and no further runs."""
        self._left = 0.0
        if is_last:
            self.ahead.pop(self._training, None)
            self._waiting.pop(self._training, None)

    def add(self, work: float) -> None:
        """Count ``work`` that was done since the last call."""
        now = time.monotonic()
        self._seconds[self._training] += now - self._since
        self._done[self._training] += work
        self._left, self._since = max(self._left - work, 0.0), now

    def seconds(self) -> float | None:
        """Return the estimate, or None before the first step."""
        done = sum(self._done.values())
        if not done:
            return None
        average = sum(self._seconds.values()) / done

        def pace(training: int) -> float:
            own = self._done.get(training)
            return self._seconds[training] / own if own else average

        return sum(work * pace(training) for training, work in (*self._waiting.items(), (self._training, self._left)))

    def __str__(self) -> str:
        """Return the estimate for a person, empty before the first step and after the end."""
        seconds = self.seconds() or 0.0
        return f"{duration(seconds)} to go" if seconds > 1e-3 else ""

    def line(self) -> str:
        """Return where the run is, and the estimate."""
        return ", ".join(filter(None, (self.status, str(self))))

    @contextlib.contextmanager
    def epoch(self, epoch: int, epochs: int, steps: int, batch_size: int) -> Iterator[Callable[[], None]]:
        """Show the bar of an epoch inside the block, and yield a function to call after each step."""
        done, began = 0, time.monotonic()
        with progress_bar(steps, f"{self._run}epoch {epoch}/{epochs}", "step") as bar:
            bar.set_postfix_str(str(self))

            def step() -> None:
                nonlocal done
                done += 1
                self.add(batch_size)
                told = f"step {done} of {steps}" if done < steps else "evaluating"
                self.status = f"{self._run}epoch {epoch} of {epochs}, {told}"
                bar.set_postfix_str(str(self), refresh=False)
                bar.update()
                if not self._announced and time.monotonic() - began > FIRST_SECONDS:
                    self._announced = True
                    LOGGER.info(f"about {self}, with all runs, epochs and evaluations")

            yield step
