"""Validation images held out of the training, losses on images that are not trained on, and the ranking by them."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cifar_fast import Dataset, InputError, Recipe, fit, load_dataset, load_model, make_report
from cifar_fast.cli.report import main as report
from cifar_fast.cli.sweep import main as sweep
from cifar_fast.cli.train import main as train
from cifar_fast.data.dataset import ARRAYS
from tests.helpers import HOW, save_npz, small_dataset

RECIPE = Recipe(epochs=2, batch_size=8, widths=(4, 8))
FLAGS = "--dataset npz --epochs 2 --batch-size 8 --widths 4 8 --backend eager --device cpu --dtype float32"

pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.fixture
def rare():
    """Return 60 training images, most of class 0, and each of another brightness, so that no two are equal."""
    images, labels = small_dataset(train=60).train_images, np.repeat([0, 1, 2], [40, 15, 5])
    test = small_dataset(test=20)
    return Dataset("npz", "rare.npz", images, labels, test.test_images, test.test_labels)


def scores(folder, images, labels):
    """Return loss and accuracy of the trained network on images, computed by plain torch."""
    labels = torch.from_numpy(np.asarray(labels))
    classifier = load_model(folder)
    with torch.no_grad():
        logits = classifier(torch.from_numpy(images))
    loss = F.cross_entropy(logits, labels, label_smoothing=classifier.recipe.label_smoothing).item()
    return loss, 100 * (logits.argmax(1) == labels).float().mean().item()


def test_validation_images_are_held_out_with_the_share_of_each_class_and_evaluated(tmp_path, rare):
    out, data = tmp_path / "out", save_npz(tmp_path / "rare.npz", rare)
    assert train(f"{FLAGS} --data-dir {data} --validation 0.2 --runs 2 --output {out}".split()) == 0
    summary = json.loads((out / "summary.json").read_text())
    counts = [summary["dataset"][f"{split}_images"] for split in ("train", "validation", "test")]
    assert counts == [48, 12, 20]
    used = rare.for_recipe(RECIPE, 0.2)
    assert np.bincount(used.validation_labels).tolist() == [8, 3, 1]
    pixels = {image.tobytes() for image in used.train_images}
    assert len(pixels) == 48 and not pixels & {image.tobytes() for image in used.validation_images}
    assert used.digest == summary["dataset"]["digest"] != rare.for_recipe(RECIPE, 0.2, 1).digest
    for run in summary["runs"]:
        folder = out / f"run-{run['run']}"
        for split in ("validation", "test"):
            found = run[f"{split}_loss"], run[f"{split}_accuracy"]
            images, labels = getattr(used, f"{split}_images"), getattr(used, f"{split}_labels")
            assert found == pytest.approx(scores(folder, images, labels), rel=1e-4), split
    for name in ("validation_accuracy", "validation_loss", "test_loss"):
        assert summary[f"{name}_mean"] == pytest.approx(np.mean([run[name] for run in summary["runs"]]))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["validation_loss"] == summary["runs"][-1]["validation_loss"] and len(rows) == 4


def test_subset_and_label_noise_leave_the_validation_images_as_they_are(rare):
    plain = rare.for_recipe(RECIPE, 12)
    changed = rare.for_recipe(dataclasses.replace(RECIPE, train_subset=8, label_noise=0.5, classes=(2, 0)), 9)
    again = rare.for_recipe(dataclasses.replace(RECIPE, classes=(2, 0)), 9)
    assert len(plain.validation_images) == 12 and len(changed.train_images) == 8
    for name in ("validation_images", "validation_labels"):
        assert np.array_equal(getattr(changed, name), getattr(again, name))


def test_validation_that_cannot_be_held_out_is_refused_with_the_flag(tmp_path, rare, capfd):
    data = save_npz(tmp_path / "rare.npz", rare)
    assert train(f"{FLAGS} --data-dir {data} --validation 58 --output {tmp_path}/out".split()) == 2
    error = capfd.readouterr().err
    assert f"{data}: --validation must be" in error and "hold out 1 to 57 of the 60 images" in error
    assert not (tmp_path / "out").exists()


def test_data_set_with_validation_images_of_its_own_keeps_them(tmp_path, rare):
    arrays = {name: getattr(rare, name) for name in ARRAYS}
    own = Dataset(
        "npz", "own", **arrays, validation_images=rare.test_images[:7], validation_labels=rare.test_labels[:7]
    )
    own.save(tmp_path / "own.npz")
    read = load_dataset("npz", tmp_path / "own.npz", log=None)
    assert read.digest == own.digest != rare.digest
    result = fit(RECIPE, read, **HOW)
    assert result.rows[-1].validation_accuracy is not None and result.dataset["validation_images"] == 7
    with pytest.raises(InputError, match="has validation images already; leave validation out"):
        fit(RECIPE, read, validation=0.1, **HOW)


SPEC = """
dataset = "npz"
data_dir = "{data}"
output = "{out}"
backend = "eager"
device = "cpu"
dtype = "float32"
{validation}
[recipe]
batch_size = 8
widths = [4, 8]
[variants]
short = {{epochs = 1}}
long = {{epochs = 4}}
"""


@pytest.mark.parametrize("validation", ["validation = 0.2", ""])
def test_sweep_and_report_rank_by_validation_accuracy_if_there_is_one(tmp_path, rare, capfd, validation):
    out, data, spec = tmp_path / "out", save_npz(tmp_path / "rare.npz", rare), tmp_path / "spec.toml"
    spec.write_text(SPEC.format(out=out, data=data, validation=validation))
    assert sweep([str(spec)]) == 0
    swept = capfd.readouterr().out
    assert report([str(out), "--output", str(tmp_path / "report")]) == 0
    told = capfd.readouterr().out
    name = "validation_accuracy" if validation else "test_accuracy"
    means = {
        variant: json.loads((out / variant / "summary.json").read_text())[f"{name}_mean"]
        for variant in ("short", "long")
    }
    best = sorted(means, key=means.get, reverse=True)
    where = "on 12 images held out of the training images: " if validation else "on the test images"
    for text, start in ((swept, "ranked by "), (told, "Ranked by ")):
        (line,) = (line for line in text.splitlines() if start in line)
        assert f"{start}{name.replace('_', ' ')}, {where}" in line
        if means["short"] != means["long"]:
            assert f"{best[0]} {means[best[0]]:.2f} %, {best[1]} {means[best[1]]:.2f} %" in line
    content = json.loads((tmp_path / "report/report.json").read_text())
    assert content["metric"] == name and len(content["ranking"]) == 2
    assert ("| test accuracy (%) |" in told) and (f"{name.replace('_', ' ')} (%)" in told)


def test_report_names_a_training_without_validation_images_beside_others(rare):
    results = {
        "with": fit(RECIPE, rare, runs=2, validation=0.2, **HOW),
        "without": fit(RECIPE, rare, runs=2, **HOW),
    }
    made = make_report(results)
    assert made.metric == "test_accuracy"
    assert "different numbers of validation images: 12 (with); 0 (without)" in made.warnings
    by_validation = make_report(results, metric="validation_accuracy")
    assert "without: was not tested on validation_accuracy" in by_validation.warnings
    losses = make_report(results, metric="test_loss")
    means = [variant.mean for variant in losses.variants]
    assert losses.to_dict()["ranking"] == (["with", "without"] if means[0] <= means[1] else ["without", "with"])
