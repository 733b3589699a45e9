"""A restore that leaves out one kind of state is noticed by the comparison that the tests of a resume make."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from torch import nn

from cifar_fast import Recipe, fit
from cifar_fast.cli import train as train_command
from cifar_fast.train import main
from cifar_fast.training.checkpoint import Checkpoint
from cifar_fast.training.metrics import EpochRow
from cifar_fast.training.results import RunResult
from cifar_fast.training.run_folder import RunFolder
from cifar_fast.utils.errors import UserError
from tests.helpers import HOW, ROOT, cells, contents, stop_after, untimed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_curves")]  # whole trainings

RECIPE = Recipe(epochs=3, batch_size=16)


class Net(nn.Sequential):
    """A network with statistics, and with random numbers of its own."""

    def __init__(self):
        layers = nn.Conv2d(3, 4, 8, 8), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(64, 3)
        super().__init__(*layers)


def state(name, keep):
    """Return a restore that leaves out what ``keep`` selects, by key, of the dict ``name`` of the training state."""

    def leave_out(checkpoint, fresh, generators):
        kept = {key: fresh[name][key] if keep(key) else tensor for key, tensor in checkpoint.state[name].items()}
        return dataclasses.replace(checkpoint, state=checkpoint.state | {name: kept})

    return leave_out


def part(name):
    """Return a restore that leaves out a part of the training state."""
    return lambda checkpoint, fresh, _: dataclasses.replace(checkpoint, state=checkpoint.state | {name: fresh[name]})


def generator(number):
    """Return a restore that leaves out the state of a generator."""

    def leave_out(checkpoint, _, generators):
        states = list(checkpoint.generators)
        states[number] = generators[number].get_state()
        return dataclasses.replace(checkpoint, generators=states)

    return leave_out


def statistics(key):
    return "running" in key or "num_batches" in key


RESTORED = {
    "weights": state("model", lambda key: not statistics(key)),
    "statistics of the norms": state("model", statistics),
    "momentum": part("momentum"),
    "position in the schedule": part("epoch"),
    "generator of the order": generator(0),
    "generator of the augmentation": generator(1),
    "generator of a custom model": generator(2),
}
"""Functions of a checkpoint, the state of a run at its start, and its generators. They return a changed checkpoint."""

READ = {
    "epoch": lambda found: found._replace(rows=[EpochRow.before_first(1)]),
    "rows of earlier epochs": lambda found: found._replace(rows=found.rows[-1:]),
    "environments of earlier epochs": lambda found: found._replace(
        checkpoint=dataclasses.replace(
            found.checkpoint, environments=[found.checkpoint.environments[-1] | {"first_epoch": 3}]
        )
    ),
}
"""Functions of the checkpoint and the rows of an unfinished run, for a restore that leaves something of them out."""

OF_RUNS = {
    "scores of extra test sets": lambda found: dataclasses.replace(
        found, run=dataclasses.replace(found.run, also_test={})
    ),
    "confusion matrix": lambda found: dataclasses.replace(found, confusion=[[0] * 3] * 3),
}
"""Functions of a finished run, for a restore that leaves a result out."""


REFUSED = {
    "epoch": "lacks rows that a checkpoint of run 1 continues",
    "rows of earlier epochs": "lacks rows that a checkpoint of run 1 continues",
    "scores of extra test sets": "run 1 has other classes, test images or extra test sets",
}
"""What a resume says that is refused. The others end, and differ."""


def train(folder, tiny, test_set, resume=False, log=None):
    """Train two runs; return the results, and the rows that ``metrics.jsonl`` had after the last epoch of a run."""
    rows = []

    def on_epoch(row):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        rows[:] = [untimed(json.loads(line)) for line in lines] if row.epoch == RECIPE.epochs else []

    options = HOW | dict(runs=2, order_seed=9, model=Net, also_test={"again": test_set}, on_epoch=on_epoch, log=log)
    fit(RECIPE, tiny, **{"resume" if resume else "output": folder}, **options)
    return contents(folder), rows


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny, no_curves):
    """The test set, the folder of a training that was stopped in the last epoch of its second run, and the whole."""
    base = tmp_path_factory.mktemp("restored")
    np.savez(base / "test.npz", images=tiny.test_images, labels=tiny.test_labels)
    whole = train(base / "whole", tiny, base / "test.npz")
    with pytest.raises(KeyboardInterrupt):
        train(base / "parts", tiny, base / "test.npz", log=stop_after((1, 3)))
    with open(base / "parts/metrics.jsonl", "a") as file:
        file.write('{"run": 1, "epo')
    return base / "test.npz", base / "parts", whole


@pytest.fixture
def is_noticed(tmp_path, tiny, trained):
    """Return a function that resumes the stopped training, and tells whether it is refused or differs from the whole.

    ``kind`` is the state that is left out.
    """

    def resume(kind=""):
        test_set, parts, whole = trained
        folder = shutil.copytree(parts, tmp_path / "parts")
        if kind not in REFUSED:
            return train(folder, tiny, test_set, resume=True) != whole
        with pytest.raises(UserError, match=REFUSED[kind]):
            train(folder, tiny, test_set, resume=True)
        return True

    return resume


def test_complete_restore_is_not_noticed(is_noticed):
    assert not is_noticed()


@pytest.mark.parametrize("kind", RESTORED)
def test_state_that_is_not_restored_is_noticed(is_noticed, monkeypatch, kind):
    restore = Checkpoint.restore

    def partial(checkpoint, backend, generators):
        restore(RESTORED[kind](checkpoint, backend.training_state(), generators), backend, generators)

    monkeypatch.setattr(Checkpoint, "restore", partial)
    assert is_noticed()


@pytest.mark.parametrize("kind", READ)
def test_part_of_an_unfinished_run_that_is_not_read_is_noticed(is_noticed, monkeypatch, kind):
    read = RunFolder.unfinished

    def partial(folder, run):
        found = read(folder, run)
        return found and READ[kind](found)

    monkeypatch.setattr(RunFolder, "unfinished", partial)
    assert is_noticed(kind)


@pytest.mark.parametrize("kind", OF_RUNS)
def test_result_of_a_finished_run_that_is_not_read_is_noticed(is_noticed, monkeypatch, kind):
    read = RunResult.from_dict
    monkeypatch.setattr(RunResult, "from_dict", lambda values: OF_RUNS[kind](read(values)))
    assert is_noticed(kind)


def test_tail_of_the_rows_that_is_not_cut_off_is_noticed(is_noticed, monkeypatch):
    enter = RunFolder.__enter__

    def uncut(folder):
        rows = (folder.path / "metrics.jsonl").read_bytes()
        enter(folder)
        (folder.path / "metrics.jsonl").write_bytes(rows)
        return folder

    monkeypatch.setattr(RunFolder, "__enter__", uncut)
    with pytest.raises(json.JSONDecodeError):  # half of a line
        is_noticed()


@pytest.fixture(scope="module")
def seeded(tmp_path_factory, npz, no_curves):
    """The folder of a training by the command with four seeds."""
    folder = tmp_path_factory.mktemp("seeded") / "out"
    flags = "--dataset npz --widths 4 --epochs 1 --batch-size 16 --device cpu --dtype float32 --backend eager"
    seeds = "--seed 3 --init-seed 4 --order-seed 5 --augment-seed 6"
    assert main(f"{flags} {seeds} --data-dir {npz} --output {folder}".split()) == 0
    return folder


@pytest.mark.parametrize("name", ["seed", "init_seed", "order_seed", "augment_seed"])
def test_seed_that_is_not_restored_is_refused(seeded, monkeypatch, capfd, name):
    flags_of = train_command.flags_of

    def without(earlier, args):
        return {key: value for key, value in flags_of(earlier, args).items() if key != name}

    monkeypatch.setattr(train_command, "flags_of", without)
    assert main(["--resume", str(seeded)]) == 2
    assert f"--{name.replace('_', '-')} was " in capfd.readouterr().err


def test_page_names_every_kind_of_state():
    page = (ROOT / "docs/reliability.md").read_text().split("## State that a resume restores")[1].split("\n## ")[0]
    kinds = [row[0] for row in cells(page.splitlines())[2:]]
    others = ["tail of `metrics.jsonl`", "seeds"]
    assert sorted(kinds) == sorted([*RESTORED, *READ, *OF_RUNS, *others])
