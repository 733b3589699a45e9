"""The readers of files, and valid files for each."""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow
import torch
from PIL import Image
from pyarrow import parquet
from scipy.io import savemat

from cifar_fast import Recipe, load_dataset, load_model
from cifar_fast.cli.main import main as command
from cifar_fast.data.arrays import replaced_labels
from cifar_fast.data.eval_sets import read_eval_sets
from cifar_fast.data.images import decode_image
from cifar_fast.utils.progress import lines_to
from tests.helpers import KINDS, save_npz, small_dataset, stop_after, write_archive

FLAGS = "--widths 4 8 --epochs 2 --batch-size 8 --device cpu --dtype float32 --backend eager --runs 2 --save-logits"
IMAGES = tuple(f"x.{kind}" for kind in ("png", "jpg", "gif", "webp", "tif", "bmp", "avif", "ppm", "mpo"))
RUN = ("training.json", "run-0/result.json", "run-1/checkpoint.pt", "metrics.jsonl", "run-0/model.pt")
SWEEP = 'output="s"\nruns=2\ndevice="cpu"\n[recipe]\nwidths=[4,8]\n[variants.m]\nmomentum=[0.8,0.9]\n[variants.b]\n'
NAMES = {"huggingface": json.dumps({"info": {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}})}


def _set(name: str, folder: Path, **how):
    return load_dataset(name, folder, log=None, **how)


def _cifar(folder: Path):
    """Read CIFAR as if every file had the published sum."""
    with mock.patch("torchvision.datasets.utils.check_integrity", lambda path, md5=None: os.path.isfile(path)):
        return _set("cifar10", folder)


def _hub(folder: Path):
    files = [mock.Mock(rfilename=file.name) for file in folder.iterdir()]
    with (
        mock.patch("huggingface_hub.HfApi.dataset_info", lambda *arguments: mock.Mock(siblings=files)),
        mock.patch("huggingface_hub.hf_hub_download", lambda repository, file, **how: str(folder / file)),
    ):
        return _set("hf:a/b", folder)


def _labels(folder: Path):
    return [replaced_labels(str(path), "train_labels", np.arange(16) % 2, 2) for path in sorted(folder.iterdir())]


def _extra(folder: Path):
    paths = {"npz": folder / "extra.npz", "npy": folder / "x_data.npy", "mat": folder / "x.mat"}
    return read_eval_sets(paths, ["a", "b"], resize=True)


def _model(folder: Path):
    return load_model(folder / "model.pt").predict(np.zeros((2, 32, 32, 3), np.uint8))


def _command(*words: str) -> Callable[[Path], int]:
    return lambda folder: command([str(folder / word[1:]) if word.startswith("@") else word for word in words])


READERS: dict[str, tuple[tuple[str, ...], Callable[[Path], object]]] = {
    "npz": (("data.npz",), lambda folder: _set("npz", folder)),
    "CIFAR archive": (("cifar-10-python.tar.gz",), _cifar),
    "CIFAR pickles": (("data_batch_1", "data_batch_3", "test_batch", "batches.meta"), _cifar),
    "images": (IMAGES, lambda folder: [decode_image(path, "x", True) for path in sorted(folder.iterdir())]),
    "image folder": (("set.cifar_fast.npz", "set/train/a/1.png"), lambda folder: _set("folder", folder / "set")),
    "parquet": (("train.parquet", "test.parquet", "README.md"), _hub),
    "labels": (("labels.pt", "labels.npy"), _labels),
    "extra sets": (("extra.npz", "x_data.npy", "x_labels.npy", "x.mat"), _extra),
    "model": (("model.pt",), _model),
    "predict": (("model.pt", "1.png"), _command("predict", "--device", "cpu", "@model.pt", "@1.png")),
    "resume": ((*RUN, "run-0/logits.npz"), _command("train", "--resume", "@")),
    "finished": (("summary.json", "metrics.jsonl", *RUN[:2], "model.pt"), _command("train", "--resume", "@")),
    "report": (RUN[:2], _command("report", "@", "--output", "@report")),
    "report of a sweep": (("sweep.json",), _command("report", "@")),
    "recipe": (("recipe.json",), lambda folder: Recipe.load(folder / "recipe.json")),
    "recipe of a summary": (("summary.json",), lambda folder: Recipe.load(folder / "summary.json")),
    "sweep": (("sweep.toml",), _command("sweep", "@sweep.toml", "--dry-run")),
}
"""The files of a folder to mutate, and a function that reads the folder, by the name of the reader."""


