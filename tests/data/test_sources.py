"""load_dataset: .npz files, image folders, CIFAR archives; the checks of Dataset."""

import dataclasses
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cifar_fast import InputError, load_dataset
from cifar_fast.data.image_folder import images_below
from tests.helpers import save_npz, small_dataset


def refusal(*words):
    """Expect an InputError whose message is one line that matches all of ``words``."""
    return pytest.raises(InputError, match="(?s)^(?!.*\n)" + "".join(f"(?=.*{word})" for word in words))


def test_npz_gives_arrays_and_class_names(tmp_path, small):
    path = save_npz(tmp_path / "x.npz", small, class_names=np.array(["cat", "dog", "eel"]))
    for where in (path, tmp_path):
        dataset = load_dataset("npz", where)
        assert dataset.class_names == ("cat", "dog", "eel")
        assert np.array_equal(dataset.train_images, small.train_images)
        assert np.array_equal(dataset.test_labels, small.test_labels)
        assert dataset.train_labels.dtype == np.int64
        assert dataset.digest == small.digest


def test_digest_depends_on_every_array(small):
    digests = {
        small.digest,
        small_dataset(seed=1).digest,
        small_dataset(train=95).digest,
        small_dataset(test=39).digest,
    }
    assert len(digests) == 4


@pytest.mark.parametrize("classes", [2, 1000])
def test_two_to_a_thousand_classes_load(tmp_path, classes):
    dataset = load_dataset(
        "npz", save_npz(tmp_path / "x.npz", small_dataset(train=1000, test=classes, classes=classes))
    )
    assert dataset.num_classes == classes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            dict(train_images=None, test_labels=None, x=np.zeros(2)),
            ["lacks train_images, test_labels", "it holds train_labels, test_images, x"],
        ),
        (dict(train_images=np.zeros((96, 32, 32, 3), np.float32)), ["train_images must be uint8", "float32"]),
        (dict(test_images=np.zeros((40, 3, 32, 32), np.uint8)), ["test_images must be", r"\(40, 3, 32, 32\)"]),
        (dict(test_images=np.uint8(3)), ["test_images must be"]),
        (dict(train_labels=np.zeros(95, int)), ["train_labels", r"\(95,\)"]),
        (dict(train_labels=np.zeros(96)), ["train_labels", "float64"]),
        (dict(train_labels=np.zeros(96, int)), [r"1 class\(es\)"]),
        (dict(train_labels=np.arange(96) % 3 - 1), ["train_labels must lie in 0 to 999, not -1 to 1"]),
        (dict(train_labels=np.arange(96) % 3 + 10**12), ["must lie in 0 to 999"]),
        (dict(train_labels=np.arange(96) % 3 * 2), ["class 1 has no training image"]),
        (dict(test_labels=np.full(40, 3)), ["test_labels has class 3, which train_labels lacks"]),
        (
            dict(test_images=np.zeros((0, 32, 32, 3), np.uint8), test_labels=np.zeros(0, int)),
            ["test_images holds no image"],
        ),
        (dict(train_labels=np.array([None] * 96)), ["x.npz", "pickle"]),
        (dict(class_names=np.array(["a", "b"])), ["train_labels go up to 2, but only 2 classes are named"]),
    ],
)
def test_wrong_npz_is_refused(tmp_path, small, changes, words):
    path = save_npz(tmp_path / "x.npz", small, **changes)
    with refusal("x.npz", *words):
        load_dataset("npz", path)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 0.999), st.booleans())
def test_damaged_npz_is_named(tmp_path, fraction, truncate):
    path = save_npz(tmp_path / "whole.npz", small_dataset(train=4, test=2, classes=2))
    data = bytearray(path.read_bytes())
    position = int(fraction * len(data))
    if truncate:
        data = data[:position]
    else:
        data[position] ^= 0xFF
    (tmp_path / "damaged.npz").write_bytes(data)
    try:
        dataset = load_dataset("npz", tmp_path / "damaged.npz")
    except InputError as error:
        assert "damaged.npz" in str(error) and "\n" not in str(error)
    else:  # the flipped bits are in a field without effect, such as a date
        assert not truncate
        assert dataset.digest == load_dataset("npz", path).digest


