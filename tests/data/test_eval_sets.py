"""Additional test sets in their published formats."""

import dataclasses
import json

import numpy as np
import pytest

from cifar_fast import InputError, Recipe, fit, load_model
from cifar_fast.data.eval_sets import EvalSet
from cifar_fast.train import main
from cifar_fast.training.results import Result
from tests.helpers import DEVICE, HOW, NARROW, save_npz, small_dataset

RECIPE = Recipe(epochs=2, batch_size=32, widths=NARROW)
FLAGS = "--widths 4 8 8 8 16 32 32 32 --epochs 2 --batch-size 32 --device cpu --backend eager"


@pytest.fixture
def published(tmp_path):
    """CIFAR-10.1, CIFAR-10.2 and CIFAR-10-C in their published formats, with small images of our own."""
    sets = {
        name: small_dataset(test=n, seed=seed) for seed, (name, n) in enumerate({"a": 37, "b": 41, "c": 50}.items())
    }
    (tmp_path / "v6").mkdir()
    np.save(tmp_path / "v6/cifar10.1_v6_data.npy", sets["a"].test_images)
    np.save(tmp_path / "v6/cifar10.1_v6_labels.npy", sets["a"].test_labels.astype(np.int32))
    np.savez(tmp_path / "cifar102_test.npz", images=sets["b"].test_images, labels=sets["b"].test_labels)
    (tmp_path / "CIFAR-10-C").mkdir()
    for name, images in (("fog", sets["c"].test_images), ("snow", 255 - sets["c"].test_images)):
        np.save(tmp_path / f"CIFAR-10-C/{name}.npy", images)
    np.save(tmp_path / "CIFAR-10-C/labels.npy", sets["c"].test_labels.astype(np.uint8))
    return tmp_path, sets


@pytest.mark.slow
def test_command_reports_published_test_sets(published, small, capsys):
    root, _ = published
    npz = save_npz(root / "small.npz", small)
    also = (
        f"--also-test one={root}/v6/cifar10.1_v6_data.npy --also-test two={root}/cifar102_test.npz "
        f"--also-test c={root}/CIFAR-10-C --also-test folder={root}/v6"
    )
    assert main(f"--dataset npz --data-dir {npz} --runs 2 --output {root}/out {also} {FLAGS}".split()) == 0
    shown = capsys.readouterr().out
    assert shown.count("also tested on c/fog, 50 images: ") == 2
    summary = json.loads((root / "out/summary.json").read_text())
    names = {"one", "two", "c/fog", "c/snow", "c/mean", "folder/cifar10.1_v6"}
    assert {*summary["also_test_mean"]} == names
    for name in names:
        by_run = [run["also_test"][name] for run in summary["runs"]]
        assert summary["also_test_mean"][name] == pytest.approx(np.mean(by_run))
    assert summary["also_test_mean"]["one"] == summary["also_test_mean"]["folder/cifar10.1_v6"]
    assert summary["also_test_mean"]["c/fog"] != summary["also_test_mean"]["c/snow"]


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("eager", "float32"), ("eager", "bfloat16"), pytest.param("fused", "float32", marks=pytest.mark.slow)],
)
def test_own_test_set_as_eval_set_has_the_same_accuracy(tmp_path, backend, dtype, uncompiled, few_programs):
    dataset = small_dataset(train=32)
    path = save_npz(tmp_path / "x.npz", dataset)
    options = dict(backend=backend, device=DEVICE.type, dtype=dtype, log=None)
    (run,) = fit(
        dataclasses.replace(RECIPE, epochs=1, batch_size=16), dataset, also_test={"same": path}, **options
    ).runs
    # The plain model evaluates it. Its rounding may change the prediction of one of the 40 images of fused.
    one_image = 0 if backend == "eager" else 100 / 40
    assert run.also_test["same"] == pytest.approx(run.test_accuracy, abs=one_image + 1e-4)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "x: no .*_data.npy with its .*_labels.npy"),
        ({"x.npz": dict(pixels=np.zeros(3))}, "x.npz: holds pixels; it must hold images and labels"),
        ({"a_data.npy": np.zeros((2, 32, 32, 3), np.uint8)}, "a_data.npy: holds images without labels"),
        (
            {"a.npy": np.zeros((2, 32, 32, 3), np.uint8), "labels.npy": np.zeros(3, int)},
            r"x/a.npy: holds 2 images, but labels.npy labels of shape \(3,\)",
        ),
        ({"a.npy": np.zeros((2, 32, 32, 3)), "labels.npy": np.zeros(2, int)}, "x/a: images must be uint8"),
        ({"a.npy": np.zeros((2, 32, 32, 3), np.uint8), "labels.npy": np.array([0, 3])}, "go up to 3, but .* 3 classes"),
    ],
)
def test_unusable_set_is_refused_before_training(tmp_path, small, files, words):
    folder = tmp_path / "x"
    folder.mkdir()
    for name, content in files.items():
        np.savez(folder / name, **content) if name.endswith("npz") else np.save(folder / name, content)
    path = folder / "x.npz" if "x.npz" in files else folder
    lines = []
    with pytest.raises(InputError, match=words):
        fit(RECIPE, small, also_test={"x": path}, backend="eager", device="cpu", log=lines.append)
    assert not lines


