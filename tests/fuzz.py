"""Mutated files for every reader: ``python -m tests.fuzz --inputs 10000 --seed 0``.

A worker process reads each input as a command would. The counts are:

    read        it was accepted
    refused     an error of one line
    traceback   an error of another kind, or of several lines
    crash       the process died
    hang        over 10 seconds of the processor, or two minutes
    memory      over 2 GiB more than before
    outside     a file was written outside the folder, or a program or connection was started
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

from cifar_fast.data import sources
from cifar_fast.training import run_folder
from cifar_fast.utils.device import environment
from cifar_fast.utils.errors import UserError, out_of_memory, visible
from cifar_fast.utils.progress import lines_to
from tests.fuzzing.mutations import Bomb, mutated
from tests.fuzzing.readers import READERS, write_files
from tests.helpers import KINDS

SECONDS, BYTES = 10.0, 2 << 30
FAILURES = ("traceback", "crash", "hang", "memory", "outside")
STARTED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")
CHANGED = ("open", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.remove", "os.rmdir")
CACHES = ("CACHES", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR")
"""Variables with the one folder that a reader may write to, besides its own."""
allowed: list[str] = []
events: list[str] = []


def watch(event: str, arguments: tuple) -> None:
    """Note what an input writes outside of the ``allowed`` folders, and what it starts."""
    if not allowed or event not in (*STARTED, *CHANGED):
        return
    if event in STARTED:
        events.append(f"{event} {arguments[:2]}")
    elif not (
        (event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        or (event == "os.mkdir" and os.path.exists(arguments[0]))
        or (event in ("os.remove", "os.rmdir") and arguments[1] >= 0)  # relative to a folder that is open
    ):
        paths = arguments[: 2 if event in ("os.rename", "os.link", "os.symlink") else 1]
        names = [os.path.abspath(os.fsdecode(path)) for path in paths if not isinstance(path, int)]
        events.extend(f"{event} {name}" for name in names if not name.startswith((*allowed, os.devnull)))


def status(name: str) -> int:
    """Return a value of this process's status on Linux, in bytes; 0 if it has none."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), 0)
    return 0


def verdict(name: str, folder: Path) -> tuple[str, str]:
    """Read ``folder`` with the reader ``name``. Return what happened, and details."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory is counted from here
    before, shown, found, detail = status("VmRSS"), io.StringIO(), "read", ""
    os.chdir(folder)
    events.clear()
    allowed[:] = [str(folder), os.environ["CACHES"]]
    try:
        with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(io.StringIO()), lines_to(None):
            code = READERS[name][1](folder)
        if isinstance(code, int) and code:
            found, detail = "refused", shown.getvalue()
    except UserError as error:
        found, detail = "refused" if visible(str(error)) == str(error) else "traceback", str(error)
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        found = "refused" if out_of_memory(error) else "traceback"
        detail = f"{type(error).__name__}: {error}"[:150] + f" at {Path(frame.filename).name}:{frame.lineno}"
    finally:
        allowed.clear()
    if (grown := status("VmHWM") - before) > BYTES:
        return "memory", f"{grown / 2**30:.1f} GiB; {detail}"
    return ("outside", events[0]) if events else (found, detail)


def work(connection) -> None:
    """Say that this process is ready, and then answer each (reader, folder) with its verdict."""
    for name in ("draw_curves", "draw_confusion"):  # drawing takes longer than reading
        setattr(run_folder, name, lambda *arguments: arguments[-1].touch())
    sources.MIRRORS["cifar10"] = KINDS["cifar10"].url = "http://127.0.0.1:9/none"
    environment(torch.device("cpu"))  # asks git for the commit, once
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # C libraries write there
    import matplotlib.font_manager  # noqa: F401  (starts a program that lists the fonts, once)

    sys.addaudithook(watch)
    connection.send("ready")
    while True:
        connection.send(verdict(*connection.recv()))


class Worker:
    """A process that is replaced after a crash or a hang."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.connection.recv()

    def seconds(self) -> float:
        """Return the processor's time of the process so far, because the machine may have other work."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def __call__(self, name: str, folder: Path) -> tuple[str, str, float]:
        """Return the verdict and its seconds of the processor."""
        start, begun = self.seconds(), time.monotonic()
        try:
            self.connection.send((name, folder))
            while not self.connection.poll(0.2):
                if self.seconds() - start > SECONDS or time.monotonic() - begun > 12 * SECONDS:
                    raise TimeoutError
            return *self.connection.recv(), self.seconds() - start
        except (EOFError, OSError) as error:
            found = "hang" if isinstance(error, TimeoutError) else "crash"
            self.process.kill()
            self.process.join()
            code = self.process.exitcode
            self.__init__()
            return found, f"exit code {code}", 0.0


def inputs(root: Path, count: int, seed: int, only: str | None = None):
    """Yield a reader, the file that is mutated, and the folder of the input, ``count`` times.

    A ``root`` and a ``seed`` always give the same inputs.
    """
    fresh, names, Bomb.place = write_files(root), [only] if only else list(READERS), str(root / "made")
    for number in range(count):
        draw, name = random.Random(f"{seed} {number}"), names[number % len(names)]
        file, folder = draw.choice(READERS[name][0]), root / "input"
        shutil.copytree(fresh / name, folder)
        (folder / file).write_bytes(mutated(file, (folder / file).read_bytes(), draw))
        yield name, file, folder
        shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=READERS, help="the only reader to try")
    parser.add_argument("--keep", type=Path, help="folder for copies of the inputs that failed")
    args = parser.parse_args()
    start, slowest, counts = time.monotonic(), 0.0, {name: Counter() for name in READERS}
    with tempfile.TemporaryDirectory() as root:
        for name in CACHES:
            os.environ[name] = f"{root}/caches"
        worker = Worker()
        for number, (name, file, folder) in enumerate(inputs(Path(root), args.inputs, args.seed, args.only)):
            found, detail, seconds = worker(name, folder)
            slowest = max(slowest, seconds)
            counts[name][found] += 1
            if number % 500 == 499:
                print(f"{number + 1} inputs, {time.monotonic() - start:.0f} s", flush=True)
            if found in FAILURES:
                print(f"input {number}: {name}, {file}: {found}: {visible(detail)}", flush=True)
                if args.keep:
                    shutil.copytree(folder, args.keep / f"{number}-{name}-{found}", dirs_exist_ok=True)
    for name, count in counts.items():
        print(f"{name:20}", ", ".join(f"{number} {found}" for found, number in sorted(count.items())))
    total = sum(counts.values(), Counter())
    shown = ", ".join(f"{total[found]} {found}" for found in ("read", "refused", *FAILURES))
    print(f"{args.inputs} inputs, seed {args.seed}: {shown}; {time.monotonic() - start:.0f} s, slowest {slowest:.1f} s")
    return 1 if any(total[found] for found in FAILURES) else 0


if __name__ == "__main__":
    sys.exit(main())
