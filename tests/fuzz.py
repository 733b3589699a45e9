"""Mutated files for every reader: ``python -m tests.fuzz --inputs 10000 --seed 0``.

Each input is a valid file that is changed at random: in its bytes, inside its compression, or in its values. A worker
process reads it as a command would. The counts are:

    read        it was accepted
    refused     an error of one line
    traceback   an error of another kind, or of several lines
    crash       the process died
    hang        over 10 seconds of the processor, or two minutes
    memory      over 2 GiB more than before
    outside     a file was written outside the folder, or a program was started
"""

import argparse
import contextlib
import gzip
import io
import json
import logging
import multiprocessing
import os
import pickle
import random
import shutil
import struct
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.io import savemat

from cifar_fast import Recipe, load_dataset, load_model
from cifar_fast.cli.main import main as command
from cifar_fast.data import sources
from cifar_fast.data.arrays import replaced_labels
from cifar_fast.data.eval_sets import read_eval_sets
from cifar_fast.data.images import decode_image
from cifar_fast.training import run_folder
from cifar_fast.utils.device import environment
from cifar_fast.utils.errors import UserError, out_of_memory
from cifar_fast.utils.progress import lines_to
from tests.helpers import KINDS, save_npz, small_dataset, stop_after, write_archive

SECONDS, BYTES = 10.0, 2 << 30
FAILURES = ("traceback", "crash", "hang", "memory", "outside")
TRAINING = "--widths 4 8 --epochs 2 --batch-size 8 --device cpu --dtype float32 --backend eager --runs 2 --save-logits"
IMAGES = ("png", "jpg", "gif", "webp", "tif", "bmp", "avif", "ppm", "mpo")
SWEEP = 'output="s"\ndevice="cpu"\nruns=2\n[recipe]\nepochs=2\nwidths=[4,8]\n[variants.m]\nmomentum=[0.8,0.9]\n'


class Bomb:
    """Writes a file if it is unpickled."""

    def __reduce__(self):
        return open, (str(Path(tempfile.gettempdir(), "cifar_fast_fuzz_bomb")), "w")


