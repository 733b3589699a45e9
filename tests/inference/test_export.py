"""Exported files are loaded back by the programs that they are for, and give the logits of the trained network."""

import dataclasses
import json
import shutil
import struct
import sys

import numpy as np
import pytest
import torch
from torch import nn

from cifar_fast import Dataset, InputError, Recipe, export_model, fit, load_model
from cifar_fast.cli.main import main
from cifar_fast.data.synthetic import PATTERNS, textures
from tests.helpers import HOW, SHARED

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_curves")]  # whole trainings

SMALL = dict(widths=(4, 8), batch_size=16, epochs=1)
RECIPES = {"cnn": Recipe(**SMALL), "whitened": dataclasses.replace(Recipe.load("airbench94"), **SMALL)}
CASES = [(network, dtype) for network in RECIPES for dtype in ("float32", "bfloat16")]
TEXTURES, LABELS = textures(48, seed=0)
DATASET = Dataset("textures", "textures", TEXTURES, LABELS, TEXTURES[:16], LABELS[:16], tuple(PATTERNS))
PHOTOS = SHARED / "data/cifar10-mini.npz"
IMAGES = np.load(PHOTOS)["test_images"][:48] if PHOTOS.exists() else TEXTURES


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a function that gives the folder of a training of a network in a dtype."""
    root = tmp_path_factory.mktemp("runs")

    def folder(network="cnn", dtype="float32"):
        path = root / f"{network}-{dtype}"
        if not path.exists():
            fit(RECIPES[network], DATASET, output=path, **HOW | dict(dtype=dtype))
        return path

    return folder


def export(folder, file, *flags):
    assert main(["export", str(folder), "--output", str(file), *flags]) == 0
    return file


def refused(capfd, *arguments):
    """Return the one line on standard error."""
    capfd.readouterr()
    assert main(["export", *map(str, arguments)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    return line


def logits_of(path, images=IMAGES):
    with torch.no_grad():
        return load_model(path)(torch.from_numpy(images))


def largest_error(logits, expected):
    """Return the largest difference, relative to the largest logit."""
    return np.abs(np.asarray(logits) - expected.numpy()).max() / expected.abs().max().item()


@pytest.mark.parametrize(("network", "dtype"), CASES)
def test_safetensors_has_the_bits_of_model_pt(network, dtype, trained, tmp_path):
    pytest.importorskip("safetensors")
    folder = trained(network, dtype)
    file = export(folder, tmp_path / "model.safetensors")
    expected = load_model(folder)
    for path in (file, tmp_path):  # the file by its name, and a folder without model.pt
        model = load_model(path)
        assert torch.equal(logits_of(path), logits_of(folder)) and not model.training
        assert (model.recipe, model.class_names) == (expected.recipe, expected.class_names)
    assert export(file, tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_header_of_safetensors_names_the_weights_and_describes_the_model(trained, tmp_path):
    pytest.importorskip("safetensors")
    data = export(trained(), tmp_path / "weights.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])  # the format: the length of the header, the header in JSON, the weights
    header = json.loads(data[8 : 8 + length])
    about = json.loads(header.pop("__metadata__")["cifar_fast"])
    saved = torch.load(trained() / "model.pt", weights_only=True)
    shapes = {name: list(tensor.shape) for name, tensor in saved["state_dict"].items()}
    assert {name: tensor["shape"] for name, tensor in header.items()} == shapes
    assert about["recipe"]["widths"] == [4, 8] and about["class_names"] == list(PATTERNS) and about["version"]
    assert (about["mean"], about["std"]) == (pytest.approx(saved["mean"]), pytest.approx(saved["std"]))


def test_predict_reads_safetensors(trained, tmp_path, capfd):
    pytest.importorskip("safetensors")
    file = export(trained(), tmp_path / "other.safetensors")
    np.save(tmp_path / "images.npy", IMAGES[:5])
    shown = []
    for model in (trained(), file):
        capfd.readouterr()
        assert main(["predict", str(model), str(tmp_path / "images.npy")]) == 0
        shown.append(capfd.readouterr().out)
    assert shown[0] == shown[1] and len(shown[0].splitlines()) == 5


def test_one_changed_bit_of_safetensors_is_refused(trained, tmp_path):
    """The bit is in a weight, or in the deviation of the images."""
    pytest.importorskip("safetensors")
    data = export(trained(), tmp_path / "model.safetensors").read_bytes()
    for place in (len(data) - 1, data.index(rb"\"std\"") + 10):
        changed = bytearray(data)
        changed[place] ^= 1
        (tmp_path / "changed.safetensors").write_bytes(changed)
        with pytest.raises(InputError, match="has changed since it was written"):
            load_model(tmp_path / "changed.safetensors")


def test_other_and_damaged_safetensors_are_refused_in_one_line(trained, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    data = export(trained(), tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[:-7])
    safetensors.save_file({"weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    for name, words in {
        "cut": "damaged, or not written by safetensors",
        "foreign": "has no recipe beside the weights",
        "absent": "cannot be read",
    }.items():
        with pytest.raises(InputError, match=words) as caught:
            load_model(tmp_path / f"{name}.safetensors")
        assert len(str(caught.value).splitlines()) == 1


class Tied(nn.Module):
    """A custom model with a weight of two names, and one that is not contiguous."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(48, 48, bias=False)
        self.second = nn.Linear(48, 48, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Parameter(torch.randn(10, 48).T / 7)

    def forward(self, images):
        x = nn.functional.avg_pool2d(images, 8).flatten(1)
        return self.second(self.first(x)) @ self.head


def test_custom_model_with_tied_weights_is_restored_from_safetensors(tmp_path):
    pytest.importorskip("safetensors")
    fit(RECIPES["cnn"], DATASET, model=Tied, output=tmp_path / "run", **HOW)
    classifier = load_model(tmp_path / "run", Tied())
    export_model(classifier.train(), tmp_path / "tied.safetensors")
    assert classifier.training, "the caller's model stays as it is"
    again = load_model(tmp_path / "tied.safetensors", Tied())
    images = torch.from_numpy(IMAGES)
    assert torch.equal(again.predict(images), classifier.predict(images))
    with pytest.raises(InputError, match="holds the weights of the custom model Tied"):
        load_model(tmp_path / "tied.safetensors")


@pytest.mark.nightly  # torch.export takes seconds
@pytest.mark.parametrize(("network", "dtype"), CASES)
def test_program_of_torch_export_gives_the_logits(network, dtype, trained, tmp_path):
    file = export(trained(network, dtype), tmp_path / "model.pt2")
    about = {"cifar_fast.json": ""}
    program = torch.export.load(file, extra_files=about).module()
    for n in (1, 2, 48):
        with torch.no_grad():
            assert (
                largest_error(program(torch.from_numpy(IMAGES[:n])), logits_of(trained(network, dtype), IMAGES[:n]))
                < 1e-6
            )
    assert json.loads(about["cifar_fast.json"])["class_names"] == list(PATTERNS)


@pytest.mark.nightly  # torch.export takes seconds
@pytest.mark.parametrize(("network", "dtype"), CASES)
def test_onnx_gives_the_logits(network, dtype, trained, tmp_path, capfd):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    capfd.readouterr()
    file = export(trained(network, dtype), tmp_path / "model.onnx")
    assert len(capfd.readouterr().out.splitlines()) == 1, "torch's exporter prints nothing"
    session = runtime.InferenceSession(file)
    for n in (1, 2, 48):
        (logits,) = session.run(["logits"], {"images": IMAGES[:n]})
        assert largest_error(logits, logits_of(trained(network, dtype), IMAGES[:n])) < 5e-6
    about = json.loads(session.get_modelmeta().custom_metadata_map["cifar_fast"])
    assert about["class_names"] == list(PATTERNS)


@pytest.mark.parametrize(
    ("suffix", "package", "remedy"),
    [("safetensors", "safetensors", "safetensors"), ("onnx", "onnx", "onnx onnxscript")],
)
def test_missing_package_is_named_with_the_command_of_pip(
    suffix, package, remedy, trained, tmp_path, capfd, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.torch", None)
    line = refused(capfd, trained(), "--output", tmp_path / f"model.{suffix}")
    assert line.startswith("error: --to ") and line.endswith(f": pip install {remedy}")
    assert not list(tmp_path.iterdir())
    if suffix == "safetensors":
        (tmp_path / "model.safetensors").touch()
        with pytest.raises(InputError, match="reading it needs safetensors: pip install safetensors"):
            load_model(tmp_path)


def test_output_that_is_not_of_the_format_is_refused(trained, tmp_path, capfd):
    """So ``model.pt`` is never replaced."""
    before = (trained() / "model.pt").read_bytes()
    words = {
        (trained() / "model.pt",): "must end in .safetensors, .pt2 or .onnx",
        (trained() / "model.pt", "--to", "onnx"): "must end in .onnx for --to onnx",
        (tmp_path / "absent/model.onnx",): "must name a file in an existing folder",
        (tmp_path / "model.onnx", "--to", "tflite"): "invalid choice",
    }
    for arguments, expected in words.items():
        assert expected in refused(capfd, trained(), "--output", *arguments)
    assert (trained() / "model.pt").read_bytes() == before and not list(tmp_path.iterdir())


class CannotBeTraced(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(10))

    def forward(self, images):
        return images.mean((1, 2, 3), keepdim=True).flatten(1) * self.weight * (2 if images.sum() > 0 else 1)


@pytest.mark.slow  # torch.export takes seconds
def test_model_that_cannot_be_traced_is_refused_and_the_earlier_file_stays(tmp_path):
    fit(RECIPES["cnn"], DATASET, model=CannotBeTraced, output=tmp_path / "run", **HOW)
    (tmp_path / "model.pt2").write_text("earlier")
    with pytest.raises(InputError, match=r"cannot be written as torch-export .*; write safetensors") as caught:
        export_model(load_model(tmp_path / "run", CannotBeTraced()), tmp_path / "model.pt2")
    assert len(str(caught.value).splitlines()) == 1
    assert (tmp_path / "model.pt2").read_text() == "earlier" and len(list(tmp_path.iterdir())) == 2


def test_overwritten_training_leaves_no_earlier_safetensors(trained, tmp_path):
    """Otherwise a folder without ``model.pt`` would give the weights of the earlier training."""
    folder = shutil.copytree(trained(), tmp_path / "run")
    (folder / "model.safetensors").touch()
    fit(RECIPES["cnn"], DATASET, output=folder, overwrite=True, **HOW)
    assert (folder / "model.pt").exists() and not (folder / "model.safetensors").exists()