def test_file_with_two_different_test_sets_is_refused(tmp_path, small):
    path = save_npz(tmp_path / "x.npz", small, images=255 - small.test_images, labels=small.test_labels)
    with pytest.raises(
        InputError, match=r"x.npz: holds images and test_images, which differ; it must hold one test set"
    ):
        fit(RECIPE, small, also_test={"x": path}, **HOW)


@pytest.mark.slow  # whole trainings
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--also-test here", "'here' is not NAME=PATH"),
        ("--also-test a=b --also-test a=c", "two test sets have the same name"),
        ("--dataset synthetic --also-test a=none.npz", "none.npz: cannot be read (No such file or directory)"),
        ("--dataset synthetic --also-test a=none.txt", "must be a .npz, .npy or .mat file, or a folder of .npy files"),
    ],
)
def test_wrong_flags_give_one_line(tmp_path, monkeypatch, capfd, flags, words):
    monkeypatch.chdir(tmp_path)
    assert main(f"{flags} {FLAGS}".split()) == 2
    error = capfd.readouterr().err
    assert words in error and error.count("\n") == 1


def test_digest_follows_the_content_and_not_the_numbers_of_the_classes(small):
    names, images, labels = ("ant", "bee", "cat"), small.test_images, small.test_labels
    digest = EvalSet("a", images, labels).digest(names)
    assert EvalSet("b", images.copy(), 2 - labels).digest(names[::-1]) == digest
    edited = images.copy()
    edited[-1, -1, -1, -1] ^= 1
    for other in (
        EvalSet("a", edited, labels).digest(names),
        EvalSet("a", images, 2 - labels).digest(names),
        EvalSet("a", images, labels).digest(("ant", "bee", "dog")),
        EvalSet("a", images[:-1], labels[:-1]).digest(names),
        EvalSet("a", images, np.where(labels == 2, -1, labels)).digest(names),
    ):
        assert other != digest


@pytest.mark.parametrize("classes", [(), (1, 2)])
def test_corruptions_have_an_accuracy_for_each_severity_and_their_mean(tmp_path, small, classes):
    """The files are like those of CIFAR-10-C: five severities of the same images, one after another."""
    random = np.random.RandomState(0)
    labels = random.randint(0, 3, 20).astype(np.uint8)
    for number, name in enumerate(("fog", "snow", "spatter")):
        images = small_dataset(test=100, seed=number).test_images
        np.save(tmp_path / f"{name}.npy", images[random.permutation(100)])
    np.save(tmp_path / "labels.npy", np.tile(labels, 5))
    recipe, lines = dataclasses.replace(RECIPE, epochs=1, classes=classes), []
    result = fit(recipe, small, also_test={"c": tmp_path}, output=tmp_path / "out", **HOW | {"log": lines.append})
    (run,) = Result.load(tmp_path / "out").runs
    assert run == result.runs[0]
    probabilities = {
        name: load_model(tmp_path / "out").predict(np.load(tmp_path / f"{name}.npy"))
        for name in ("fog", "snow", "spatter")
    }
    expected = {}
    for name, values in probabilities.items():
        numbers = np.array(classes or (0, 1, 2))[values.argmax(1).numpy()]
        chosen = np.isin(labels, classes or (0, 1, 2))
        expected[name] = [100 * (numbers[k : k + 20] == labels)[chosen].mean() for k in range(0, 100, 20)]
        assert run.also_test_severities[f"c/{name}"] == pytest.approx(expected[name])
        assert run.also_test[f"c/{name}"] == pytest.approx(np.mean(expected[name]))
    means = np.mean([expected["fog"], expected["snow"]], axis=0)  # spatter is one of the four for validation
    assert [run.also_test[f"c/severity-{k}"] for k in range(1, 6)] == pytest.approx(means.tolist())
    assert run.also_test["c/mean"] == pytest.approx(means.mean())
    shown = " ".join(f"{value:.2f}" for value in means)
    assert f"mean over 2 corruptions of c: {means.mean():.2f} %; severity 1 to 5: {shown}" in lines


@pytest.mark.parametrize("cut", ["bytes", "images"])
def test_truncated_corruption_is_named(tmp_path, small, cut):
    images = small_dataset(test=50).test_images
    for name in ("fog", "snow"):
        np.save(tmp_path / f"{name}.npy", images)
    np.save(tmp_path / "labels.npy", np.zeros(50, np.uint8))
    if cut == "bytes":
        (tmp_path / "snow.npy").write_bytes((tmp_path / "snow.npy").read_bytes()[:-5000])
    else:
        np.save(tmp_path / "snow.npy", images[:40])
    words = (
        "cannot be read .it is cut off; copy it again" if cut == "bytes" else "holds 40 images, but labels.npy labels"
    )
    with pytest.raises(InputError, match=rf"{tmp_path}/snow.npy: {words}"):
        fit(RECIPE, small, also_test={"c": tmp_path}, **HOW)