VALUES = (
    None,
    True,
    -1,
    0,
    1,
    7,
    2**31,
    2**63,
    -(2**70),
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "a",
    "\x1b[2J\n",
)
CONTAINERS = ([], {}, [[1]], {"a": 1}, [None] * 20, "9" * 5000)


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """Return ``data`` with one to four damages: bits, bytes, a cut, a hole, a repetition, or random bytes."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        if not out:
            break
        at, size = draw.randrange(len(out)), min(draw.choice((1, 2, 4, 8, 64, 1024)), len(out))
        kind = draw.randrange(7)
        if kind == 0:
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            out[at : at + size] = draw.choice((b"\0", b"\xff", b"\x7f", b"\x80", b"\n")) * size
        elif kind == 2:
            del out[at:]
        elif kind == 3:
            del out[at : at + size]
        elif kind == 4:
            out[at:at] = out[at : at + size]
        elif kind == 5:
            out[at : at + size] = draw.randbytes(size)
        else:
            out[at : at + 4] = struct.pack(
                draw.choice("<>") + "I", draw.choice((0, 1, 2**15, 2**30, 2**31 - 1, 2**32 - 1))
            )
    return bytes(out)


def mutate_value(value, draw: random.Random, extra: tuple = ()):
    """Return a tree of values with one of its branches or leaves changed."""
    inside = isinstance(value, (dict, list, tuple)) and len(value) and draw.random() < 0.85
    if inside and isinstance(value, dict):
        key = draw.choice(list(value))
        changed = mutate_value(value[key], draw, extra)
        kept = {name: one for name, one in value.items() if name != key}
        return draw.choice((value | {key: changed}, value | {key: changed}, kept, kept | {"other": changed}))
    if inside:
        place = draw.randrange(len(value))
        changed = [*value[:place], mutate_value(value[place], draw, extra), *value[place + 1 :]]
        return type(value)(draw.choice((changed, changed, value[:place], [*value, *value])))
    if isinstance(value, (np.ndarray, torch.Tensor)) and draw.random() < 0.7:
        array = np.atleast_1d(np.asarray(value))
        flat = array.reshape(-1)
        kinds = ("<f4", ">i8", "u1", "<U3", "b1", "c8", "<i4")
        array = draw.choice(
            (array[..., None], flat, flat[:3], array[:0], array[None], flat[0], array.astype(draw.choice(kinds)))
        )
        return (
            torch.from_numpy(array.copy()) if isinstance(value, torch.Tensor) and array.dtype.kind in "fiu" else array
        )
    return draw.choice((*VALUES, *CONTAINERS, *extra))


def _zip_members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {name: file.read(name) for name in file.namelist()}


def _pack_zip(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def _png(data: bytes, draw: random.Random) -> bytes:
    """Return a PNG with a damaged chunk whose checksum is right."""
    parts, at = [], 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        parts.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    place = draw.randrange(len(parts))
    parts[place] = parts[place][0], mutate_bytes(parts[place][1], draw)
    return data[:8] + b"".join(
        struct.pack(">I", len(one)) + kind + one + struct.pack(">I", zlib.crc32(kind + one)) for kind, one in parts
    )


def _saved(save: Callable, *values) -> bytes:
    file = io.BytesIO()
    save(file, *values)
    return file.getvalue()


def mutate(name: str, data: bytes, draw: random.Random) -> bytes:
    """Return a mutation of the valid file ``data``, whose kind its ``name`` tells."""
    suffix, deep = name.rpartition(".")[2], draw.random() < 0.6
    with contextlib.suppress(TypeError, ValueError, RuntimeError, AttributeError, OverflowError):
        if suffix == "json" and deep:
            return json.dumps(mutate_value(json.loads(data), draw)).encode()
        if suffix == "jsonl" and deep:
            return b"\n".join(json.dumps(mutate_value(json.loads(line), draw)).encode() for line in data.splitlines())
        if suffix in ("pt", "npz") and deep and draw.random() < 0.3:  # inside of the zip file, with its checksums
            members = _zip_members(data)
            chosen = draw.choice(list(members))
            return _pack_zip(members | {chosen: mutate_bytes(members[chosen], draw)})
        if suffix == "pt" and deep:
            tree = mutate_value(torch.load(io.BytesIO(data), weights_only=False), draw, (Bomb(), torch.zeros(2, 3)))
            return _saved(lambda file: torch.save(tree, file))
        if suffix == "npz" and deep:
            tree = mutate_value(dict(np.load(io.BytesIO(data))), draw, (np.array([Bomb()], dtype=object),))
            return _saved(lambda file: np.savez(file, **tree))
        if suffix == "gz" and deep:
            return gzip.compress(mutate_bytes(gzip.decompress(data), draw), 1)
        if suffix == "png" and deep:
            return _png(data, draw)
        if not Path(name).suffix and deep:
            return pickle.dumps(mutate_value(pickle.loads(data), draw, (Bomb(),)), draw.choice((0, 2, 4)))
    return mutate_bytes(data, draw)


@dataclass(frozen=True)
class Reader:
    """``files`` of the folder are mutated, one for each input, and ``read`` reads the folder."""

    files: tuple[str, ...]
    read: Callable[[Path], object]


def _hub(folder: Path) -> object:
    from unittest import mock

    siblings = [type("File", (), {"rfilename": name}) for name in ("README.md", "train.parquet", "test.parquet")]
    info = type("Info", (), {"siblings": siblings})
    with (
        mock.patch("huggingface_hub.HfApi.dataset_info", lambda *arguments: info),
        mock.patch("huggingface_hub.hf_hub_download", lambda repository, file, **how: str(folder / file)),
    ):
        return load_dataset("hf:a/b", log=None)


def _unchecked(folder: Path) -> object:
    """Read CIFAR as if every file had the published sum."""
    from unittest import mock

    with mock.patch("torchvision.datasets.utils.check_integrity", lambda path, md5=None: os.path.isfile(path)):
        with mock.patch("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: os.path.isfile(path)):
            return load_dataset("cifar10", folder, log=None)


def _extra(folder: Path) -> object:
    paths = {"npz": folder / "extra.npz", "npy": folder / "x_data.npy", "mat": folder / "x.mat"}
    return read_eval_sets(paths, ["a", "b"], resize=True)


RUN = (
    "training.json",
    "run-0/result.json",
    "run-1/checkpoint.pt",
    "metrics.jsonl",
    "run-0/model.pt",
    "run-0/logits.npz",
)
BATCHES = ("data_batch_1", "data_batch_3", "test_batch", "batches.meta")
READERS = {
    "npz": Reader(("data.npz",), lambda folder: load_dataset("npz", folder, log=None)),
    "archive": Reader(("cifar-10-python.tar.gz",), _unchecked),
    "pickles": Reader(BATCHES, _unchecked),
    "images": Reader(tuple(f"x.{kind}" for kind in IMAGES), lambda folder: [decode_image(path, "x", True) for path in sorted(folder.iterdir())]),
    "image folder": Reader(("set.cifar_fast.npz", "set/train/a/1.png"), lambda folder: load_dataset("folder", folder / "set", log=None)),
    "parquet": Reader(("train.parquet", "test.parquet", "README.md"), _hub),
    "labels": Reader(("labels.pt", "labels.npy"), lambda folder: [replaced_labels(str(path), "train_labels", np.arange(16) % 2, 2) for path in sorted(folder.iterdir())]),
    "extra sets": Reader(("extra.npz", "x_data.npy", "x_labels.npy", "x.mat"), _extra),
    "model": Reader(("model.pt",), lambda folder: load_model(folder / "model.pt").predict(np.zeros((2, 32, 32, 3), np.uint8))),
    "predict": Reader(("model.pt", "1.png"), lambda folder: command(["predict", "--device", "cpu", *map(str, sorted(folder.iterdir(), reverse=True))])),
    "resume": Reader(RUN, lambda folder: command(["train", "--resume", str(folder)])),
    "report": Reader(RUN[:2], lambda folder: command(["report", str(folder), "--output", str(folder / "report")])),
    "report of a sweep": Reader(("sweep.json",), lambda folder: command(["report", str(folder)])),
    "finished": Reader(("summary.json", "metrics.jsonl", "training.json", "run-1/result.json"), lambda folder: command(["train", "--resume", str(folder)])),
    "recipe": Reader(("recipe.json", "summary.json"), lambda folder: [Recipe.load(path) for path in sorted(folder.iterdir())]),
    "sweep": Reader(("sweep.toml",), lambda folder: command(["sweep", str(folder / "sweep.toml"), "--dry-run"])),
}  # fmt: skip


def make_files(root: Path) -> Path:
    """Write valid files for each reader below ``root``, and return the folder that holds a folder for each."""
    fresh, data = root / "fresh", small_dataset(16, 8, 2)
    for name in READERS:
        (fresh / name).mkdir(parents=True)
    npz = save_npz(fresh / "npz/data.npz", data, class_names=np.array(["a", "b"]))
    shutil.copy(npz, root / "data.npz")
    kind = KINDS["cifar10"]
    batches = small_dataset(20, 5, 2)
    named = type(batches)(
        "x", "x", batches.train_images, batches.train_labels, batches.test_images, batches.test_labels
    )
    write_archive(fresh / "archive", "cifar10", named)
    shutil.unpack_archive(fresh / "archive" / kind.filename, root / "unpacked", filter="data")
    for path in (root / "unpacked" / kind.base_folder).iterdir():
        shutil.copy(path, fresh / "pickles")
    image = Image.fromarray(data.train_images[0].repeat(2, 0))
    for suffix in IMAGES:
        image.save(fresh / f"images/x.{suffix}")
    for split in ("train", "test"):
        for label in "ab":
            folder = fresh / f"image folder/set/{split}/{label}"
            folder.mkdir(parents=True)
            image.crop((0, 0, 32, 32)).save(folder / "1.png")
    load_dataset("folder", fresh / "image folder/set", log=None)
    _write_parquet(fresh / "parquet", data)
    labels = torch.from_numpy(data.train_labels)
    torch.save({"clean_label": labels, "worse_label": data.train_labels}, root / "pair.pt")
    torch.save({"worse_label": data.train_labels}, fresh / "labels/labels.pt")
    np.save(fresh / "labels/labels.npy", np.eye(2)[data.train_labels])
    extra = fresh / "extra sets"
    np.savez(extra / "extra.npz", images=data.test_images, labels=data.test_labels, class_names=np.array(["b", "a"]))
    np.save(extra / "x_data.npy", data.test_images)
    np.save(extra / "x_labels.npy", data.test_labels)
    savemat(extra / "x.mat", {"X": np.moveaxis(data.test_images, 0, -1), "y": data.test_labels[:, None]})
    for folder, stop in (("resume", True), ("finished", False)):
        flags = f"train --dataset npz --data-dir {root}/data.npz {TRAINING} --also-test x={root}/data.npz --log none"
        with lines_to(stop_after(*[(1, 2)] * stop)), contextlib.redirect_stdout(io.StringIO()):
            command([*flags.split(), "--output", str(fresh / folder)])
    shutil.copytree(fresh / "resume", fresh / "report", dirs_exist_ok=True)
    shutil.copytree(fresh / "finished", fresh / "report of a sweep/v")
    (fresh / "report of a sweep/sweep.json").write_text(json.dumps({"variants": {"v": {}}, "output": "s"}))
    for folder in ("model", "predict"):
        shutil.copy(fresh / "finished/model.pt", fresh / folder)
    shutil.copy(fresh / "images/x.png", fresh / "predict/1.png")
    shutil.copy(fresh / "finished/summary.json", fresh / "recipe")
    Recipe().save(fresh / "recipe/recipe.json")
    (fresh / "sweep/sweep.toml").write_text(SWEEP)
    return fresh


def _write_parquet(folder: Path, data) -> None:
    import pyarrow
    from pyarrow import parquet

    features = {"info": {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}}
    for split, images, labels in (
        ("train", data.train_images, data.train_labels),
        ("test", data.test_images, data.test_labels),
    ):
        encoded = [
            {"bytes": _saved(lambda file: Image.fromarray(one).save(file, "PNG")), "path": None} for one in images
        ]
        table = pyarrow.table({"img": encoded, "label": labels})
        parquet.write_table(
            table.replace_schema_metadata({"huggingface": json.dumps(features)}), folder / f"{split}.parquet"
        )
    (folder / "README.md").write_text("---\ndataset_info:\n  features: []\n---\n")


events: list[str] = []
inside: list[str] = []


def _watch(event: str, arguments: tuple) -> None:
    """Note files that are written outside the folder, and programs and connections that are started."""
    if not inside or any(isinstance(one, int) and one >= 0 for one in arguments[1:] if event.startswith("os.r")):
        return  # a path relative to a folder that is open
    paths = arguments[:2] if event in ("os.rename", "os.link", "os.symlink") else arguments[:1]
    if event == "os.mkdir" and os.path.exists(arguments[0]):
        return
    if event == "open" and not (
        isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    ):
        return
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect"):
        events.append(f"{event} {arguments[:2]}")
    elif event in ("open", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.remove", "os.rmdir"):
        for path in paths:
            if isinstance(path, (str, bytes, os.PathLike)) and os.fspath(path) != os.devnull:
                if not os.path.abspath(os.fsdecode(path)).startswith(tuple(inside)):
                    events.append(f"{event} {path}")


def _status(name: str) -> int:
    """Return a value of this process's status in bytes."""
    return next(
        (
            1024 * int(line.split()[1])
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith(name)
        ),
        0,
    )


