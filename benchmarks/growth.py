"""Growth: whether the cost of a run, a fit, a row or a result depends on how many came before.

Each part repeats one thing in this process, on one thread, with a tiny network and few images. The table compares the
last tenth of the repetitions with the first tenth. Ratios within one process hold on a shared machine too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.rows import markdown
from cifar_fast import Recipe, fit
from cifar_fast.data.dataset import Dataset
from cifar_fast.data.synthetic import PATTERNS, textures
from cifar_fast.experiments.report import make_report, read_results
from cifar_fast.training.metrics import EpochRow
from cifar_fast.training.run_folder import RunFolder
from cifar_fast.utils.files import RUN_RESULT, TRAINING
from cifar_fast.utils.progress import LOGGER

RECIPE = Recipe(epochs=2, batch_size=16, widths=(4, 8))
HOW: dict[str, Any] = dict(backend="eager", device="cpu", dtype="float32", threads=1, log=None)


@dataclasses.dataclass(frozen=True)
class Totals:
    """CPU seconds and bytes written by this process so far, and the bytes of its memory now."""

    seconds: float
    written: int
    memory: int

    @classmethod
    def now(cls) -> Totals:
        io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(time.process_time(), int(io["wchar"]), 4096 * pages)

    def cost(self, before: Totals, count: int = 1) -> Totals:
        """Return the seconds and bytes since ``before``, divided by ``count``, and the memory now."""
        return Totals((self.seconds - before.seconds) / count, (self.written - before.written) // count, self.memory)


class Costs(list[Totals]):
    """The cost of each repetition, from one call of :meth:`mark` to the next."""

    def __init__(self) -> None:
        self.last = Totals.now()

    def mark(self) -> None:
        now = Totals.now()
        self.append(now.cost(self.last))
        self.last = now


def images() -> Dataset:
    """Return 64 training and 16 test images of textures."""
    return Dataset("npz", "few.npz", *textures(64, seed=0), *textures(16, seed=1), tuple(PATTERNS))


def runs(folder: Path, count: int) -> list[Totals]:
    """Train ``count`` runs into one folder. The files of all runs, written after the last one, are not counted."""
    costs = Costs()
    fit(
        RECIPE,
        images(),
        runs=count,
        output=folder / "out",
        on_epoch=lambda row: costs.mark() if row.epoch == RECIPE.epochs else None,
        **HOW,
    )
    return costs


def added(folder: Path, count: int) -> list[Totals]:
    """Add a run to a folder by a resume, ``count`` times."""
    data, costs = images(), Costs()
    for runs in range(1, count + 1):
        where: dict[str, Any] = {"output": folder / "out"} if runs == 1 else {"resume": folder / "out"}
        fit(RECIPE, data, runs=runs, **where, **HOW)
        costs.mark()
    return costs


def fits(folder: Path, count: int) -> list[Totals]:
    """Train ``count`` times, each time into a folder of its own."""
    data, costs = images(), Costs()
    for number in range(count):
        fit(RECIPE, data, seed=number, output=folder / str(number), **HOW)
        costs.mark()
    return costs


def rows(folder: Path, count: int) -> list[Totals]:
    """Write ``count`` rows of one training."""
    costs = Costs()
    with RunFolder(folder / "out") as out:
        for number in range(count):
            out.add_row(dataclasses.replace(EpochRow.before_first(0), epoch=number + 1))
            costs.mark()
    return costs


def results(folder: Path, count: int) -> list[Totals]:
    """Report on a tenth of ``count`` results, and on all of them. The cost is that of one result."""
    fit(RECIPE, images(), output=folder / "0", **HOW)
    for number in range(1, count):
        copy = shutil.copytree(folder / "0", folder / str(number))
        for path, key in ((copy / TRAINING, "config"), (copy / "run-0" / RUN_RESULT, "run")):
            content = json.loads(path.read_text())
            content[key]["seed"] = number
            path.write_text(json.dumps(content))
    costs = []
    for some in (min(10, count), count // 10, count):  # the first one loads modules
        begun = Totals.now()
        make_report(read_results([folder / str(number) for number in range(some)]).results).write(folder / "report")
        costs.append(Totals.now().cost(begun, some))
    return costs[1:]


PARTS: dict[str, tuple[Callable[[Path, int], list[Totals]], int]] = {
    "run of a training": (runs, 1000),
    "run added by a resume": (added, 300),
    "fit": (fits, 300),
    "row": (rows, 100_000),
    "result of a report": (results, 1000),
}
"""Each part by what it repeats, and how often."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Log no lines inside the block. The trainings here would print thousands."""
    level = LOGGER.level
    LOGGER.setLevel(logging.WARNING)
    try:
        yield
    finally:
        LOGGER.setLevel(level)


def table(share: float = 1.0) -> str:
    """Return the growth of each part as Markdown. ``share`` of the repetitions are made."""
    lines = []
    for name, (part, count) in PARTS.items():
        print(name, flush=True)
        number = max(10, round(share * count))
        with tempfile.TemporaryDirectory() as folder, quiet():
            costs = part(Path(folder), number)
        tenth = max(1, len(costs) // 10)
        first, last = costs[tenth // 10 :][:tenth], costs[-tenth:]  # the very first ones load modules
        times = [1000 * statistics.median(cost.seconds for cost in some) for some in (first, last)]
        written = [statistics.median(cost.written for cost in some) / 1000 for some in (first, last)]
        memory = [costs[at].memory / 1e6 for at in (tenth - 1, -1)]
        pairs = (f"{a:.3g} / {b:.3g}" for a, b in (times, written, memory))
        lines.append((name, str(number), *pairs, f"{times[1] / times[0]:.2f}"))
    return markdown(("repeated", "times", "CPU ms", "kB written", "MB of memory", "ratio of the times"), lines)
