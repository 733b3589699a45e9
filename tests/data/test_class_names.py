"""The name of a class identifies it: in data sets, extra test sets, predictions, and --classes."""

import dataclasses
import json
import unicodedata

import numpy as np
import pytest
from PIL import Image

from cifar_fast import Dataset, InputError, Recipe, fit, load_dataset, load_model
from cifar_fast.cli.main import main
from cifar_fast.data.class_names import ClassNames
from cifar_fast.data.eval_sets import read_eval_sets
from cifar_fast.inference.predict import find_images
from cifar_fast.utils.progress import lines_to
from tests.helpers import HOW, save_npz, small_dataset

TWELVE = [str(number) for number in range(12)]
RECIPE = Recipe(epochs=1, batch_size=16, widths=(4, 8))


def save_folder(root, dataset, names):
    """Write the images of ``dataset`` to ``root/SPLIT/NAME/NUMBER.png``."""
    for split in ("train", "test"):
        for i, label in enumerate(getattr(dataset, f"{split}_labels")):
            path = root / split / names[label] / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(getattr(dataset, f"{split}_images")[i]).save(path)
    return root


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    """Twelve classes, each called by its number."""
    return small_dataset(train=48, test=24, classes=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, twelve):
    """The twelve classes as folders. Their alphabetical order is 0, 1, 10, 11, 2 and so on."""
    return save_folder(tmp_path_factory.mktemp("twelve") / "set", twelve, TWELVE)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, folder):
    """The folder of a training on the folders."""
    out = tmp_path_factory.mktemp("runs") / "out"
    flags = "--widths 4 8 --epochs 1 --batch-size 16 --device cpu --dtype float32 --backend eager"
    assert main(f"train --dataset folder --data-dir {folder} --output {out} {flags}".split()) == 0
    return out


def save_set(path, dataset, **more):
    np.savez(path, images=dataset.test_images, labels=dataset.test_labels, **more)
    return path


def test_extra_test_set_is_compared_by_class_names(tmp_path, folder, twelve):
    dataset = load_dataset("folder", folder, log=None)
    mixed = dataclasses.replace(twelve, test_labels=(twelve.test_labels + 5) % 12)
    sets = {
        "own": save_set(tmp_path / "own.npz", twelve, class_names=TWELVE),
        "mixed": save_set(tmp_path / "mixed.npz", mixed, class_names=np.roll(TWELVE, 5)),
        "saved": tmp_path / "saved.npz",
    }
    dataset.save(sets["saved"])
    (run,) = fit(RECIPE, dataset, also_test=sets, **HOW).runs
    assert run.also_test == dict.fromkeys(sets, pytest.approx(run.test_accuracy))
    own, mixed, _ = read_eval_sets(sets, dataset.class_names)
    names = np.array(dataset.class_names)
    assert (names[own.labels] == np.array(TWELVE)[twelve.test_labels]).all() and (own.labels == mixed.labels).all()


@pytest.mark.parametrize("trained_on", ["0 1 10 11 2 3", "class_1 class_10 class_2", "3 2 1"])
def test_line_tells_that_numbers_alone_may_mean_other_classes(tmp_path, trained_on):
    names, lines = trained_on.split(), []
    path = save_set(tmp_path / "x.npz", small_dataset())
    with lines_to(lines.append):
        (found,) = read_eval_sets({"x": path}, names)
    assert list(found.labels) == list(small_dataset().test_labels)
    odd = {"0": (2, "10"), "class_1": (0, "class_1"), "3": (0, "3")}[names[0]]
    (line,) = lines
    assert line == (
        f"test set x: has no class_names, so label {odd[0]} means the class '{odd[1]}': the classes are in the order "
        f"{', '.join(names)}"
    )


@pytest.mark.parametrize("trained_on", ["ant bee cat", "0 1 2", "00 01 02", "class_0 class_1 class_2", "7up 8 9"])
def test_numbers_alone_give_no_line_in_the_usual_order(tmp_path, trained_on):
    lines = []
    with lines_to(lines.append):
        read_eval_sets({"x": save_set(tmp_path / "x.npz", small_dataset())}, trained_on.split())
    assert not lines


