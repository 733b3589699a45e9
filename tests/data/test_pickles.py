"""Pickles of CIFAR are read without running what they name."""

import builtins
import os
import pickle
import struct

import numpy as np
import pytest

from cifar_fast import InputError, load_dataset
from cifar_fast.data.pickles import read_pickle
from tests.helpers import KINDS

IMAGES = np.random.RandomState(0).randint(0, 256, (3, 3072), np.uint8)


class Call:
    """Calls ``function`` with ``arguments`` if it is unpickled."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_plain_values_and_arrays_of_bytes_are_read(protocol):
    value = {"data": IMAGES, "turned": IMAGES.T, "labels": [0, 300, 70_000, -1], "more": {"a": ("é", None, 0.5, True)}}
    found = read_pickle(pickle.dumps(value, protocol))
    assert np.array_equal(found.pop("data"), IMAGES) and np.array_equal(found.pop("turned"), IMAGES.T)
    assert found == {name: value[name] for name in ("labels", "more")}


def test_pickles_of_python_2_are_read_as_published():
    """The bytes are those that Python 2 and numpy of 2009 wrote."""
    image = bytes(range(256)) * 12
    data = (
        b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x04testq\x03U\x06labelsq\x04]q\x05(K\x06K\tM\x2c\x01eU\x04dataq\x06"
        b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\t(K\x01K\x01M\x00\x0c\x86"
        b"cnumpy\ndtype\nq\nU\x02u1K\x00K\x01\x87Rq\x0b(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"T" + struct.pack("<i", len(image)) + image + b"tbu."
    )
    assert pickle.loads(data, encoding="latin1")["data"].tobytes() == image
    found = read_pickle(data)
    assert found["data"].shape == (1, 3072) and found["data"].tobytes() == image
    assert found["labels"] == [6, 9, 300] and found["batch_label"] == "test"


@pytest.mark.parametrize(
    "value",
    [
        {"data": Call(os.mkdir, "made")},
        {"data": Call(builtins.eval, "__import__('os').mkdir('made')")},
        {"data": Call(np.dtype, "f8")},
        {"data": np.array([Call(os.mkdir, "made")], dtype=object)},
        {"data": IMAGES.astype(float)},
        {(1, 2): 3},
        {"data": {1, 2}},
    ],
)
def test_a_pickle_with_anything_else_is_refused_and_runs_nothing(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    for protocol in (0, 2, 4):
        with pytest.raises(ValueError, match=r"allowed|a key is no text|not of bytes"):
            read_pickle(pickle.dumps(value, protocol))
    assert not list(tmp_path.iterdir())


def test_an_archive_with_the_right_sums_still_runs_nothing(cifar10, monkeypatch):
    """A damaged list of sums, or one that somebody replaced, is no way to run code."""
    kind = KINDS["cifar10"]
    load_dataset("cifar10", cifar10, log=None)
    monkeypatch.setattr("torchvision.datasets.utils.check_integrity", lambda path, md5=None: True)
    file = cifar10 / kind.base_folder / "data_batch_2"
    file.write_bytes(pickle.dumps({"data": Call(os.mkdir, str(cifar10 / "made")), "labels": [0]}))
    with pytest.raises(InputError, match=r"data_batch_2: is no file of CIFAR \(it names posix mkdir, which is not"):
        load_dataset("cifar10", cifar10, log=None)
    file.write_bytes(pickle.dumps({"data": IMAGES[:, :-1], "labels": [0]}))
    with pytest.raises(InputError, match=r"data_batch_2: is no file of CIFAR \(no images of 3072 bytes\)"):
        load_dataset("cifar10", cifar10, log=None)
    assert not (cifar10 / "made").exists()