def verdict(name: str, folder: Path) -> tuple[str, str]:
    """Read ``folder`` with the reader ``name``. Return what happened, and where."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory is counted from here
    before, shown, found, where = _status("VmRSS"), io.StringIO(), "read", ""
    events.clear()
    inside[:] = [str(folder), os.environ["CACHES"]]
    os.chdir(folder)
    try:
        with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(io.StringIO()), lines_to(None):
            code = READERS[name].read(folder)
        if isinstance(code, int) and code:
            found, where = "refused", shown.getvalue()
    except UserError as error:
        found, where = "refused", str(error)
        if "\n" in where or "\x1b" in where:
            found = "traceback"
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        frames = [one for one in frames if "cifar_fast" in one.filename] or frames
        found = "refused" if out_of_memory(error) else "traceback"
        where = f"{type(error).__name__}: {error}"[:150] + f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}"
    finally:
        inside.clear()
    if _status("VmHWM") - before > BYTES:
        found, where = "memory", f"{(_status('VmHWM') - before) / 2**30:.1f} GiB, {where}"
    return ("outside", events[0]) if events else (found, where)


def prepare() -> None:
    """Let this process read as a command does, without what takes long and reads no input."""
    logging.getLogger("cifar_fast").setLevel(logging.CRITICAL)
    environment(torch.device("cpu"))
    for name in ("draw_curves", "draw_confusion"):
        setattr(run_folder, name, lambda *arguments: arguments[-1].touch())
    sys.addaudithook(_watch)
    sources.MIRRORS["cifar10"] = "http://127.0.0.1:9/none"
    KINDS["cifar10"].url = "http://127.0.0.1:9/none"


def work(connection) -> None:
    """Answer each (reader, folder) with its verdict, after a first answer when this process is ready."""
    prepare()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # C libraries write there
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
        """Return the CPU time of the process so far, because this machine may have other work."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def __call__(self, name: str, folder: Path) -> tuple[str, str]:
        start, begun = self.seconds(), time.monotonic()
        try:
            self.connection.send((name, folder))
            while not self.connection.poll(0.2):
                if self.seconds() - start > SECONDS or time.monotonic() - begun > 12 * SECONDS:
                    return self.replaced("hang", "")
            return self.connection.recv()
        except (EOFError, OSError):
            return self.replaced("crash", f"exit code {self.process.exitcode}")

    def replaced(self, *found: str) -> tuple[str, ...]:
        self.process.kill()
        self.process.join()
        self.__init__()
        return found


