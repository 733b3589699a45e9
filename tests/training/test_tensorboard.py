"""``--log tensorboard``: the event files, read with TensorBoard's own reader."""

import itertools
import json
import socket
import sys
import time

import pytest

from cifar_fast import Recipe
from cifar_fast.train import main
from cifar_fast.utils.progress import lines_to
from tests.helpers import stop_after

pytestmark = pytest.mark.usefixtures("no_curves")

FLAGS = (
    "--dataset npz --widths 4 8 8 16 --epochs 3 --batch-size 16 --device cpu --dtype float32 --backend eager --seed 3"
)
TAGS = {f"{what}/{split}": f"{split}_{what}" for split in ("train", "test") for what in ("loss", "accuracy")}


@pytest.fixture(scope="module")
def reader():
    return pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator


def train(npz, flags):
    return main(f"{FLAGS} --data-dir {npz} {flags}".split())


def points(reader, folder):
    """Return the steps and values of each tag, for each run of the training in ``folder``."""
    by_run = {}
    for run in sorted((folder / "tensorboard").iterdir()):
        events = reader(str(run)).Reload()
        by_run[run.name] = {
            tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
        }
    return by_run


def expected(folder):
    """Return the same from metrics.jsonl, with the learning rate from knots at 0, 1/5 and the end of the training."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    low, high, last = Recipe().lr_values
    assert (low, high, last) == (0.1, 0.6, 0)
    by_run = {}
    for run in sorted({row["run"] for row in rows}):
        own = [row for row in rows if row["run"] == run]
        by_run[f"run-{run}"] = {
            tag: [(row["epoch"], pytest.approx(row[key], rel=1e-6)) for row in own] for tag, key in TAGS.items()
        }
        rates = [(epoch, pytest.approx(0.6 * (1 - (epoch / 3 - 0.2) / 0.8), abs=1e-7)) for epoch in (1, 2, 3)]
        by_run[f"run-{run}"]["learning_rate"] = rates[: len(own)]
    return by_run


def test_event_files_hold_the_rows_of_each_run(tmp_path, npz, reader):
    assert train(npz, f"--runs 2 --output {tmp_path}/out --log tensorboard") == 0
    by_run = points(reader, tmp_path / "out")
    assert by_run == expected(tmp_path / "out") and [*by_run] == ["run-0", "run-1"]


def test_no_event_file_names_the_host(tmp_path, npz, reader, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "somebodys-machine")
    assert train(npz, f"--output {tmp_path}/out --log tensorboard") == 0
    (file,) = (tmp_path / "out/tensorboard/run-0").iterdir()
    assert "somebody" not in file.name and b"somebody" not in file.read_bytes()


def test_resumed_training_continues_the_points_without_duplicates(tmp_path, npz, reader, monkeypatch):
    with lines_to(stop_after((1, 2))):
        assert train(npz, f"--runs 2 --output {tmp_path}/out --log tensorboard") == 130
    assert [step for step, _ in points(reader, tmp_path / "out")["run-1"]["loss/train"]] == [1, 2]
    assert main(["--resume", f"{tmp_path}/out"]) == 0  # trains epoch 2 again, because it had no checkpoint
    assert len(list((tmp_path / "out/tensorboard/run-1").iterdir())) == 2
    assert points(reader, tmp_path / "out") == expected(tmp_path / "out")


def test_clock_that_jumps_back_loses_no_points_and_changes_no_seconds(tmp_path, npz, reader, monkeypatch):
    with lines_to(stop_after((0, 2))):
        assert train(npz, f"--output {tmp_path}/out --log tensorboard") == 130
    hours = itertools.count(time.time() / 3600, -1)  # an hour back at each look at the clock
    monkeypatch.setattr(time, "time", lambda: 3600 * next(hours))
    assert main(["--resume", f"{tmp_path}/out"]) == 0
    assert points(reader, tmp_path / "out") == expected(tmp_path / "out")
    seconds = [json.loads(line)["train_seconds"] for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert 0 < seconds[0] < seconds[1] < seconds[2] < 3600


def test_points_are_readable_during_the_training(tmp_path, npz, reader, monkeypatch):
    seen = []

    def say(line):
        if line.startswith("epoch"):
            seen.append(len(points(reader, tmp_path / "out")["run-0"]["loss/train"]))

    with lines_to(say):
        assert train(npz, f"--output {tmp_path}/out --log tensorboard") == 0
    assert seen == [1, 2, 3]


@pytest.mark.parametrize("log", ["", "--log tensorboard"])
def test_overwriting_removes_the_points_of_the_earlier_training(tmp_path, npz, reader, log):
    assert train(npz, f"--runs 2 --output {tmp_path}/out --log tensorboard") == 0
    assert train(npz, f"--seed 4 --output {tmp_path}/out --overwrite {log}") == 0
    left = {run: tags for run, tags in points(reader, tmp_path / "out").items() if tags}
    assert left == (expected(tmp_path / "out") if log else {})


def test_no_event_files_without_the_flag(tmp_path, npz):
    assert train(npz, f"--output {tmp_path}/out") == 0
    assert not (tmp_path / "out/tensorboard").exists()


def test_missing_tensorboard_is_reported_before_the_training(tmp_path, npz, monkeypatch, capfd):
    for name in [name for name in sys.modules if name.startswith("tensorboard.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert train(npz, f"--output {tmp_path}/out --log tensorboard") == 2
    shown = capfd.readouterr()
    assert shown.err == "error: --log tensorboard needs tensorboard: pip install 'cifar_fast[tensorboard]'\n"
    assert shown.out == "" and not (tmp_path / "out").exists()


def test_other_files_are_written_if_event_files_cannot_be(tmp_path, npz, capfd):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/tensorboard").touch()
    assert train(npz, f"--output {tmp_path}/out --log tensorboard") == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}/out/tensorboard could not be written (")
    assert (tmp_path / "out/model.pt").exists()
    assert len((tmp_path / "out/metrics.jsonl").read_text().splitlines()) == 3