@pytest.mark.parametrize(("trained_on", "given"), [("0 1 2", "ant bee cat"), ("ant bee cat", "0 1 2")])
def test_names_on_one_side_only_are_compared_by_number_with_a_line(tmp_path, trained_on, given):
    lines, small = [], small_dataset()
    with lines_to(lines.append):
        (found,) = read_eval_sets(
            {"x": save_set(tmp_path / "x.npz", small, class_names=given.split())}, trained_on.split()
        )
    assert (found.labels == small.test_labels).all()
    assert lines == [
        f"test set x: classes are compared by number, since its classes are {given.replace(' ', ', ')}, not "
        f"{trained_on.replace(' ', ', ')}"
    ]


@pytest.mark.parametrize(
    ("trained_on", "given", "words"),
    [
        ("ant bee cat", "ant bee dog", "x: the class 'dog' is none of the classes ant, bee, cat"),
        ("1 2 3", "0 1 2", "x: the class '0' is none of the classes 1, 2, 3"),
        ("ant bee cat", "ant bee", "labels go up to 2, but class_names has only 2 names"),
        ("ant bee cat", "ant bee bee", "x.npz: class_names holds the name 'bee' twice"),
    ],
)
def test_unknown_class_of_an_extra_test_set_is_refused(tmp_path, trained_on, given, words):
    path = save_set(tmp_path / "x.npz", small_dataset(), class_names=given.split())
    with pytest.raises(InputError, match=words):
        read_eval_sets({"x": path}, trained_on.split())


def test_name_without_an_image_need_not_be_known(tmp_path):
    path = save_set(tmp_path / "x.npz", small_dataset(), class_names=["cat", "ant", "bee", "yak"])
    (found,) = read_eval_sets({"x": path}, ["ant", "bee", "cat"])
    assert list(found.labels[:3]) == [2, 0, 1]


def test_predict_compares_classes_by_name(tmp_path, trained, folder, twelve, capfd):
    path = save_set(tmp_path / "x.npz", twelve, class_names=TWELVE)
    accuracy = json.loads((trained / "summary.json").read_text())["test_accuracy_mean"]
    for images in (path, folder / "test"):
        capfd.readouterr()
        assert main(["predict", str(trained), str(images), "--json", str(tmp_path / "out.json")]) == 0
        assert f"accuracy {accuracy:.2f} % of 24 images" in capfd.readouterr().out
        report = json.loads((tmp_path / "out.json").read_text())
        assert sorted(image["label"] for image in report["images"]) == sorted(TWELVE * 2)


def test_predict_tells_that_numbers_alone_may_mean_other_classes(tmp_path, trained, twelve, capfd):
    assert main(["predict", str(trained), str(save_set(tmp_path / "x.npz", twelve))]) == 0
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "class_names" in line]
    assert line.startswith(f"{tmp_path}/x.npz: has no class_names, so label 2 means the class '10': ")


def test_predict_refuses_a_class_that_the_model_lacks(tmp_path, trained, twelve, capfd):
    path = save_set(tmp_path / "x.npz", twelve, class_names=[*TWELVE[:-1], "12"])
    assert main(["predict", str(trained), str(path)]) == 2
    assert "x.npz: the class '12' is none of the classes 0, 1, 10, 11, 2" in capfd.readouterr().err


def test_predict_with_a_model_of_some_classes_needs_names(tmp_path, folder, twelve):
    recipe = dataclasses.replace(RECIPE, classes=(3, 10), batch_size=4)
    fit(recipe, load_dataset("folder", folder, log=None), output=tmp_path / "out", **HOW)
    model = load_model(tmp_path / "out")
    assert model.class_names == ("3", "10")
    chosen = np.isin(twelve.test_labels, [3, 10])
    arrays = dict(images=twelve.test_images[chosen], labels=twelve.test_labels[chosen])
    np.savez(tmp_path / "x.npz", **arrays, class_names=TWELVE)
    found = find_images([tmp_path / "x.npz"], model)
    assert [model.class_names[image.label] for image in found] == [str(label) for label in arrays["labels"]]
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputError, match=r"x.npz: has labels but no class_names, and the model was trained on some"):
        find_images([tmp_path / "x.npz"], model)