@mock.patch("time.time", lambda: 1e9)
@mock.patch("cifar_fast.training.fit.device_timer", lambda device: lambda: 0.0)
@mock.patch("cifar_fast.training.fit.now", lambda: "2001-09-09T01:46:40+00:00")
def write_files(root: Path) -> Path:
    """Write valid files for each reader below ``root``, and return the folder that holds a folder for each.

    The clock does not move, so the files are the same each time.
    """
    fresh, data = root / "fresh", small_dataset(16, 8, 2)
    for name in READERS:
        (fresh / name).mkdir(parents=True)
    save_npz(fresh / "npz/data.npz", data, class_names=np.array(["a", "b"]))
    write_archive(fresh / "CIFAR archive", "cifar10", small_dataset(20, 5, 2))
    shutil.unpack_archive(fresh / "CIFAR archive" / KINDS["cifar10"].filename, root / "unpacked", filter="data")
    shutil.copytree(root / "unpacked" / KINDS["cifar10"].base_folder, fresh / "CIFAR pickles", dirs_exist_ok=True)
    for name in IMAGES:
        Image.fromarray(data.train_images[0].repeat(2, 0)).save(fresh / "images" / name)
    for split in ("train", "test"):
        rows = []
        for label in (0, 1):
            path = fresh / f"image folder/set/{split}/{'ab'[label]}/1.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(data.train_images[label]).save(path)
            rows.append({"img": {"bytes": path.read_bytes(), "path": "1.png"}, "label": label})
        table = pyarrow.Table.from_pylist(rows).replace_schema_metadata(NAMES)
        parquet.write_table(table, fresh / f"parquet/{split}.parquet")
    (fresh / "parquet/README.md").write_text("---\ndataset_info:\n  features: []\n---\n")
    _set("folder", fresh / "image folder/set")
    torch.save({"worse_label": data.train_labels}, fresh / "labels/labels.pt")
    np.save(fresh / "labels/labels.npy", np.eye(2)[data.train_labels])
    extra = fresh / "extra sets"
    np.savez(extra / "extra.npz", images=data.test_images, labels=data.test_labels, class_names=np.array(["b", "a"]))
    np.save(extra / "x_data.npy", data.test_images)
    np.save(extra / "x_labels.npy", data.test_labels)
    savemat(extra / "x.mat", {"X": np.moveaxis(data.test_images, 0, -1), "y": data.test_labels[:, None]})
    npz = shutil.copy(fresh / "npz/data.npz", root / "data.npz")
    for name, stops in (("resume", [(1, 2)]), ("finished", [])):
        flags = f"train --dataset npz --data-dir {npz} --also-test x={npz} {FLAGS} --output".split()
        quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        with lines_to(stop_after(*stops)), quiet[0], quiet[1]:
            command([*flags, str(fresh / name)])
    shutil.copytree(fresh / "resume", fresh / "report", dirs_exist_ok=True)
    shutil.copytree(fresh / "finished", fresh / "report of a sweep/v")
    (fresh / "report of a sweep/sweep.json").write_text(json.dumps({"variants": {"v": {}}, "output": "s"}))
    for name in ("model", "predict"):
        shutil.copy(fresh / "finished/model.pt", fresh / name)
    shutil.copy(fresh / "images/x.png", fresh / "predict/1.png")
    shutil.copy(fresh / "finished/summary.json", fresh / "recipe of a summary")
    Recipe().save(fresh / "recipe/recipe.json")
    (fresh / "sweep/sweep.toml").write_text(SWEEP)
    return fresh
