"""Helpers for the tests: small data sets, archives, processes, trainings."""

import hashlib
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
from cifar_fast.data.dataset import ARRAYS
from cifar_fast.data.tensors import Normalization

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("CIFAR_FAST_SHARED", Path(__file__).parents[2] / "shared"))


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


NARROW = (4, 8, 8, 8, 16, 32, 32, 32)


def small_dataset(train=96, test=40, classes=3, seed=0):
    """Random images whose labels can be learnt: class k is brighter than class k - 1."""
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
    """Write the four arrays of ``dataset`` to ``path``, changed or, where None, left out."""
    arrays = {name: getattr(dataset, name) for name in ARRAYS} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def published(name, dataset, root, monkeypatch):
    """``root`` with the archive of ``name`` in it as published, torchvision told to expect it."""
    kind = KINDS[name]
    for attribute, value in write_archive(root, name, dataset).items():
        monkeypatch.setattr(kind, attribute, value)
    return root


def compiler(*arguments):
    """A Python process with ``arguments``, in which kernels are compiled and not interpreted; it must succeed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:] or done.stdout[-1000:]
    return done


def cells(lines):
    """The cells of each line of a Markdown table, of the ``lines`` that are of one."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


REDUCTIONS = ("statistics", "pool_statistics", "backward_sums")


PASSES = ("apply", "pool_apply", "backward_apply", "pool_backward_apply")


def launch_table(rows, channels, splits, merge_channels, block):
    """A launch table with one entry for each kernel."""
    tile = dict(rows=rows, channels=channels, num_warps=4)
    table = {f"batch_norm_celu.{name}": {"*": tile | {"splits": splits}} for name in REDUCTIONS}
    table |= {f"batch_norm_celu.{name}": {"*": tile | {"blocks": 2}} for name in PASSES}
    table["batch_norm_celu.merge"] = {"*": dict(channels=merge_channels, num_warps=4)}
    return table | {"augment": {"*": dict(block=block, num_warps=4)}}


KINDS = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def write_archive(root, name, dataset):
    """Write the archive of data set ``name`` into ``root``; gives the attributes of torchvision's class that go with
    it.
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
    files[kind.meta["filename"]] = {kind.meta["key"]: names} | (
        {} if name == "cifar10" else {"coarse_label_names": names[::5]}
    )

    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    sums = {}
    for file, content in files.items():
        data = pickle.dumps(content, protocol=2)
        (folder / file).write_bytes(data)
        sums[file] = hashlib.md5(data).hexdigest()
    archive = root / kind.filename
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, f"{kind.base_folder}/{file.name}")
            file.unlink()
    folder.rmdir()
    return {
        "train_list": [(file, sums[file]) for file, _ in kind.train_list],
        "test_list": [(file, sums[file]) for file, _ in kind.test_list],
        "meta": kind.meta | {"md5": sums[kind.meta["filename"]]},
        "tgz_md5": hashlib.md5(archive.read_bytes()).hexdigest(),
    }


HOW = dict(backend="eager", device="cpu", dtype="float32", log=None)
TIMES = ("train_seconds", "evaluation_seconds", "setup_seconds")


def untimed(values):
    return {name: value for name, value in values.items() if not name.startswith("train_seconds") and name not in TIMES}


def contents(folder, *left_out):
    """Everything in ``folder`` that does not depend on the clock."""
    rows = [untimed(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = untimed(json.loads((folder / "summary.json").read_text()))
    summary["runs"] = [untimed(run) for run in summary["runs"]]
    summary["settings"] = {name: value for name, value in summary["settings"].items() if name not in left_out}
    saved = torch.load(folder / "model.pt", weights_only=True)
    saved["state_dict"] = {name: tensor.tolist() for name, tensor in saved["state_dict"].items()}
    return sorted(path.name for path in folder.iterdir()), rows, summary, saved


def stop_after(*told):
    """A log that ends a training at each of ``told``, run and epoch, after its row and before its checkpoint."""
    left = list(told)

    def log(line):
        if line.startswith("run "):
            log.run = int(line.split()[1]) - 1
        if left and line.startswith("epoch") and (log.run, int(line.split()[1])) == left[0]:
            left.pop(0)
            raise KeyboardInterrupt

    log.run = 0
    return log