def test_folder_of_a_class_inside_the_folder_of_another_is_refused(tmp_path, trained, capfd):
    (tmp_path / "3/x/10").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "3/x/10/a.png")
    assert main(["predict", str(trained), str(tmp_path)]) == 2
    assert "3/x/10/a.png: lies in folders of several classes, 10 and 3; give the folder" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("classes", "expected"),
    [(("3", "10"), ["3", "10"]), ((3, 10), ["3", "10"]), (("11", 2), ["11", "2"])],
)
def test_chosen_classes_are_those_of_that_name(folder, classes, expected):
    dataset = load_dataset("folder", folder, log=None).for_recipe(Recipe(classes=classes))
    whole = load_dataset("folder", folder, log=None)
    assert list(dataset.class_names) == expected
    images = whole.train_images[whole.train_labels == whole.class_names.index(expected[0])]
    assert np.array_equal(dataset.train_images[dataset.train_labels == 0], images)


def test_command_chooses_classes_by_name(tmp_path, small, capfd):
    path = save_npz(tmp_path / "x.npz", small, class_names=["ant", "bee", "cat"])
    command = f"train --dataset npz --data-dir {path} --widths 4 8 --epochs 1 --batch-size 16 --device cpu"
    assert main(f"{command} --classes cat 0 --also-test own={path} --output {tmp_path}/out".split()) == 0
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["dataset"]["class_names"] == ["cat", "ant"] and summary["recipe"]["classes"] == ["cat", 0]
    assert summary["also_test_mean"]["own"] == pytest.approx(summary["test_accuracy_mean"])
    assert main(f"train --resume {tmp_path}/out --runs 2".split()) == 0
    capfd.readouterr()
    for classes, words in {
        "cat dog": "--classes has 'dog', which is none of the classes ant, bee, cat",
        "cat 2": "--classes names a class twice: cat 2",
        "cat 3": "--classes must lie in 0 to 2, not cat 3",
    }.items():
        assert main(f"{command} --classes {classes} --output {tmp_path}/other".split()) == 2
        assert words in capfd.readouterr().err


@pytest.mark.parametrize(
    ("names", "classes", "expected"),
    [
        ("00 01 02", (2, 0), (2, 0)),
        ("1 2 3", (1, 3), (0, 2)),
        ("1 2 3", (0, 1), "has '0', which is none of the classes 1, 2, 3"),
        ("2 02 3", (2, 3), (0, 2)),
        ("02 002 3", (2, 3), "has '2', which is none"),
        ("7up 1 0", (0, 1), (2, 1)),
        ("ant bee cat", (2, "ant"), (2, 0)),
    ],
)
def test_number_is_the_name_of_a_class_if_names_are_integers(names, classes, expected):
    names = ClassNames(names.split())
    if isinstance(expected, tuple):
        assert names.choose(classes, "x") == expected
    else:
        with pytest.raises(InputError, match=expected):
            names.choose(classes, "x")


@pytest.mark.parametrize(
    "given",
    [
        {0: "ant", 2: "cat", 1: "bee"},
        {"2": "cat", "0": "ant", "1": "bee"},
        {"bee": 1, "cat": 2, "ant": 0},
        {"bee": np.int64(1), "cat": np.int64(2), "ant": np.int64(0)},
        ["ant", " bee\n", "cat "],
        np.array([b"ant", b"bee", b"cat"]),
        iter(("ant", "bee", "cat")),
    ],
)
def test_class_names_are_read_by_their_numbers_and_cleaned(small, given):
    assert dataclasses.replace(small, class_names=given).class_names == ("ant", "bee", "cat")