def test_npy_file_is_recognized(tmp_path, small):
    np.save(tmp_path / "x.npy", small.train_images)
    with refusal(r"x.npy: holds one array of shape \(96, 32, 32, 3\)", "an .npz file with train_images"):
        load_dataset("npz", tmp_path / "x.npy")


def test_class_names_may_be_bytes(tmp_path, small):
    path = save_npz(tmp_path / "x.npz", small, class_names=np.array([b"cat", "hôtel".encode(), b"eel"]))
    assert load_dataset("npz", path).class_names == ("cat", "hôtel", "eel")


def test_missing_npz_is_named(tmp_path):
    with refusal("none.npz", "no such file"):
        load_dataset("npz", tmp_path / "none.npz")
    with refusal("holds 0 .npz files"):
        load_dataset("npz", tmp_path)
    with refusal("needs data_dir"):
        load_dataset("npz")


@pytest.mark.parametrize("channel", [0, 2])
def test_constant_channel_cannot_be_trained_on(small, channel):
    """A single other value is enough to train."""
    images = small.train_images.copy()
    images[..., channel] = 7
    with refusal("small.npz: a channel of train_images has the same value everywhere; it cannot be normalized"):
        dataclasses.replace(small, train_images=images).check_trainable(96)
    images[5, 6, 7, channel] = 8
    dataclasses.replace(small, train_images=images).check_trainable(96)


def test_fewer_images_than_a_batch_cannot_be_trained_on(small):
    with refusal("small.npz: 96 training images are fewer than one batch of 97; give a smaller batch_size"):
        small.check_trainable(97)


def test_unknown_dataset_is_refused():
    with refusal("unknown data set 'mnist'", "cifar10, cifar100, folder, npz, synthetic, hf:OWNER/NAME"):
        load_dataset("mnist")


@pytest.mark.parametrize("name", ["npz", "folder"])
def test_path_that_is_too_long_gives_one_line(name):
    with refusal("File name too long"):
        load_dataset(name, "x" * 5000)


def make_folder(root, splits=(("train", 6), ("test", 2)), classes=("ant", "bee"), suffix="png"):
    random = np.random.RandomState(0)
    for split, count in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(random.randint(0, 256, (32, 32, 3), dtype=np.uint8)).save(
                    root / split / name / f"{i:03}.{suffix}"
                )
    return root


def test_folder_gives_images_in_order_of_names(tmp_path):
    root = make_folder(tmp_path / "set")
    dataset = load_dataset("folder", root, log=None)
    assert dataset.class_names == ("ant", "bee")
    assert list(dataset.train_labels) == [0] * 6 + [1] * 6
    assert list(dataset.test_labels) == [0, 0, 1, 1]
    for index, file in ((2, "train/ant/002.png"), (7, "train/bee/001.png")):
        assert np.array_equal(dataset.train_images[index], np.asarray(Image.open(root / file)))
    assert np.array_equal(dataset.test_images[3], np.asarray(Image.open(root / "test/bee/001.png")))


def test_all_image_formats_and_subfolders_are_read(tmp_path):
    root = make_folder(tmp_path / "set")
    with Image.open(root / "train/ant/000.png") as image:
        for name in ("b/deep/er/x.BMP", "b/y.tif", "c.webp", "d.ppm", "e.Gif"):
            (root / "train/ant" / name).parent.mkdir(parents=True, exist_ok=True)
            image.save(root / "train/ant" / name, **{"lossless": True} if name.endswith("webp") else {})
    (root / "train/bee/link").symlink_to(root / "train/ant/b", target_is_directory=True)
    (root / "train/bee/loop").symlink_to(root / "train/bee", target_is_directory=True)
    lines = []
    dataset = load_dataset("folder", root, log=lines.append)
    assert list(np.bincount(dataset.train_labels)) == [6 + 5, 6 + 2]
    assert np.array_equal(dataset.train_images[6], dataset.train_images[0])  # b/deep/er/x.BMP, after 005.png
    (line,) = [line for line in lines if line.startswith("ignored")]
    assert line.endswith(": 1 link to a parent folder")


