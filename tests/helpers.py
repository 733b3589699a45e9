"""Helpers of the tests: small data sets, published archives, processes, results of trainings."""

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from cifar_fast import Dataset
from cifar_fast.backends.base import Backend
from cifar_fast.data.dataset import ARRAYS
from cifar_fast.data.tensors import Normalization
from cifar_fast.training.config import TrainConfig
from cifar_fast.training.fit import Training, train_all, used_options

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("CIFAR_FAST_SHARED", Path(__file__).parents[2] / "shared"))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NARROW = (4, 8, 8, 8, 16, 32, 32, 32)
HOW = dict(backend="eager", device="cpu", dtype="float32", log=None)
TIMES = ("train_seconds", "evaluation_seconds", "setup_seconds", "command", "started")
KINDS = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def small_dataset(train=96, test=40, classes=3, seed=0):
    """Return random images with labels that can be learned: class k is brighter than class k - 1."""
    random = np.random.RandomState(seed)

    def split(n):
        labels = np.arange(n) % classes
        images = random.randint(0, 100, (n, 32, 32, 3)) + labels[:, None, None, None] * (155 // classes)
        return images.astype(np.uint8), labels

    (train_images, train_labels), (test_images, test_labels) = split(train), split(test)
    return Dataset("npz", "small.npz", train_images, train_labels, test_images, test_labels)


def normalize(dataset, device, dtype):
    """Return the normalized training and test images of ``dataset``, ``[N, S, S, C]``, as eager has them."""
    train, test = (torch.tensor(images, device=device) for images in (dataset.train_images, dataset.test_images))
    normalization = Normalization.of(train)
    return normalization.apply(train, dtype), normalization.apply(test, dtype)


def save_npz(path, dataset, **changes):
    """Write the four arrays of ``dataset`` to ``path``. ``changes`` replaces arrays by name; None leaves one out."""
    arrays = {name: getattr(dataset, name) for name in ARRAYS} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def published(name, dataset, root, monkeypatch):
    """Write ``dataset`` into ``root`` as the published archive of ``name``; make torchvision expect its checksums."""
    kind = KINDS[name]
    for attribute, value in write_archive(root, name, dataset).items():
        monkeypatch.setattr(kind, attribute, value)
    return root


def compiler(*arguments):
    """Run Python with ``arguments`` in a process that compiles kernels instead of interpreting them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:] or done.stdout[-1000:]
    return done


def cells(lines):
    """Return the cells of each row of the Markdown table in ``lines``."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def launch_table(rows, channels, splits, merge_channels, block):
    """Return a launch table with one entry for each kernel."""
    reductions = ("statistics", "pool_statistics", "backward_sums")
    elementwise = ("apply", "pool_apply", "backward_apply", "pool_backward_apply")
    tile = dict(rows=rows, channels=channels, num_warps=4)
    table = {f"batch_norm_act.{name}": {"*": tile | {"splits": splits}} for name in reductions}
    table |= {f"batch_norm_act.{name}": {"*": tile | {"blocks": 2}} for name in elementwise}
    table["batch_norm_act.merge"] = {"*": dict(channels=merge_channels, num_warps=4)}
    return table | {"augment": {"*": dict(block=block, num_warps=4)}}


def write_archive(root, name, dataset):
    """Write the archive of data set ``name`` into ``root``.

    Returns:
        The attributes that torchvision's class of this data set needs: names and checksums of the files.
    """
    kind = KINDS[name]
    files = {}
    for split in ("train", "test"):
        images, labels = getattr(dataset, f"{split}_images"), getattr(dataset, f"{split}_labels")
        names = [file for file, _ in getattr(kind, f"{split}_list")]
        for file, part in zip(names, np.array_split(np.arange(len(images)), len(names))):
            planes = images[part].transpose(0, 3, 1, 2).reshape(len(part), 3072)
            files[file] = {"data": np.ascontiguousarray(planes), "filenames": [f"{i}.png" for i in part]}
            if name == "cifar10":
                files[file] |= {"labels": labels[part].tolist(), "batch_label": file}
            else:
                files[file] |= {"fine_labels": labels[part].tolist(), "coarse_labels": (labels[part] // 5).tolist()}
    names = list(dataset.class_names)
    files[kind.meta["filename"]] = {kind.meta["key"]: names}
    if name == "cifar100":
        files[kind.meta["filename"]]["coarse_label_names"] = names[::5]

    root.mkdir(parents=True, exist_ok=True)
    archive, sums = root / kind.filename, {}
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for file, content in sorted(files.items()):
            data = pickle.dumps(content, protocol=2)
            sums[file] = hashlib.md5(data).hexdigest()
            member = tarfile.TarInfo(f"{kind.base_folder}/{file}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return {
        "train_list": [(file, sums[file]) for file, _ in kind.train_list],
        "test_list": [(file, sums[file]) for file, _ in kind.test_list],
        "meta": kind.meta | {"md5": sums[kind.meta["filename"]]},
        "tgz_md5": hashlib.md5(archive.read_bytes()).hexdigest(),
    }


def untimed(values):
    """Return ``values`` without those that depend on the clock or say how the training was started."""
    return {name: value for name, value in values.items() if not name.startswith("train_seconds") and name not in TIMES}


def plain(value):
    """Return a tree of values with bytes for its tensors, and without times."""
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in TIMES and "_seconds" not in key}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def fit_with(backend_config, recipe, dataset):
    """Train one run with a backend config that no options give, such as one with fallbacks on a CPU."""
    training = Training(TrainConfig(recipe=recipe))
    training.backend_config = backend_config
    training.config = used_options(training.config, backend_config)
    training.prepare(dataset)
    return train_all([training])[0]


def files_in(folder):
    """Return the files below ``folder``, without those of TensorBoard, whose names contain the time."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in paths if path.parts[0] != "tensorboard")


def files_of(runs, *more, diverged=()):
    """Return the files of a finished training with so many ``runs``. Those with an index in ``diverged`` diverged."""
    results = [f"run-{run}/result.json" for run in range(runs)]
    results += [f"run-{run}/model.pt" for run in range(runs) if run not in diverged]
    return sorted(
        ["confusion.png", "curves.png", "metrics.jsonl", "model.pt", "summary.json", "training.json", *results, *more]
    )


def contents(folder, *left_out):
    """Return everything in the results ``folder`` that does not depend on the clock.

    Args:
        folder: the output folder of a training.
        left_out: names of settings to leave out, or ``data_source``.
    """
    rows = [untimed(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = untimed(json.loads((folder / "summary.json").read_text()))
    summary["runs"] = [untimed(run) for run in summary["runs"]]
    summary["settings"] = {name: value for name, value in summary["settings"].items() if name not in left_out}
    training = untimed(json.loads((folder / "training.json").read_text()))
    for values in (summary, training):
        if "data_source" in left_out:
            values["dataset"].pop("source")
            values.pop("paths", None)
    saved = torch.load(folder / "model.pt", weights_only=True)
    saved["state_dict"] = {name: tensor.tolist() for name, tensor in saved["state_dict"].items()}
    return files_in(folder), rows, summary, training, saved


def diverge(monkeypatch, *seeds):
    """Let the runs with these seeds start from weights that are not numbers, so that they diverge at step 1."""
    new_model = Backend.new_model

    def broken(backend, generator):
        model = new_model(backend, generator)
        if generator.initial_seed() in seeds:
            next(model.parameters()).data.fill_(float("nan"))
        return model

    monkeypatch.setattr(Backend, "new_model", broken)


def stop_after(*points):
    """Return a log function that interrupts a training at each of ``points``, given as (run, epoch).

    The interruption comes after the row of that epoch and before its checkpoint.
    """
    left = list(points)

    def log(line):
        if line.startswith("run "):
            log.run = int(line.split()[1])
        if left and line.startswith("epoch") and (log.run, int(line.split()[1])) == left[0]:
            left.pop(0)
            raise KeyboardInterrupt

    log.run = 0
    return log