def inputs(root: Path, count: int, seed: int):
    """Yield the name of a reader, the name of a file and a folder with a mutation of it, ``count`` times."""
    fresh, names = make_files(root), list(READERS)
    for number in range(count):
        draw, name = random.Random(f"{seed} {number}"), names[number % len(names)]
        file, folder = draw.choice(READERS[name].files), root / "in" / str(number)
        shutil.copytree(fresh / name, folder)
        mutated = mutate(file, (folder / file).read_bytes(), draw)
        (folder / file).write_bytes(mutated)
        yield name, file, folder
        shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for copies of the inputs that failed")
    parser.add_argument("--only", help="a reader")
    args = parser.parse_args()
    start, slowest = time.monotonic(), 0.0
    counts: dict[str, Counter] = {name: Counter() for name in READERS}
    for name in [one for one in READERS if args.only and one != args.only]:
        READERS.pop(name)
    with tempfile.TemporaryDirectory() as root:
        for name in ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "CACHES"):
            os.environ[name] = f"{root}/caches"
        worker = Worker()
        for number, (name, file, folder) in enumerate(inputs(Path(root), args.inputs, args.seed)):
            begun = time.monotonic()
            found, where = worker(name, folder)
            slowest = max(slowest, time.monotonic() - begun) if number > 20 else slowest
            counts[name][found] += 1
            if found in FAILURES:
                print(f"input {number}: {name}, {file}: {found}: {where}", flush=True)
                if args.keep:
                    shutil.copytree(folder, args.keep / f"{number}-{found}", dirs_exist_ok=True)
    for name, count in counts.items():
        print(f"{name:18}", ", ".join(f"{number} {found}" for found, number in sorted(count.items())))
    total = sum(counts.values(), Counter())
    print(
        f"{args.inputs} inputs, seed {args.seed}: {dict(total)}, {time.monotonic() - start:.0f} s, slowest {slowest:.1f} s"
    )
    return 1 if any(total[found] for found in FAILURES) else 0


if __name__ == "__main__":
    sys.exit(main())