def test_linked_folders_are_read_in_the_order_of_their_paths(tmp_path):
    """The order in which the folder lists its entries has no effect, nor which of two paths is the link."""
    root = make_folder(tmp_path / "set")
    (root / "train/ant/z").mkdir()
    (root / "train/ant/000.png").rename(root / "train/ant/z/000.png")
    (root / "train/ant/a").symlink_to("z")
    (root / "train/ant/self").symlink_to("self")
    (root / "test/cow").symlink_to(root / "train/ant/z/..", target_is_directory=True)
    (root / "train/cow").symlink_to(tmp_path / "elsewhere")
    (root / "test/ant").rename(tmp_path / "elsewhere")
    (root / "test/ant").symlink_to(root / "train/bee")
    found = [str(path.relative_to(root)) for path in images_below(root, Counter())]
    ant = [*(f"00{i}.png" for i in range(1, 6)), "a/000.png", "z/000.png"]
    bee = [f"00{i}.png" for i in range(6)]
    expected = {"test/ant": bee, "test/bee": bee[:2], "test/cow": ant, "train/ant": ant}
    expected |= {"train/bee": bee, "train/cow": bee[:2]}
    assert found == [f"{folder}/{name}" for folder, names in expected.items() for name in names]
    dataset = load_dataset("folder", root, log=None)
    assert list(np.bincount(dataset.train_labels)) == [7, 6, 2] and list(np.bincount(dataset.test_labels)) == [6, 2, 7]


@pytest.mark.parametrize("folders", [3, 12])
def test_folders_that_link_to_one_another_end(tmp_path, folders):
    paths = [tmp_path / f"folder-{i}" for i in range(folders)]
    for path in paths:
        path.mkdir()
        (path / "x.png").touch()
        for other in paths:
            (path / f"to-{other.name}").symlink_to(other)
    ignored = Counter()
    if folders == 3:  # each of the 15 ways to a folder without passing one twice
        assert len(list(images_below(tmp_path, ignored))) == 15
        assert ignored == {"link to a parent folder": 3 + 6 * 2 + 6 * 3}
    else:
        with refusal("links lead to this folder in over 100 ways"):
            list(images_below(tmp_path, ignored))


def test_hidden_folders_and_pipes_are_ignored(tmp_path):
    root = make_folder(tmp_path / "set")
    (root / "train/ant/.trash").mkdir()
    shutil.copy(root / "train/bee/000.png", root / "train/ant/.trash/000.png")
    os.mkfifo(root / "train/ant/pipe.png")
    lines = []
    assert len(load_dataset("folder", root, log=lines.append).train_images) == 12
    assert lines[0].endswith("that are not images of a class: 1 .png, 1 hidden")


def test_broken_link_to_an_image_is_named(tmp_path):
    root = make_folder(tmp_path / "set")
    (root / "train/ant/x.png").symlink_to(tmp_path / "none.png")
    with refusal("train/ant/x.png: No such file"):
        load_dataset("folder", root, log=None)


def test_ignored_files_are_counted_in_one_line(tmp_path):
    root = make_folder(tmp_path / "set")
    for name in (
        "train/ant/labels.txt",
        "train/ant/sub/notes.txt",
        "train/ant/.hidden.png",
        "test/stray.png",
        "train/bee/README",
    ):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    lines = []
    assert len(load_dataset("folder", root, log=lines.append).train_images) == 12
    (line,) = [line for line in lines if line.startswith("ignored 5 files")]
    assert line.endswith(": 1 .png, 2 .txt, 1 hidden, 1 without a suffix")


