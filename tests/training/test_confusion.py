"""The accuracy of each class and the confusion matrix of a training."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_fast import Dataset, Recipe, fit, load_model
from cifar_fast.cli.train import main
from cifar_fast.training.plots import confusion_figure
from tests.helpers import HOW, save_npz, small_dataset

RECIPE = Recipe(epochs=2, batch_size=8, widths=(4, 8))


@pytest.fixture
def unbalanced():
    """Return a data set of three classes whose test images have none of class 1 and few of class 2."""
    data, labels = small_dataset(train=48, test=30), np.arange(30) % 3
    chosen = np.flatnonzero(labels != 1)[:14]
    return Dataset("npz", "few", data.train_images, data.train_labels, data.test_images[chosen], labels[chosen])


def test_training_writes_the_accuracy_of_each_class_and_a_confusion_matrix(tmp_path, unbalanced, capfd):
    data, out = save_npz(tmp_path / "few.npz", unbalanced), tmp_path / "out"
    flags = "--epochs 2 --batch-size 8 --widths 4 8 --backend eager --device cpu --dtype float32 --runs 2"
    assert main(f"--dataset npz --data-dir {data} --output {out} {flags}".split()) == 0
    expected = np.zeros((3, 3), int)
    for run in range(2):
        predictions = load_model(out / f"run-{run}").predict(unbalanced.test_images).argmax(1)
        own = np.zeros((3, 3), int)
        np.add.at(own, (unbalanced.test_labels, predictions), 1)
        result = json.loads((out / f"run-{run}/result.json").read_text())
        assert result["confusion"] == own.tolist()
        assert result["run"]["test_accuracy"] == pytest.approx(100 * own.trace() / 14)
        expected += own
    summary = json.loads((out / "summary.json").read_text())
    assert summary["confusion"] == expected.tolist()
    assert f"{json.dumps(expected[0].tolist()).replace(' ', '')},\n" in (out / "summary.json").read_text()
    percent = {"0": 100 * expected[0, 0] / 14, "1": None, "2": 100 * expected[2, 2] / 14}
    assert summary["class_accuracy"] == pytest.approx(percent)
    with Image.open(out / "confusion.png") as image:
        image.load()
        assert image.format == "PNG"
    told = capfd.readouterr().out
    assert "test images: none of class 1, 1 of 3 classes, so the test accuracy does not cover all classes\n" in told
    low, high = sorted(("0", "2"), key=lambda name: percent[name])
    assert f"accuracy by class, lowest first: {low} {percent[low]:.2f} %, {high} {percent[high]:.2f} %\n" in told


def test_other_sets_that_lack_classes_have_a_line_too(tmp_path, unbalanced, capfd):
    also = save_npz(tmp_path / "also.npz", unbalanced, images=unbalanced.test_images, labels=unbalanced.test_labels)
    result = fit(RECIPE, small_dataset(), validation=2, also_test={"few": also}, **HOW | {"log": print})
    told = capfd.readouterr().out
    assert "also tested on few, 14 images" in told and " % (none of class 1, 1 of 3 classes)\n" in told
    (line,) = (note for note in result.notes if note.startswith("validation images: none of class "))
    assert line.endswith("1 of 3 classes, so the validation accuracy does not cover all classes")
    assert result.confusion.shape == (3, 3) and result.confusion.sum() == 40


def test_figure_shows_the_share_of_each_class_for_few_and_many_classes():
    few = confusion_figure(np.array([[3, 1], [0, 0]]), ["$a", "b$"], "few")
    axes = few.axes[0]
    assert [text.get_text() for text in axes.texts] == ["75", "25"]
    shown = axes.images[0].get_array()
    assert np.array_equal(shown[0], [75, 25]) and np.isnan(np.ma.filled(shown[1], np.nan)).all()
    many = confusion_figure(np.eye(100, dtype=int), [f"class {k}" for k in range(100)], "many")
    assert not many.axes[0].texts and torch.tensor(many.get_size_inches()).max() <= 20
