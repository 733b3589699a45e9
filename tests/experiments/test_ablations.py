"""Changed constants of the recipe: by the command, in every backend, and in the data."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cifar_fast import CNN, Dataset, InputError, Recipe, draw_epoch, fit
from cifar_fast.cli.compare import main as compare
from cifar_fast.data.augment import augment
from cifar_fast.train import main as train
from cifar_fast.training.results import RunReader
from tests.helpers import HOW, normalize, save_npz, small_dataset

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_curves")]  # whole trainings, by the command and from Python

RECIPE = Recipe(epochs=1, batch_size=8, widths=(4, 8, 8, 8))
FLAGS = "--epochs 1 --batch-size 8 --widths 4 8 8 8 --device cpu --dtype float32"
PUBLISHED = (
    *("epochs", "batch_size", "widths", "celu_alpha", "output_scale", "label_smoothing", "momentum", "weight_decay"),
    *("lr_knots", "lr_values", "crop_padding", "flip", "cutout_size"),
)
"""Constants of the published recipe; the others are ablations."""
ABLATIONS = {
    "activation": ("--activation relu", "relu"),
    "batch_norm": ("--no-batch-norm", False),
    "residual": ("--residual", True),
    "nesterov": ("--no-nesterov", False),
    "decay_norms_and_biases": ("--no-decay-norms-and-biases", False),
    "init_scale": ("--init-scale 0.5", 0.5),
    "label_noise": ("--label-noise 0.25", 0.25),
    "label_noise_seed": ("--label-noise 0.25 --label-noise-seed 3", 3),
    "train_subset": ("--train-subset 18", 18),
    "classes": ("--classes 2 0", [2, 0]),
    "network": ("--network whitened", "whitened"),
    "optimizer": ("--optimizer muon", "muon"),
    "muon_lr": ("--optimizer muon --muon-lr 0.1", 0.1),
    "muon_momentum": ("--optimizer muon --muon-momentum 0.9", 0.9),
    "bias_lr": ("--optimizer muon --bias-lr 0.01", 0.01),
    "head_lr": ("--optimizer muon --head-lr 0.1", 0.1),
    "whitening_bias_epochs": ("--network whitened --optimizer muon --whitening-bias-epochs 0", 0),
    "crop_both_sides": ("--crop-both-sides", True),
    "alternate_flip": ("--alternate-flip", True),
}
"""Flags that change a constant, and its value in the summary. Flags before it select what it belongs to."""


@pytest.fixture(scope="module")
def tiny():
    """A data set with the same number of images of each class."""
    return small_dataset(train=24, test=9)


def run(npz, folder, flags):
    """Train by the command and return the summary and the last loss."""
    assert train(f"--dataset npz --data-dir {npz} --output {folder} --backend eager {FLAGS} {flags}".split()) == 0
    result = RunReader(folder).result()
    return json.loads((folder / "summary.json").read_text()), result.rows[-1].train_loss


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Recipe) if field.name not in PUBLISHED])
def test_flag_changes_the_training_and_is_in_the_summary(tmp_path, npz, name):
    flags, value = ABLATIONS[name]
    flag = "--" + name.replace("_", "-")
    _, usual = run(npz, tmp_path / "usual", flags[: flags.index(flag)] if flag in flags else "")
    summary, changed = run(npz, tmp_path / "changed", flags)
    assert summary["recipe"][name] == value
    assert changed != usual and np.isfinite(changed)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--activation tanh", "invalid choice: 'tanh'"),
        ("--init-scale 0", "--init-scale must be above 0"),
        ("--label-noise 1.5", "--label-noise must lie in 0 to 1"),
        ("--label-noise-seed -1", "--label-noise-seed must be at least 0"),
        ("--train-subset -1", "--train-subset must be at least 0"),
        ("--train-subset 2", "tiny.npz: --train-subset must lie in 3 to 24, "),
        ("--train-subset 25", "tiny.npz: --train-subset must lie in 3 to 24, "),
        ("--classes 1", "--classes must be two or more names or numbers from 0, not 1"),
        ("--classes 0 0", "--classes must be different, not 0 0"),
        ("--classes 0 3", "tiny.npz: --classes must lie in 0 to 2, not 0 3"),
    ],
)
def test_invalid_value_prints_one_line(tmp_path, npz, capfd, flags, words):
    assert train(f"--dataset npz --data-dir {npz} --output {tmp_path / 'out'} {FLAGS} {flags}".split()) == 2
    error = capfd.readouterr().err
    assert words in error and error.count("\n") == 1


def test_unknown_activation_in_a_recipe_file_is_refused():
    with pytest.raises(InputError, match="activation must be one of celu, relu, gelu, silu, not tanh"):
        Recipe.from_json('{"activation": "tanh"}')


def published_constants(recipe):
    return {name: recipe[name] for name in PUBLISHED}


def test_weights_load_with_only_the_published_constants(tmp_path, tiny):
    result = fit(RECIPE, tiny, output=tmp_path / "out", **HOW)
    saved = torch.load(tmp_path / "out/model.pt", weights_only=True)
    model = CNN(Recipe(**published_constants(saved["recipe"])), 3)
    model.load_state_dict(saved["state_dict"])
    assert Recipe(**published_constants(saved["recipe"])) == result.recipe


def test_training_whose_file_lacks_the_ablations_resumes(tmp_path, tiny):
    recipe = dataclasses.replace(RECIPE, epochs=2)

    def stop(line):
        if line.startswith("epoch  2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(recipe, tiny, output=tmp_path / "out", **HOW | {"log": stop})
    file = tmp_path / "out/training.json"
    training = json.loads(file.read_text())
    training["config"]["recipe"] = published_constants(training["config"]["recipe"])
    file.write_text(json.dumps(training))
    resumed, whole = fit(recipe, tiny, resume=tmp_path / "out", **HOW), fit(recipe, tiny, **HOW)
    assert [row.train_loss for row in resumed.rows] == [row.train_loss for row in whole.rows]


def celu(x):
    return F.celu(x, 0.075)


def plain_torch(dataset, activation=celu, norm=True, residual=False, nesterov=True, decay_vectors=True, scale=1.0):
    """Return the weights after the epoch of RECIPE with these changes, computed by plain torch."""
    generator = torch.Generator().manual_seed(0)
    weights = dict(CNN(RECIPE, dataset.num_classes, generator).named_parameters())
    for weight in weights.values():
        weight.data *= scale if weight.dim() > 1 else 1
    groups = [{"params": [w], "weight_decay": 5e-4 * 8 * (w.dim() > 1 or decay_vectors)} for w in weights.values()]
    sgd = torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=nesterov)
    images, _ = normalize(dataset, torch.device("cpu"), torch.float32)
    labels = torch.from_numpy(dataset.train_labels)
    n = len(images)
    draws = draw_epoch(n, device="cpu", recipe=RECIPE, generator=generator)
    for step in range(n // 8):
        for group in sgd.param_groups:
            group["lr"] = RECIPE.learning_rate(step + 1, n // 8)
        batch = draws.slice(8 * step, 8 * step + 8)
        x = augment(images, batch, RECIPE, torch.contiguous_format)
        for conv, pool, after, adds in ((0, 1, 1, False), (3, 2, 5, False), (7, 1, 8, True), (10, 1, 11, True)):
            y = F.max_pool2d(F.conv2d(x, weights[f"seq.{conv}.weight"], padding=1), pool)
            if norm:
                y = F.batch_norm(
                    y, None, None, weights[f"seq.{after}.weight"], weights[f"seq.{after}.bias"], training=True
                )
            y = activation(y)
            x = x + y if residual and adds else y
        logits = F.linear(F.max_pool2d(x, 16).flatten(1), weights["seq.15.weight"]) / 8
        loss = F.cross_entropy(logits, labels[batch.permutation], label_smoothing=0.2, reduction="sum")
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    return weights


PLAIN_CHANGES = [
    (dict(), dict()),
    (dict(activation="relu"), dict(activation=F.relu)),
    (dict(activation="gelu"), dict(activation=F.gelu)),
    (dict(activation="silu"), dict(activation=F.silu)),
    (dict(batch_norm=False), dict(norm=False)),
    (dict(residual=True), dict(residual=True)),
    (dict(nesterov=False), dict(nesterov=False)),
    (dict(decay_norms_and_biases=False), dict(decay_vectors=False)),
    (dict(init_scale=0.5), dict(scale=0.5)),
]


def change_id(changes):
    return ", ".join(f"{name} {value}" for name, value in changes.items()) or "none"


@pytest.mark.parametrize(
    ("changes", "plain_changes"), PLAIN_CHANGES, ids=[change_id(changes) for changes, _ in PLAIN_CHANGES]
)
def test_training_equals_plain_torch(tiny, changes, plain_changes):
    result = fit(dataclasses.replace(RECIPE, **changes), tiny, **HOW)
    expected = plain_torch(tiny, **plain_changes)
    trained = {name for name in result.state_dict if name.split(".")[-1] in ("weight", "bias")}
    assert trained == {name for name, weight in expected.items() if weight.grad is not None}
    for name in trained:
        assert torch.allclose(result.state_dict[name], expected[name], rtol=1e-5, atol=1e-6), name


def test_batch_of_one_needs_several_pixels_only_with_batch_norm():
    widths = (6, 12, 24, 48, 96)
    with pytest.raises(InputError, match="batch norm needs more"):
        Recipe(batch_size=1, widths=widths)
    assert Recipe(batch_size=1, widths=widths, batch_norm=False).blocks()[-1].out_size == 1


NOTE = "fused: this recipe has no batch norm, so its kernel is not used"
WITH_GROUPS = dict(residual=True, decay_norms_and_biases=False, nesterov=False)
FAST = ("--activation gelu", "--no-batch-norm")
WITH_KERNELS = "--residual --no-decay-norms-and-biases --no-nesterov --init-scale 0.5"


@pytest.mark.parametrize("flags", [*FAST, pytest.param(WITH_KERNELS, marks=pytest.mark.slow)])
def test_fused_equals_eager_within_eagers_error_at_every_layer(npz, uncompiled, few_programs, capsys, flags):
    assert compare(f"--dataset npz --data-dir {npz} {FLAGS} {flags} --steps 3".split()) == 0
    assert (NOTE in capsys.readouterr().out) == (flags == "--no-batch-norm")


@pytest.mark.parametrize(
    "changes",
    [
        dict(activation="silu"),
        dict(batch_norm=False, residual=True, decay_norms_and_biases=False),
        pytest.param(WITH_GROUPS, marks=pytest.mark.slow),
    ],
)
def test_training_with_fused_equals_eager(tiny, uncompiled, few_programs, changes):
    recipe = dataclasses.replace(RECIPE, **changes)
    ours, theirs = (fit(recipe, tiny, **HOW | {"backend": backend}) for backend in ("fused", "eager"))
    for name, tensor in theirs.state_dict.items():
        assert torch.allclose(ours.state_dict[name], tensor, rtol=1e-3, atol=1e-4), name
    assert ours.rows[-1].test_accuracy == theirs.rows[-1].test_accuracy
    assert ours.summary()["notes"] == ([] if recipe.batch_norm else [NOTE])


@pytest.mark.nightly  # the compiler, a minute
@pytest.mark.parametrize("backend", ["compiled", "fused"])
def test_changed_network_compiles(tiny, few_programs, backend):
    recipe = dataclasses.replace(RECIPE, activation="gelu", residual=True, decay_norms_and_biases=False)
    ours, theirs = (fit(recipe, tiny, **HOW | {"backend": name}) for name in (backend, "eager"))
    assert ours.rows[-1].train_loss == pytest.approx(theirs.rows[-1].train_loss, rel=1e-4)


@pytest.mark.gpu
@pytest.mark.slow  # the compiler
@pytest.mark.parametrize("changes", [dict(batch_norm=False), dict(activation="gelu", residual=True) | WITH_GROUPS])
def test_captured_training_equals_eager(tiny, changes):
    recipe, how = dataclasses.replace(RECIPE, **changes), HOW | dict(device="cuda")
    ours, theirs = (fit(recipe, tiny, **how | {"backend": backend}) for backend in ("fused", "eager"))
    assert ours.rows[-1].train_loss == pytest.approx(theirs.rows[-1].train_loss, rel=1e-4)


@pytest.mark.parametrize(("fraction", "count"), [(0.25, 250), (0.0016, 2), (1.0, 1000)])
def test_label_noise_replaces_a_fraction_of_the_training_labels_and_no_test_label(fraction, count):
    dataset = small_dataset(train=1000, test=50, classes=10)
    noisy = dataset.for_recipe(Recipe(label_noise=fraction))
    changed = noisy.train_labels != dataset.train_labels
    assert changed.sum() == count
    assert np.array_equal(noisy.test_labels, dataset.test_labels)
    assert np.array_equal(noisy.train_images, dataset.train_images)
    assert noisy.notes == (f"label_noise: {count} of 1000 training labels replaced by another class",)


def test_label_noise_is_uniform_over_the_other_classes():
    dataset = small_dataset(train=9000, test=5, classes=10)
    shifts = (dataset.for_recipe(Recipe(label_noise=1)).train_labels - dataset.train_labels) % 10
    counts = np.bincount(shifts, minlength=10)
    assert counts[0] == 0 and all(850 < count < 1150 for count in counts[1:])  # expected: 1000 +- 30


def test_label_noise_is_the_same_in_every_run_and_counted_in_the_summary(tmp_path, npz, tiny):
    ours, _ = run(npz, tmp_path / "a", "--label-noise 0.25 --runs 2")
    other, _ = run(npz, tmp_path / "b", "--label-noise 0.25 --seed 7")
    another, _ = run(npz, tmp_path / "c", "--label-noise 0.25 --label-noise-seed 1")
    digests = [summary["dataset"]["digest"] for summary in (ours, other, another)]
    assert digests[0] == digests[1] == tiny.for_recipe(Recipe(label_noise=0.25)).digest != digests[2] != tiny.digest
    assert ours["notes"] == ["label_noise: 6 of 24 training labels replaced by another class"]


def test_label_noise_of_a_smaller_fraction_is_part_of_a_larger_one():
    dataset = small_dataset(train=300, classes=10)
    less, more = (dataset.for_recipe(Recipe(label_noise=fraction)).train_labels for fraction in (0.1, 0.4))
    changed = less != dataset.train_labels
    assert np.array_equal(less[changed], more[changed])


@pytest.mark.parametrize(("count", "of_each"), [(6, [2, 2, 2]), (8, [3, 3, 2]), (24, [8, 8, 8])])
def test_train_subset_is_balanced_and_nested(tmp_path, npz, tiny, count, of_each):
    subset = tiny.for_recipe(Recipe(train_subset=count))
    assert np.bincount(subset.train_labels).tolist() == of_each
    known = {image.tobytes(): label for image, label in zip(tiny.train_images, tiny.train_labels)}
    assert [known[image.tobytes()] for image in subset.train_images] == subset.train_labels.tolist()
    assert len({image.tobytes() for image in subset.train_images}) == count and len(subset.test_images) == 9
    more = tiny.for_recipe(Recipe(train_subset=min(count + 5, 24)))
    assert {image.tobytes() for image in subset.train_images} <= {image.tobytes() for image in more.train_images}
    summary, _ = run(npz, tmp_path / "out", f"--train-subset {count} --batch-size 3 --seed {count}")
    assert (summary["dataset"]["train_images"], summary["dataset"]["digest"]) == (count, subset.digest)


def test_classes_are_renumbered_in_their_order(tmp_path, npz, tiny):
    summary, _ = run(npz, tmp_path / "out", "--classes 2 0")
    facts = summary["dataset"]
    assert (facts["class_names"], facts["train_images"], facts["test_images"]) == (["2", "0"], 16, 6)
    chosen = tiny.for_recipe(Recipe(classes=(2, 0)))
    assert chosen.digest == facts["digest"]
    for split in ("train", "test"):
        images, labels = getattr(tiny, f"{split}_images"), getattr(tiny, f"{split}_labels")
        assert np.array_equal(getattr(chosen, f"{split}_images"), images[labels != 1])
        assert np.array_equal(getattr(chosen, f"{split}_labels"), np.where(labels[labels != 1] == 2, 0, 1))
    saved = torch.load(tmp_path / "out/model.pt", weights_only=True)
    assert saved["class_names"] == ["2", "0"] and saved["state_dict"]["seq.15.weight"].shape == (2, 8)


def test_extra_test_sets_are_limited_to_the_same_classes(tmp_path, npz):
    summary, _ = run(npz, tmp_path / "out", f"--classes 2 0 --also-test own={npz}")
    assert summary["also_test_mean"]["own"] == pytest.approx(summary["test_accuracy_mean"])
    with pytest.raises(InputError, match="also_test own: has no image of classes 1 2"):
        zeros = dict(test_images=np.zeros((2, 32, 32, 3), np.uint8), test_labels=np.zeros(2, int))
        other = save_npz(tmp_path / "other.npz", small_dataset(), **zeros)
        fit(dataclasses.replace(RECIPE, classes=(1, 2)), small_dataset(), also_test={"own": other}, **HOW)


def test_training_on_some_classes_resumes(tmp_path, npz):
    run(npz, tmp_path / "out", "--classes 2 0 --train-subset 12 --label-noise 0.25 --batch-size 4")
    assert train(f"--resume {tmp_path}/out --runs 2".split()) == 0
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert len(summary["runs"]) == 2 and len(summary["notes"]) == 3


def test_default_recipe_keeps_the_data_set(tiny):
    assert isinstance(tiny, Dataset) and tiny.for_recipe(Recipe()) is tiny