def test_transparent_pixels_are_white(tmp_path):
    root = make_folder(tmp_path / "set")
    pixels = np.full((32, 32, 4), [200, 100, 0, 255], np.uint8)
    pixels[:16, :, 3] = 0  # their hidden color must not show
    pixels[16:24, :, 3] = 51
    Image.fromarray(pixels).save(root / "train/ant/000.png")
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(root / "train/ant/001.png", transparency=1)
    images = load_dataset("folder", root, log=None).train_images
    assert (images[0, :16] == 255).all() and (images[0, 24:] == [200, 100, 0]).all()
    assert (np.abs(images[0, 16:24].astype(int) - [244, 224, 204]) <= 1).all()
    assert (images[1] == 255).all()


def test_file_with_several_images_is_refused(tmp_path):
    root = make_folder(tmp_path / "set")
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    frames[0].save(root / "train/ant/x.gif", save_all=True, append_images=frames[1:])
    with refusal("x.gif: holds 2 images"):
        load_dataset("folder", root, log=None)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1"])
def test_image_modes_are_converted_to_rgb(tmp_path, mode):
    root = make_folder(tmp_path / "set")
    file = root / "train/ant/000.png"
    expected = Image.open(file).convert(mode)
    expected.save(file)
    assert np.array_equal(load_dataset("folder", root, log=None).train_images[0], np.asarray(expected.convert("RGB")))


def test_cache_is_read_until_the_folder_changes(tmp_path):
    root = make_folder(tmp_path / "set")
    lines = []
    first = load_dataset("folder", root, log=lines.append)
    assert load_dataset("folder", root, log=lines.append).digest == first.digest
    assert [line.split()[1] for line in lines if line.startswith("decoding ")] == ["16"]

    shutil.copy(root / "train/bee/000.png", root / "train/ant/000.png")
    assert np.array_equal(load_dataset("folder", root, log=lines.append).train_images[0], first.train_images[6])
    (root / "train/bee/005.png").unlink()
    assert len(load_dataset("folder", root, log=lines.append).train_images) == 11
    cache = tmp_path / "set.cifar_fast.npz"
    cache.write_bytes(cache.read_bytes()[:1000])
    assert len(load_dataset("folder", root, log=lines.append).train_images) == 11
    assert [line.split()[1] for line in lines if line.startswith("decoding ")] == ["16", "16", "15", "15"]
    assert sorted(os.listdir(tmp_path)) == ["set", "set.cifar_fast.npz"]


def test_cache_is_not_used_for_other_images_of_equal_size_and_time(tmp_path):
    """Copies may keep times, and sizes of images may be equal by chance, as those of BMP always are."""
    root = make_folder(tmp_path / "set", suffix="bmp")
    first = load_dataset("folder", root, log=None)
    one, other = root / "train/ant/000.bmp", root / "train/bee/000.bmp"
    for file in (one, other):
        os.utime(file, ns=(10**18, 10**18))
    load_dataset("folder", root, log=None)
    one.rename(root / "x")
    other.rename(one)
    (root / "x").rename(other)
    swapped = load_dataset("folder", root, log=None)
    assert np.array_equal(swapped.train_images[0], first.train_images[6])
    assert np.array_equal(swapped.train_images[6], first.train_images[0])


def test_cache_is_used_for_the_same_images_under_other_names(tmp_path):
    root = make_folder(tmp_path / "set")
    load_dataset("folder", root, log=None)
    (root / "train/ant/000.png").rename(root / "train/ant/0000.png")
    os.utime(root / "train/ant/001.png", ns=(10**18, 10**18))
    lines = []
    load_dataset("folder", root, log=lines.append)
    assert not lines


def load_in_a_pool(root):
    return load_dataset("folder", root, log=None).digest


