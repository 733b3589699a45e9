"""Data as people have it: other sizes and splits, and the published forms of MedMNIST, SVHN, CIFAR-10N, CIFAR-10H."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy.io import savemat

from cifar_fast import InputError, Sweep, fit_sweep, load_dataset
from cifar_fast.cli.main import main
from cifar_fast.training.results import Result
from tests.helpers import save_npz, small_dataset

FLAGS = "--widths 4 8 --epochs 1 --batch-size 8 --device cpu --dtype float32 --backend eager"


@pytest.fixture(autouse=True)
def quick(no_curves):
    pass


def pixels(n, *shape):
    return np.random.RandomState(n).randint(0, 256, (n, *shape), np.uint8)


def medmnist(path, *shape, **changes):
    """Write a file in the published form: labels ``[N, 1]`` of type uint8, three splits."""
    arrays = {}
    for split, n in (("train", 40), ("val", 7), ("test", 12)):
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = (
            pixels(n, *shape),
            np.arange(n, dtype=np.uint8)[:, None] % 2,
        )
    arrays |= changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def folder(root, size=(32, 32), splits=(("train", 6), ("test", 2))):
    for split, count in splits:
        for k, name in enumerate(("ant", "bee")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = pixels(i + 10 * k + 1, size[1], size[0], 3)[-1]
                Image.fromarray(image).save(root / split / name / f"{i:02}.png")
    return root


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 3), (64, 64), (96, 96, 3), (160, 120, 3)])
def test_medmnist_of_each_size_is_read_as_published(tmp_path, shape):
    path, lines = medmnist(tmp_path / "x.npz", *shape), []
    with pytest.raises(InputError, match=f"train_images are {shape[1]} x {shape[0]} pixels; .* or give resize 32"):
        load_dataset("npz", path, log=None)
    dataset = load_dataset("npz", path, resize=32, log=lines.append)
    assert dataset.train_labels.tolist() == [0, 1] * 20 and len(dataset.test_images) == 12
    expected = ImageOps.fit(Image.fromarray(pixels(40, *shape)[3]), (32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(dataset.train_images[3], np.asarray(expected.convert("RGB")))
    how = "to 32 x 32: rotated upright, cropped to the largest central square, bicubic with antialiasing"
    assert lines == [
        f"{path}: train_images: resized 40 of 40 images {how}",
        f"{path}: test_images: resized 12 of 12 images {how}",
        f"{path}: val_images: resized 7 of 7 images {how}",
        f"{path}: the 7 images of the split val are validation images",
    ]
    assert len(dataset.validation_images) == 7


def test_val_is_the_test_split_of_data_without_one(tmp_path):
    path, lines = medmnist(tmp_path / "x.npz", 32, 32, test_images=None, test_labels=None), []
    assert len(load_dataset("npz", path, log=lines.append).test_images) == 7
    assert lines == [f"{path}: has no split test; the 7 images of val are tested on"]
    for name in ("val", "valid", "validation"):
        root, lines = folder(tmp_path / name, splits=(("train", 6), (name, 3))), []
        assert len(load_dataset("folder", root, log=lines.append).test_images) == 6
        assert f"{root}: has no split test; the 6 images of {name} are tested on" in lines
    folder(root, splits=(("test", 2),))
    lines = []
    assert len(load_dataset("folder", root, log=lines.append).test_images) == 4
    assert f"{root}/validation: the 6 images of the split validation are left out" in lines


@pytest.mark.parametrize("bare", [False, True])
def test_folder_without_a_test_split_is_divided(tmp_path, bare):
    root = folder(tmp_path / "set", splits=(("train", 20),))
    if bare:
        root = root / "train"
    else:
        with pytest.raises(InputError, match=r"set: has no split test or val; hold out .* with test_fraction"):
            load_dataset("folder", root, log=None)
    lines = []
    dataset = load_dataset("folder", root, test_fraction=0.25, log=lines.append)
    assert f"{root}: 10 of 40 training images are held out for testing" in lines
    assert np.bincount(dataset.train_labels).tolist() == [15, 15] and np.bincount(dataset.test_labels).tolist() == [
        5,
        5,
    ]
    rows = {image.tobytes() for image in (*dataset.train_images, *dataset.test_images)}
    assert len(rows) == len({image.read_bytes() for image in root.rglob("*.png")})
    same, other = (load_dataset("folder", root, test_fraction=0.25, test_fraction_seed=s, log=None) for s in (0, 1))
    assert dataset.digest == same.digest != other.digest


def test_fraction_is_refused_where_a_test_split_exists(tmp_path):
    with pytest.raises(InputError, match=r"x.npz: has the split test to test on; leave test_fraction out"):
        load_dataset("npz", medmnist(tmp_path / "x.npz", 32, 32), test_fraction=0.2, log=None)
    for fraction in (0, 1, -0.1, 2, "a fifth", True):
        with pytest.raises(InputError, match="test_fraction must"):
            load_dataset("synthetic", test_fraction=fraction, log=None)
    with pytest.raises(InputError, match="resize must be 32, the size that is trained on, not 64"):
        load_dataset("synthetic", resize=64)


def test_folder_of_photos_is_resized_once(tmp_path):
    root = folder(tmp_path / "set", size=(96, 64))
    with pytest.raises(InputError, match=r"00.png: 96 x 64 pixels; images must be 32 x 32, or give resize 32"):
        load_dataset("folder", root, log=None)
    first, again = [], []
    dataset = load_dataset("folder", root, resize=32, log=first.append)
    assert load_dataset("folder", root, resize=32, log=again.append).digest == dataset.digest
    assert again == [line for line in first if line.startswith(f"{root}: resized 16 of 16 images")]
    with pytest.raises(InputError, match="96 x 64 pixels"):  # the cache is that of the resized images
        load_dataset("folder", root, log=None)


@pytest.mark.parametrize("name", ["svhn", "npz"])
def test_svhn_is_read_as_published(tmp_path, name):
    """Label 10 is the digit 0, and images are ``[32, 32, 3, N]``."""
    for split, n in (("train", 50), ("test", 20), ("extra", 30)):
        labels = np.arange(1, n + 1, dtype=np.uint8)[:, None] % 10
        savemat(
            tmp_path / f"{split}_32x32.mat",
            {"X": np.moveaxis(pixels(n, 32, 32, 3), 0, -1), "y": labels + 10 * (labels == 0)},
        )
    lines = []
    dataset = load_dataset(name, tmp_path if name == "svhn" else tmp_path / "train_32x32.mat", log=lines.append)
    assert dataset.class_names == tuple("0123456789")
    assert dataset.train_labels.tolist() == [*range(1, 10), 0] * 5
    assert np.array_equal(dataset.train_images, pixels(50, 32, 32, 3))
    assert np.array_equal(dataset.test_images, pixels(20, 32, 32, 3))
    assert lines == [f"{tmp_path}/extra_32x32.mat: the 30 images of the split extra are left out"]


def test_other_mat_files_are_named(tmp_path):
    savemat(tmp_path / "train_32x32.mat", {"digitStruct": np.zeros(3)})
    with pytest.raises(InputError, match=r"train_32x32.mat: lacks X and y; a .mat file must hold X and y"):
        load_dataset("svhn", tmp_path)
    with pytest.raises(InputError, match=r"none/train_32x32.mat: no such file|none: no such file"):
        load_dataset("svhn", tmp_path / "none")


@pytest.fixture
def labeled(tmp_path):
    """A data set, and its labels with errors of people, in the forms of CIFAR-10N and CIFAR-10H."""
    dataset = small_dataset(train=64, test=40)
    noisy = dataset.train_labels.copy()
    noisy[:5] = (noisy[:5] + 1) % 3
    clean = dataset.train_labels
    torch.save({"clean_label": clean, "worse_label": noisy, "aggre_label": clean}, tmp_path / "human.pt")
    votes = np.full((40, 3), 1)
    votes[np.arange(40), dataset.test_labels] = 48
    votes[0] = [25, 25, 0]
    np.save(tmp_path / "counts.npy", votes)
    np.save(tmp_path / "probs.npy", votes / votes.sum(1, keepdims=True))
    save_npz(tmp_path / "x.npz", dataset)
    return tmp_path, dataset, noisy


def test_labels_of_cifar_10n_are_read_as_published(labeled):
    root, dataset, noisy = labeled
    lines = []
    given = f"{root}/human.pt:worse_label"
    found = load_dataset("npz", root / "x.npz", train_labels=given, log=lines.append)
    assert found.train_labels.tolist() == noisy.tolist() and found.test_labels.tolist() == dataset.test_labels.tolist()
    assert lines == [f"train_labels {given}: 5 of 64 labels differ from those of the data set"]
    np.save(root / "worse.npy", noisy)
    assert load_dataset("npz", root / "x.npz", train_labels=root / "worse.npy", log=None).digest == found.digest


def test_labels_of_a_divided_data_set_are_those_of_all_its_images(labeled):
    """The images to test on keep the labels of the data set."""
    root, dataset, noisy = labeled
    np.savez(root / "train.npz", train_images=dataset.train_images, train_labels=dataset.train_labels)
    how = dict(test_fraction=0.5, log=None)
    plain = load_dataset("npz", root / "train.npz", **how)
    found = load_dataset("npz", root / "train.npz", train_labels=f"{root}/human.pt:worse_label", **how)
    assert np.array_equal(found.test_labels, plain.test_labels)
    number = {image.tobytes(): i for i, image in enumerate(dataset.train_images)}
    assert found.train_labels.tolist() == [noisy[number[image.tobytes()]] for image in found.train_images]


@pytest.mark.parametrize("file", ["counts.npy", "probs.npy"])
def test_soft_labels_of_cifar_10h_give_the_most_probable_class(labeled, file):
    root, dataset, _ = labeled
    lines = []
    found = load_dataset("npz", root / "x.npz", test_labels=root / file, log=lines.append)
    assert found.test_labels.tolist() == dataset.test_labels.tolist()  # of class 0 and 1, image 0 gets the first
    assert lines[0] == (
        f"test_labels {root}/{file} are soft: the most probable class of each image is used, and the rest, 5.2 % of "
        "the probability, is left out; 1 images have several such classes and get the first"
    )
    path = save_npz(root / "soft.npz", dataset, test_labels=np.load(root / file))
    assert load_dataset("npz", path, log=None).digest == dataset.digest


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ("human.pt", r"holds clean_label, worse_label, aggre_label; name one of them, as .*human.pt:NAME, with 64"),
        ("human.pt:worst", "holds clean_label"),
        ("none.npy", "none.npy: cannot be read .No such file"),
        ("short.npy", r"must hold 64 integers, one per image, not int64 of shape \(9,\)"),
        ("high.npy", "labels must lie in 0 to 2, not 3 to 3"),
        ("other.pt:worse_label", "its clean_label differs from the labels of the data set"),
        ("ordered.npy", "it holds pickled Python objects"),
        ("multi.npy", "an image with several labels or none cannot be trained on"),
        ("code.pt", "code.pt: damaged, or not written by torch.save with arrays of numbers"),
    ],
)
def test_other_labels_are_refused(labeled, labels, words):
    root, dataset, noisy = labeled
    np.save(root / "short.npy", noisy[:9])
    np.save(root / "high.npy", np.full(64, 3))
    np.save(root / "ordered.npy", np.array({"clean_label": noisy}, dtype=object))
    np.save(root / "multi.npy", np.random.RandomState(0).randint(0, 2, (64, 14)).astype(np.uint8))
    torch.save({"clean_label": dataset.train_labels[::-1].copy(), "worse_label": noisy}, root / "other.pt")
    torch.save({"clean_label": main}, root / "code.pt")
    with pytest.raises(InputError, match=words):
        load_dataset("npz", root / "x.npz", train_labels=root / labels, log=None)


def test_command_reads_the_data_so_and_resumes_from_elsewhere(labeled, tmp_path, monkeypatch, capfd):
    root, _, _ = labeled
    shape = (40, 40)
    medmnist(root / "train.npz", *shape, test_images=None, test_labels=None, val_images=None, val_labels=None)
    np.save(root / "noisy.npy", np.zeros((40, 1), np.uint8) + (np.arange(40) % 3 == 0)[:, None])
    medmnist(root / "also.npz", *shape)
    monkeypatch.chdir(root)
    flags = "--resize 32 --test-fraction 0.25 --test-fraction-seed 3 --train-labels noisy.npy --also-test a=also.npz"
    assert main(f"train --dataset npz --data-dir train.npz {flags} --output out {FLAGS}".split()) == 0
    summary = json.loads((root / "out/summary.json").read_text())
    options = dict(resize=32, test_fraction=0.25, test_fraction_seed=3, train_labels="noisy.npy")
    assert summary["dataset"]["options"] == options
    assert (summary["dataset"]["train_images"], summary["dataset"]["test_images"]) == (30, 10)
    assert "also_test a: resized 12 of 12 images" in capfd.readouterr().out
    (root / "elsewhere").mkdir()
    monkeypatch.chdir(root / "elsewhere")
    assert main(["train", "--resume", "../out", "--runs", "2"]) == 0
    assert len(Result.load(root / "out").runs) == 2
    (root / "noisy.npy").unlink()
    assert main(["train", "--resume", "../out", "--runs", "3"]) == 2
    assert "noisy.npy: the training read it, but it is gone; move it back" in capfd.readouterr().err


def test_sweep_reads_the_data_so(tmp_path):
    folder(tmp_path / "set", size=(40, 40), splits=(("train", 40),))
    sweep = Sweep.from_toml(
        f'dataset = "folder"\ndata_dir = "{tmp_path}/set"\nresize = 32\ntest_fraction = 0.2\ndevice = "cpu"\n'
        'backend = "eager"\n[recipe]\nepochs = 1\nbatch_size = 16\nwidths = [4, 8]\n[variants.a]\n',
        output=f"{tmp_path}/out",
    )
    (result,) = fit_sweep(sweep, log=None).values()
    assert result.dataset["test_images"] == 16 and result.dataset["options"] == {"resize": 32, "test_fraction": 0.2}