def test_names_that_are_numbers_may_be_the_keys_of_a_mapping(small):
    assert dataclasses.replace(small, class_names={"0": 0, "10": 1, "2": 2}).class_names == ("0", "10", "2")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("cat", "must be a list of names in the order of their numbers, not the single text 'cat'"),
        (np.array("cat"), "must be a list .* not the single text 'cat'"),
        (b"cat", "must be a list .* not the single text b'cat'"),
        (3, "must be a list of names .* not int"),
        ({"ant", "bee", "cat"}, "must be a list of names .* not set"),
        (["ant", "bee", "ant"], "holds the name 'ant' twice"),
        (["ant", "bee", "ant "], "holds the name 'ant' twice"),
        (["é", "bee", unicodedata.normalize("NFD", "é")], "holds the name 'é' twice"),
        (["ant", "", "cat"], "holds an empty name, that of class 1"),
        (["ant", " \t", "cat"], "holds an empty name, that of class 1"),
        (["ant", None, "cat"], "must hold names, not NoneType"),
        ([["ant"], ["bee"], ["cat"]], "must hold names, not list"),
        (np.array([0.0, 1.0, 2.0]), "must hold names, not float"),
        ({0: "ant", 1: "bee", 3: "cat"}, "must have each number from 0 to 2 once"),
        ({"ant": 0, "bee": 1, "cat": 1}, "must have each number from 0 to 2 once"),
        ({0: 1, 1: 0, 2: 2}, "must have each number from 0 to 2 once, with its name"),
        ({"a": "ant", "b": "bee"}, "must map numbers to names, or names to numbers"),
    ],
)
def test_names_that_identify_no_class_are_refused(small, given, words):
    with pytest.raises(InputError, match=f"^small.npz: class_names {words}"):
        dataclasses.replace(small, class_names=given)


def test_npz_with_a_single_text_as_class_names_is_refused(tmp_path, small):
    with pytest.raises(InputError, match=r"x.npz: class_names must be a list .* single text 'cat'"):
        load_dataset("npz", save_npz(tmp_path / "x.npz", small, class_names=np.array("cat")))


def test_composed_and_decomposed_names_are_the_same(tmp_path, small):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    root = save_folder(tmp_path / "set", small, ["ant", "bee", composed])
    (root / "test" / composed).rename(root / "test" / decomposed)
    dataset = load_dataset("folder", root, log=None)
    assert dataset.class_names == ("ant", "bee", composed) and len(dataset.test_labels) == 40
    path = save_set(tmp_path / "x.npz", small, class_names=[decomposed, "bee", "ant"])
    (found,) = read_eval_sets({"x": path}, dataset.class_names)
    assert list(found.labels[:3]) == [2, 1, 0]
    assert dataset.for_recipe(Recipe(classes=("ant", decomposed))).class_names == ("ant", composed)
    fit(RECIPE, dataset, output=tmp_path / "out", **HOW)
    model = load_model(tmp_path / "out")
    assert {image.label for image in find_images([root / "test"], model)} == {0, 1, 2}


@pytest.mark.parametrize("other", ["bee ", unicodedata.normalize("NFD", "é")])
def test_two_folders_of_one_class_are_refused(tmp_path, small, other):
    root = save_folder(tmp_path / "set", small, ["ant", "bee", "é"])
    (root / "train" / other).mkdir()
    with pytest.raises(InputError, match=r"set/train: class_names holds the name '(bee|é)' twice"):
        load_dataset("folder", root, log=None)


def test_resumed_training_refuses_other_class_names(tmp_path, small):
    how = HOW | dict(output=tmp_path / "out")
    fit(RECIPE, dataclasses.replace(small, class_names=("ant", "bee", "cat")), **how)
    other = Dataset(
        "npz", "other.npz", *(getattr(small, f"{a}_{b}") for a in ("train", "test") for b in ("images", "labels"))
    )
    with pytest.raises(InputError, match=r"the classes of other.npz were ant, bee, cat, not 0, 1, 2"):
        fit(RECIPE, other, runs=2, resume=tmp_path / "out", **HOW)


def test_saved_model_keeps_the_names(trained):
    assert load_model(trained).class_names == tuple(sorted(TWELVE))