@pytest.mark.nightly  # thousands of files
def test_large_folder_loads_in_a_pool_worker_and_from_standard_input(tmp_path):
    """No further process can start there, or it would run the script again."""
    root = tmp_path / "set"
    for split, n in (("train", 5100), ("test", 10)):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), "red" if name == "ant" else "blue").save(root / split / name / "0.png")
            for i in range(1, n):
                os.link(root / split / name / "0.png", root / split / name / f"{i}.png")
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # its workers are daemons
        digest = pool.apply(load_in_a_pool, (root,))
    for arguments, script in ((["-"], None), (["unguarded.py"], tmp_path / "unguarded.py")):
        (tmp_path / "set.cifar_fast.npz").unlink()
        code = f"from cifar_fast import load_dataset; print(load_dataset('folder', {str(root)!r}, log=None).digest)"
        if script:
            script.write_text(code)
        env = os.environ | {"PYTHONPATH": os.getcwd()}
        done = subprocess.run(
            [sys.executable, *arguments], input=code, capture_output=True, text=True, cwd=tmp_path, env=env
        )
        assert (done.stdout, done.stderr) == (f"{digest}\n", "")


def test_folder_loads_if_its_cache_cannot_be_written(tmp_path, capsys):
    root = make_folder(tmp_path / "set")
    (tmp_path / "set.cifar_fast.npz").mkdir()
    assert len(load_dataset("folder", root).train_images) == 12
    assert "could not cache the decoded images" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["set", "set.cifar_fast.npz"]


def truncated(root):
    file = root / "train/bee/001.png"
    file.write_bytes(file.read_bytes()[:-900])


def too_large(root):
    Image.new("RGB", (33, 32)).save(root / "train/bee/001.png")


def sixteen_bits(root):
    Image.new("I;16", (32, 32)).save(root / "train/bee/001.png")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (truncated, ["train/bee/001.png", "not a whole image"]),
        (too_large, ["train/bee/001.png", "33 x 32 pixels"]),
        (sixteen_bits, ["train/bee/001.png", "8 bits per channel"]),
        (lambda root: [file.unlink() for file in (root / "train/bee").iterdir()], ["train/bee: an empty class"]),
        (lambda root: (root / "test/cow").mkdir(), ["test/cow: an empty class"]),
        (lambda root: shutil.copytree(root / "test/bee", root / "test/cow"), ["test/cow", "has no such class"]),
        (lambda root: shutil.rmtree(root / "test"), ["set: has no split test or val", "with test_fraction"]),
        (lambda root: [shutil.rmtree(path) for path in (root / "train").iterdir()], ["train: no class folders"]),
        (lambda root: shutil.rmtree(root), ["set/train: No such file"]),
        (lambda root: [shutil.rmtree(root / split / "ant") for split in ("train", "test")], [r"1 class\(es\)"]),
    ],
)
def test_wrong_folder_is_refused(tmp_path, harm, words):
    root = make_folder(tmp_path / "set")
    harm(root)
    with refusal(*words):
        load_dataset("folder", root, log=None)


def test_missing_cifar10_without_network_says_what_to_do(cifar10, tmp_path):
    with refusal(
        "CIFAR10 is not in .*elsewhere", "try dataset synthetic", "put cifar-10-python.tar.gz .* into .*elsewhere"
    ):
        load_dataset("cifar10", tmp_path / "elsewhere", log=None)
    assert not (tmp_path / "elsewhere").exists()


def test_truncated_archive_is_named(cifar10):
    archive = cifar10 / "cifar-10-python.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-100])
    with refusal("cifar-10-python.tar.gz is corrupt or truncated", "try dataset synthetic"):
        load_dataset("cifar10", cifar10, log=None)


def test_unwritable_data_dir_is_named(cifar10, tmp_path):
    (tmp_path / "file").touch()
    with refusal("file", "data_dir must be a writable directory"):
        load_dataset("cifar10", tmp_path / "file" / "data", log=None)


@pytest.mark.nightly
def test_all_real_images_load(shared, tmp_path):
    with tarfile.open(shared("data/cifar10-jpeg.tar.xz")) as archive:
        archive.extractall(tmp_path / "set", filter="data")
    dataset = load_dataset("folder", tmp_path / "set", log=None)
    assert dataset.class_names[:3] == ("airplane", "automobile", "bird")
    assert set(np.bincount(dataset.train_labels)) == {5000}
    assert set(np.bincount(dataset.test_labels)) == {1000}
    assert np.array_equal(
        dataset.train_images[5000], np.asarray(Image.open(tmp_path / "set/train/automobile/0000.jpg"))
    )
