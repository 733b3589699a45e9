"""Kill commands at their file operations, or cut the power there, and classify what a user can do next.

``shim.c`` counts the operations of a command on the files of a folder. For each case the command starts again, in a
fork of this process, and is killed before one operation.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import scipy.stats  # noqa: F401  (no fork needs to import it)
import torch
import torch.distributed.nn

from cifar_fast.cli.main import main
from cifar_fast.experiments import report
from cifar_fast.training import fit, run_folder
from cifar_fast.training.results import Result
from cifar_fast.utils.provenance import commit
from tests.faults.power import POWER, Operation, cut_power
from tests.helpers import plain, save_npz, small_dataset

CLASSES = ("same bits", "refused", "lost", "different", "crash")
"""The results are as without the fault; one line says why not; finished epochs were trained again; they differ and
nothing says so; a traceback, or no end."""

SPEC = """
dataset = "npz"
data_dir = "{base}/data.npz"
output = "{output}"
backend = "eager"
device = "cpu"
dtype = "float32"
[recipe]
epochs = 2
batch_size = 16
widths = [4]
[variants.baseline]
[variants.momentum]
momentum = 0.8
"""


@dataclass
class Scenario:
    """A command, the folder with the files that it finds, and the commands to try after a fault until one succeeds.

    ``wanted`` is what the working folder may hold in the end. ``losses`` are the test losses by run that its readers
    may find at any time. ``epochs`` are trained without a fault.
    """

    name: str
    command: str
    recover: list[str]
    prepared: Path | None = None
    processes: int = 1
    wanted: list[dict[str, Any]] = field(default_factory=list)
    losses: list[dict[int, float]] = field(default_factory=list)
    epochs: int = 0


@dataclass(frozen=True)
class Outcome:
    """The class of what a ``fault`` before ``operation`` leads to.

    ``repeated`` counts the epochs that were trained twice, and ``drafts`` the hidden files that stay.
    """

    fault: str
    operation: str
    found: str
    repeated: int = 0
    drafts: int = 0
    detail: str = ""


class Harness:
    """The scenarios, in the empty folder ``base``."""

    def __init__(self, base: Path) -> None:
        self.base, self.work, self.crashed, self.graves = base, base / "work", base / "crashed", base / "graves"
        self.shim = ctypes.CDLL(None)
        self.epochs = os.open(base / "epochs", os.O_CREAT | os.O_RDWR | os.O_APPEND)
        save_npz(base / "data.npz", small_dataset(train=16, test=8))
        (base / "sweep.toml").write_text(SPEC.format(base=base, output=self.work / "out"))
        add_row = run_folder.RunFolder.add_row

        def count_and_add(folder: Any, row: Any) -> None:
            os.write(self.epochs, b".")
            add_row(folder, row)

        run_folder.RunFolder.add_row = count_and_add  # type: ignore[method-assign]
        fit.device_timer = lambda device: itertools.count().__next__  # times change the sizes of files
        for module, name in ((run_folder, "draw_curves"), (run_folder, "draw_confusion"), (report, "save_png")):
            setattr(module, name, lambda *arguments: arguments[-1].write_bytes(b"a picture"))
        for name in ("variants_figure", "curves_figure"):
            setattr(report.Report, name, lambda report: None)
        commit()  # asks git once, for all forks

    def scenarios(self) -> Iterator[Scenario]:
        """Yield the scenarios."""
        out, sweep = self.work / "out", f"sweep {self.base}/sweep.toml"
        options = "--widths 4 --epochs 2 --batch-size 16 --device cpu --dtype float32 --backend eager --runs 2"
        train = f"train --dataset npz --data-dir {self.base}/data.npz {options} --output {out}"
        resume, replace, earlier = f"train --resume {out}", f"{train} --overwrite", f"{train} --seed 7"
        train += " --save-logits"
        finished, stopped = self.prepare("finished", earlier), self.prepare("stopped", earlier, checkpoints=3)
        yield Scenario("train", train, [resume, train])
        yield Scenario("resume", resume, [resume], self.prepare("half", train, checkpoints=3))
        yield Scenario("overwrite finished", replace, [resume, replace], finished)
        yield Scenario("overwrite stopped", replace, [resume, replace], stopped)
        yield Scenario("sweep", sweep, [sweep])
        yield Scenario("two processes", train, [resume, train], processes=2)
        for command in (
            f"report {out} --output {self.work}/report",
            f"predict {out} {self.base}/data.npz --device cpu",
        ):
            name = command.split()[0]
            command += f" --json {self.work}/predicted.json" if name == "predict" else ""
            yield Scenario(name, command, [command], finished)

    def prepare(self, name: str, command: str, checkpoints: int = 0) -> Path:
        """Return a copy of what ``command`` leaves; with ``checkpoints``, if it is killed after writing so many."""
        self.clean()
        self.run(command)
        if checkpoints:
            log = Operation.read(self.base / "log")
            saved = [
                number for number, one in enumerate(log, 1) if (one.kind, one.path.name) == ("rename", "checkpoint.pt")
            ]
            self.clean()
            self.wait(self.start(command, saved[checkpoints - 1] + 1))
        return shutil.copytree(self.work, self.base / name)

    def clean(self, prepared: Path | None = None) -> None:
        """Make the working folder new, with the files of ``prepared``."""
        for folder in (self.work, self.crashed, self.graves):
            shutil.rmtree(folder, ignore_errors=True)
        self.graves.mkdir()
        shutil.copytree(prepared, self.work) if prepared else self.work.mkdir()
        (self.base / "log").unlink(missing_ok=True)

    def start(self, command: str, stop: int = 0, half: bool = False, world: dict[str, str] | None = None) -> int:
        """Start ``command`` in a fork that dies before its file operation ``stop``, or in it; return the process id."""
        sys.stdout.flush()
        if pid := os.fork():
            return pid
        code = 70
        try:
            signal.alarm(120)
            os.environ.update(world or {})
            for number, name in ((1, "out"), (2, "error")):
                os.dup2(os.open(self.base / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
            log = os.open(self.base / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            folders = (str(folder).encode() for folder in (self.work, self.graves))
            self.shim.faults_arm(*folders, log, ctypes.c_long(stop), int(half))
            code = main(command.split())
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self, pid: int) -> int:
        """Wait for a process and return its exit code, negative for a signal."""
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def run(self, command: str) -> tuple[int, list[str]]:
        """Run ``command`` and return its exit code and its lines on standard error."""
        code = self.wait(self.start(command))
        return code, (self.base / "error").read_text().splitlines()

    def fault(self, scenario: Scenario, stop: int = 0, rank: int = 0, half: bool = False, power: bool = False) -> int:
        """Run the command of ``scenario``; its process ``rank`` dies at ``stop``. Return the id of that process.

        ``power``: the other processes die then too.
        """
        self.clean(scenario.prepared)
        if scenario.processes == 1:
            pid = self.start(scenario.command, stop, half)
            self.wait(pid)
            return pid
        with socket.create_server(("127.0.0.1", 0)) as server:
            world = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(server.getsockname()[1]))
        world["WORLD_SIZE"] = str(scenario.processes)
        pids = []
        for number in range(scenario.processes):
            own = world | dict(RANK=str(number), LOCAL_RANK=str(number))
            pids.append(self.start(scenario.command, stop if number == rank else 0, half, own))
        self.wait(pids[rank])
        for pid in pids[:rank] + pids[rank + 1 :]:
            if power:
                os.kill(pid, signal.SIGKILL)
            self.wait(pid)
        return pids[rank]

    def trained(self) -> int:
        """Return the number of epochs that were trained since this was asked last."""
        count = os.fstat(self.epochs).st_size
        os.ftruncate(self.epochs, 0)
        return count

    def contents(self) -> dict[str, Any]:
        """Return all that the working folder holds, without times, command lines and drafts."""
        files = (path for path in sorted(self.work.rglob("*")) if path.is_file() and not self.hidden(path))
        return {str(path.relative_to(self.work)): content(path) for path in files}

    def hidden(self, path: Path) -> bool:
        """Return whether ``path`` is a draft, or lies in a folder of earlier results that are being replaced."""
        return any(part.startswith(".") for part in path.relative_to(self.work).parts)

    def losses(self) -> dict[int, float]:
        """Return the test losses of the runs that a reader of the results finds."""
        try:
            runs = Result.load(self.work / "out", weights=False).runs
        except Exception:  # no results, or damaged ones, which the commands report
            return {}
        return {run.run: run.test_loss for run in runs if run.test_loss is not None}

    def measure(self, scenario: Scenario) -> list[list[Operation]]:
        """Run ``scenario`` without a fault, to know what is wanted. Return the operations of each of its processes."""
        if scenario.name.startswith("overwrite"):  # the earlier results may stay, and be finished
            self.clean(scenario.prepared)
            self.run(scenario.recover[0])
            scenario.wanted.append(self.contents())
            scenario.losses.append(self.losses())
        self.trained()
        first = self.fault(scenario)
        scenario.epochs = self.trained()
        scenario.wanted.append(self.contents())
        scenario.losses.append(self.losses())
        log = Operation.read(self.base / "log")
        pids = sorted({one.process for one in log}, key=lambda pid: (pid != first, pid))
        return [[one for one in log if one.process == pid] for pid in pids]

    def outcomes(self, scenario: Scenario, sample: int | None = None) -> Iterator[Outcome]:
        """Yield what becomes of ``scenario`` after a kill and after power cuts before each operation that succeeds.

        Writes to files that are no drafts are also done by half. ``sample`` is the number of kills, chosen evenly; None
        is all. Folders with files of the same names and sizes are resumed once.
        """
        processes = self.measure(scenario)
        points = [
            (rank, number, half)
            for rank, operations in enumerate(processes)
            for number, one in enumerate(operations, 1)
            if one.succeeded  # others change nothing, so the state before the next operation is the same
            for half in (False, True)[: 1 + (one.kind == "write" and not one.path.name.startswith("."))]
        ]
        seen: dict[Any, dict[str, Any]] = {}
        for rank, stop, half in points[:: max(1, len(points) // sample)] if sample else points:
            operation = processes[rank][stop - 1]
            name = f"{'half of ' * half}{operation.kind} {not_unique(operation.path).relative_to(self.base)}"
            for faults in [["kill", *POWER]] if scenario.processes == 1 else [["kill"], list(POWER)]:
                self.fault(scenario, stop, rank, half, power=faults == list(POWER))
                before, log = self.trained(), Operation.read(self.base / "log")
                self.work.rename(self.crashed)
                for fault in faults:
                    shutil.rmtree(self.work, ignore_errors=True)
                    shutil.copytree(self.crashed, self.work)
                    if fault in POWER:
                        cut_power(self.work, self.crashed, log, fault, random.Random(stop))
                    key = before, self.names_and_sizes()
                    seen[key] = seen.get(key) or self.classify(scenario, before)
                    yield Outcome(fault, name, **seen[key])

    def names_and_sizes(self) -> tuple[tuple[str, int, int], ...]:
        """Return the files of the working folder: name, size, and size without the zeros that a power cut left.

        Sizes of drafts, which nothing reads, are left out.
        """
        found = []
        for path in self.work.rglob("*"):
            data = b"" if path.is_dir() or path.name.startswith(".") else path.read_bytes()
            found.append((str(not_unique(path)), len(data), len(data.rstrip(b"\0"))))
        return tuple(sorted(found))

    def classify(self, scenario: Scenario, before: int) -> dict[str, Any]:
        """Do what a user does next, after ``before`` epochs, and return the fields of :class:`Outcome`."""
        losses = self.losses()
        if not any(losses.items() <= known.items() for known in scenario.losses):
            return dict(found="different", detail="a report mixes two trainings")
        refusal = ""
        for command in scenario.recover:
            code, lines = self.run(command)
            if code == 0:
                break
            if code not in (1, 2) or len(lines) != 1 or not lines[0].startswith("error: "):
                return dict(found="crash", detail=f"exit code {code}: {lines[-1:]}")
            if "there is nothing to resume" not in lines[0]:
                refusal = refusal or lines[0]
        repeated = max(0, before + self.trained() - scenario.epochs)
        found = dict(repeated=repeated, drafts=sum(map(self.hidden, self.work.rglob("*"))))
        contents = self.contents()
        if refusal or code:
            return found | dict(found="refused", detail=refusal or lines[0])
        if contents not in scenario.wanted:
            return found | dict(found="different", detail=difference(contents, scenario.wanted[-1]))
        if repeated > scenario.processes:  # more than the epoch of each process that has no checkpoint yet
            return found | dict(found="lost", detail=f"{repeated} epochs were trained again")
        return found | dict(found="same bits")


def not_unique(path: Path) -> Path:
    """Return ``path`` without what makes the name of a draft or of a hidden folder unique."""
    return Path(re.sub(r"(/\.replaced-|/\.[a-z-]+\.[a-z]+\.)[^/]+", r"\1", str(path)))


def content(path: Path) -> Any:
    """Return what is in a file, in a form that can be compared, without times."""
    try:
        if path.suffix == ".json":
            return plain(json.loads(path.read_text()))
        if path.suffix == ".jsonl":
            return [plain(json.loads(line)) for line in path.read_text().splitlines()]
    except ValueError:  # damaged, which the commands report
        return path.read_bytes()
    return plain(torch.load(path, weights_only=True)) if path.suffix == ".pt" else path.read_bytes()


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Return the names of the files that differ."""
    parts = {
        "missing": wanted.keys() - found.keys(),
        "too many": found.keys() - wanted.keys(),
        "other contents": {name for name in found.keys() & wanted.keys() if found[name] != wanted[name]},
    }
    return "; ".join(f"{what}: {', '.join(sorted(names))}" for what, names in parts.items() if names)
