"""``cifar-fast predict``, ``load_model``, and the logits that a training saves."""

import dataclasses
import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from cifar_fast import CNN, InputError, Recipe, fit, load_dataset, load_model
from cifar_fast.cli.main import main
from cifar_fast.training.run_folder import RunReader
from cifar_fast.utils.progress import lines_to
from tests.helpers import DEVICE, HOW, NARROW, save_npz, small_dataset, stop_after

pytestmark = pytest.mark.usefixtures("no_curves")

NAMES = ("cat", "dog", "truck")
WIDTHS = (4, 8, 8, 16)
RECIPE = Recipe(epochs=2, batch_size=16, widths=WIDTHS)
FLAGS = "--widths 4 8 8 16 --epochs 2 --batch-size 16 --device cpu --dtype float32 --backend eager"


@pytest.fixture(scope="module")
def dataset():
    """A data set with some wrong test labels, so that no accuracy is 100 %."""
    dataset = small_dataset(train=64, test=40)
    dataset.test_labels[:10] = (dataset.test_labels[:10] + 1) % 3
    return dataset


@pytest.fixture(scope="module")
def npz(tmp_path_factory, dataset):
    """The data set as a file, with the names of the classes beside its four arrays."""
    return save_npz(tmp_path_factory.mktemp("data") / "small.npz", dataset, class_names=np.array(NAMES))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, npz):
    """The folder of a training that the command ran."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    assert main(f"train --dataset npz --data-dir {npz} --output {folder} --seed 3 {FLAGS}".split()) == 0
    return folder


@pytest.fixture(scope="module")
def original_images(tmp_path_factory, dataset):
    """The test images as files, ``test/CLASS/NUMBER.png``."""
    root = tmp_path_factory.mktemp("images")
    for number, (pixels, label) in enumerate(zip(dataset.test_images, dataset.test_labels)):
        path = root / "test" / NAMES[label] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return root


def plain_logits(folder, images):
    """Return logits computed from model.pt as docs/outputs.md describes."""
    saved = torch.load(folder / "model.pt", weights_only=True)
    model = CNN(Recipe(**saved["recipe"]), len(saved["class_names"]))
    model.load_state_dict(saved["state_dict"])
    model.eval()
    mean, std = (torch.tensor(saved[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        return model((torch.tensor(images).permute(0, 3, 1, 2) - mean) / std)


def predict(capfd, *arguments, code=0):
    """Return the lines on standard output and on standard error."""
    capfd.readouterr()
    assert main(["predict", *map(str, arguments)]) == code
    shown = capfd.readouterr()
    return shown.out.splitlines(), shown.err.splitlines()


def write_image(path, size=(32, 32), **how):
    Image.new("RGB", size, (200, 30, 30)).save(path, **how)
    return path


def test_command_prints_a_line_per_image_and_the_accuracy(trained, original_images, dataset, capfd):
    lines, errors = predict(capfd, trained, original_images)
    probabilities = plain_logits(trained, dataset.test_images).softmax(1)
    predicted = probabilities.argmax(1)
    files = sorted(original_images.rglob("*.png"))
    assert len(lines) == len(files) + 1 == 41 and not errors
    for line, file in zip(lines, files):
        number = int(file.stem)
        assert line.startswith(f"{file}  {NAMES[predicted[number]]} ") and line.endswith(" %")
        assert float(line.split()[-2]) == pytest.approx(100 * probabilities[number].max().item(), abs=0.01)
    correct = 100 * (predicted.numpy() == dataset.test_labels).mean()
    assert lines[-1] == f"accuracy {correct:.2f} % of 40 images with a known class"


def test_accuracy_on_the_test_images_equals_the_training_summary(trained, npz, capfd):
    """The images come from a .npz file, the model from model.pt instead of its folder."""
    lines, _ = predict(capfd, trained / "model.pt", npz, "--batch-size", 7)
    assert lines[0].startswith(f"{npz}[0]  ") and len(lines) == 41
    accuracy = json.loads((trained / "summary.json").read_text())["test_accuracy_mean"]
    assert 0 < accuracy < 100
    assert lines[-1] == f"accuracy {accuracy:.2f} % of 40 images with a known class"


def test_no_accuracy_is_printed_if_no_class_is_known(tmp_path, trained, dataset, capfd):
    np.savez(tmp_path / "plain.npz", images=dataset.test_images[:3])
    (tmp_path / "holidays").mkdir()
    write_image(tmp_path / "holidays/a.png")
    lines, _ = predict(capfd, trained, tmp_path / "plain.npz", tmp_path / "holidays", tmp_path / "holidays/a.png")
    assert [line.split("  ")[0] for line in lines] == [
        *(f"{tmp_path}/plain.npz[{i}]" for i in range(3)),
        *[f"{tmp_path}/holidays/a.png"] * 2,
    ]


def test_pipes_are_refused_and_not_waited_for(tmp_path, trained, original_images, capfd):
    for name in ("model.pt", "x.npz", "x.png", "x_data.npy", "x.mat"):
        os.mkfifo(tmp_path / name)
    _, errors = predict(capfd, tmp_path / "model.pt", original_images, code=2)
    assert re.search(r"model\.pt: cannot be read \(it is a pipe or a device, not a file\)", errors[0])
    for name in ("x.npz", "x.png", "x_data.npy", "x.mat"):
        _, errors = predict(capfd, trained, tmp_path / name, code=2)
        assert errors[0].startswith(f"error: {tmp_path}/{name}: no such file; give image files")
    npz, labels = save_npz(tmp_path / "d.npz", small_dataset()), tmp_path / "x_data.npy"
    with pytest.raises(InputError, match="it is a pipe or a device"):
        load_dataset("npz", npz, train_labels=labels, log=None)


def test_names_of_files_and_classes_cannot_steer_the_terminal(tmp_path, trained, dataset, capfd):
    escape = "\x1b]0;title\x07\x1b[2J\n\x9b\u202e"
    saved = torch.load(trained / "model.pt", weights_only=True) | {"class_names": [f"{k}{escape}" for k in range(3)]}
    torch.save(saved, tmp_path / "model.pt")
    (tmp_path / f"{escape}.png").write_bytes(b"no image")
    np.savez(tmp_path / f"{escape}.npz", images=dataset.test_images[:1])
    capfd.readouterr()
    assert main(["predict", str(tmp_path / "model.pt"), *map(str, tmp_path.glob("*.[pn][np][gz]"))]) == 1
    shown = capfd.readouterr()
    text = shown.out + shown.err
    assert text.count("\n") == 2 and "\\x1b]0;title\\x07\\x1b[2J\\n\\x9b\\u202e" in text
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)


@pytest.mark.parametrize("flags", [[], ["--flip-average"]])
def test_json_holds_the_same_predictions_as_the_lines(tmp_path, trained, original_images, dataset, capfd, flags):
    lines, _ = predict(capfd, trained, original_images, "--json", tmp_path / "out.json", "--top", 2, *flags)
    report = json.loads((tmp_path / "out.json").read_text())
    logits = plain_logits(trained, dataset.test_images)
    if flags:
        logits = (logits + plain_logits(trained, dataset.test_images[:, :, ::-1].copy())) / 2
    expected = logits.softmax(1).topk(2)
    for line, image in zip(lines, report["images"]):
        number = int(image["path"][-7:-4])
        assert image["classes"] == [NAMES[i] for i in expected.indices[number]]
        assert image["probabilities"] == pytest.approx(expected.values[number].tolist(), abs=1e-5)
        classes = (f"{name} {100 * p:.2f} %" for name, p in zip(image["classes"], image["probabilities"]))
        assert line == "  ".join([image["path"], *classes])
        label = NAMES[dataset.test_labels[number]]
        assert (image["label"], image["index"], image["resized"]) == (label, None, False)
    assert (report["class_names"], report["flip_average"], report["unreadable"]) == ([*NAMES], bool(flags), [])
    assert f"accuracy {report['accuracy']:.2f} %" in lines[-1]
    assert ("--flip-average: each image was averaged with its mirror" in lines) == bool(flags)


def test_other_image_sizes_are_rotated_upright_and_cropped_to_the_central_square(tmp_path, trained, capfd):
    """The file is like a camera's in portrait mode: pixels in landscape, and an EXIF tag with the rotation."""
    random = np.random.RandomState(0)
    square = Image.fromarray(random.randint(0, 255, (64, 64, 3)).astype(np.uint8))
    square.resize((32, 32), Image.Resampling.BICUBIC).save(tmp_path / "small.png")
    upright = Image.new("RGB", (64, 100))
    upright.paste(square, (0, 18))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise for display
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.png", exif=exif)
    arguments = trained, tmp_path / "photo.png", tmp_path / "small.png", "--json", tmp_path / "out.json"
    lines, _ = predict(capfd, *arguments)
    photo, small = json.loads((tmp_path / "out.json").read_text())["images"]
    assert photo["probabilities"] == pytest.approx(small["probabilities"], abs=5e-4)
    assert (photo["resized"], small["resized"]) == (True, False)
    assert lines[2:] == [
        "resized 1 of 2 images to 32 x 32: rotated upright, cropped to the largest central square, bicubic with "
        "antialiasing"
    ]


def test_unreadable_images_get_an_error_line_each_and_the_others_a_prediction(tmp_path, trained, capfd):
    whole = write_image(tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.png").write_bytes(b"hello")
    Image.new("I;16", (32, 32)).save(tmp_path / "d.png")
    write_image(tmp_path / "e.png")
    lines, errors = predict(capfd, trained, tmp_path, "--json", tmp_path / "out.json", code=1)
    assert [line.split("  ")[0] for line in lines] == [f"{tmp_path}/a.png", f"{tmp_path}/e.png"]
    for name, words, error in zip("bcd", ("not a whole", "not a whole", "must have 8 bits"), errors, strict=True):
        assert error.startswith(f"error: {tmp_path}/{name}.png: ") and words in error
    unreadable = json.loads((tmp_path / "out.json").read_text())["unreadable"]
    assert [f"error: {image['error']}" for image in unreadable] == errors


def test_other_files_in_a_folder_are_counted(tmp_path, trained, capfd):
    write_image(tmp_path / "a.png")
    (tmp_path / "notes.txt").touch()
    lines, _ = predict(capfd, trained, tmp_path)
    assert lines[0] == f"ignored 1 files under {tmp_path} that are not images: 1 .txt" and len(lines) == 2


def test_linked_folders_are_followed_and_loops_counted(tmp_path, trained, capfd):
    for name in ("cat", "truck"):
        (tmp_path / "set" / name).mkdir(parents=True)
    write_image(tmp_path / "set/truck/a.png")
    write_image(tmp_path / "set/cat/b.png")
    (tmp_path / "set/dog").symlink_to("truck")
    (tmp_path / "set/all").symlink_to(".")
    lines, _ = predict(capfd, trained, tmp_path / "set", "--json", tmp_path / "out.json")
    images = json.loads((tmp_path / "out.json").read_text())["images"]
    assert [(image["path"].removeprefix(f"{tmp_path}/set/"), image["label"]) for image in images] == [
        ("cat/b.png", "cat"),
        ("dog/a.png", "dog"),
        ("truck/a.png", "truck"),
    ]
    assert lines[0].endswith("that are not images: 1 link to a parent folder")


@pytest.mark.parametrize("form", ["npy", "data and labels", "one labels.npy", "single image", "gray", "mat"])
def test_files_of_arrays_are_classified(tmp_path, trained, dataset, capfd, form):
    """Each form is one that is published, or that numpy writes for a person's own images."""
    images, labels = dataset.test_images, dataset.test_labels
    path, expected, count, resized = tmp_path / "x_data.npy", None, 40, False
    if form == "single image":
        np.save(path, images[7])
        images, count = images[7:8], 1
    elif form == "gray":
        images, resized = images[..., 0].repeat(2, 1).repeat(2, 2), True
        np.save(path, images)
    elif form == "mat":
        path = tmp_path / "test_32x32.mat"
        savemat(path, {"X": np.moveaxis(images, 0, -1), "y": np.where(labels == 0, 10, labels)[:, None]})
    else:
        np.save(path, images)
        if form != "npy":
            np.save(tmp_path / ("labels.npy" if form == "one labels.npy" else "x_labels.npy"), labels.astype(np.uint8))
    if form in ("data and labels", "one labels.npy", "mat"):
        expected = 100 * (plain_logits(trained, images).argmax(1).numpy() == labels).mean()
    arguments = trained, path, "--json", tmp_path / "out.json"
    lines, errors = predict(capfd, *arguments)
    assert len([line for line in lines if line.startswith(f"{path}[")]) == count and not errors
    if form != "gray":
        found = [image["probabilities"][0] for image in json.loads((tmp_path / "out.json").read_text())["images"]]
        assert found == pytest.approx(plain_logits(trained, images).softmax(1).amax(1).tolist(), abs=1e-5)
    assert any(line.startswith(f"resized {count} of {count} images") for line in lines) == resized
    assert lines[-1].startswith("accuracy") == (expected is not None)
    if expected is not None:
        assert lines[-1] == f"accuracy {expected:.2f} % of 40 images with a known class"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.npy", b"\x93NUMPY cut", "cannot be read ("),
        ("a.npy", b"", "it is empty"),
        ("a.npz", b"MATLAB 5.0 MAT-file", "it is no .npy or .npz file"),
        ("a.npy", np.array([None]), "it holds pickled Python objects, which could run code; save arrays of numbers"),
        ("a.mat", b"MATLAB 5.0 MAT-file", "not a readable .mat file"),
    ],
)
def test_no_message_advises_to_read_a_file_unsafely(tmp_path, trained, capfd, name, content, words):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        np.save(tmp_path / name, content)
    _, errors = predict(capfd, trained, tmp_path / name, code=2)
    assert len(errors) == 1 and words in errors[0]
    assert not re.search("allow_pickle|trust|unsafe", errors[0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("{trained} none.png", "none.png: no such file"),
        ("{trained} {tmp}/empty", "empty: no image that Pillow reads;"),
        ("{trained} {tmp}/float.npz", "images must be uint8"),
        ("{trained} {tmp}/labels.npz", "labels go up to 3, but the training data has 3 classes"),
        ("{trained} {tmp}/other.npz", "holds pixels; it must hold images"),
        ("{trained} {tmp}/a.png --top 4", "--top must be from 1 to 3"),
        ("{trained} {tmp}/a.png --batch-size 0", "--batch-size must be at least 1"),
        ("{trained} {tmp}/a.png --device cuda:99", "--device cuda:99"),
        ("{trained} {tmp}/a.png --json {tmp}/none/x.json", "--json"),
        ("{trained}", "IMAGES"),
        ("{tmp}/none {tmp}/a.png", "none: cannot be read (No such file or directory)"),
        ("{tmp}/empty {tmp}/a.png", "empty/model.pt: cannot be read"),
        ("{tmp}/a.png {tmp}/a.png", "a.png: damaged, or not written by torch.save"),
        ("{tmp}/weights.pt {tmp}/a.png", "weights.pt: has no recipe beside the weights"),
        ("{tmp}/later.pt {tmp}/a.png", "later.pt: has format 2, not 1"),
        ("{tmp}/lacks.pt {tmp}/a.png", "lacks.pt: holds no network that can be loaded (KeyError: 'std')"),
        ("{tmp}/stopped {tmp}/a.png", "this training is not finished; continue it with --resume"),
    ],
)
def test_bad_input_prints_one_line_and_exits_with_2(tmp_path, trained, capfd, arguments, words):
    for name in ("empty", "stopped"):
        (tmp_path / name).mkdir()
    (tmp_path / "stopped/training.json").touch()
    write_image(tmp_path / "a.png")
    images = np.zeros((4, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "float.npz", images=images / 255)
    np.savez(tmp_path / "labels.npz", images=images, labels=np.arange(4))
    np.savez(tmp_path / "other.npz", pixels=images)
    saved = torch.load(trained / "model.pt", weights_only=True)
    torch.save(saved["state_dict"], tmp_path / "weights.pt")
    torch.save(saved | {"format": 2}, tmp_path / "later.pt")
    torch.save({name: value for name, value in saved.items() if name != "std"}, tmp_path / "lacks.pt")
    lines, errors = predict(capfd, *arguments.format(trained=trained, tmp=tmp_path).split(), code=2)
    assert not lines and len(errors) == 1
    assert errors[0].startswith("error: ") and words in errors[0]


def test_path_that_cannot_be_used_costs_no_other(tmp_path, trained, npz, capfd):
    write_image(tmp_path / "a.png")
    (tmp_path / "cut_off.npz").write_bytes(npz.read_bytes()[:-999])
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "labels.npz", images=np.zeros((4, 32, 32, 3), np.uint8), labels=np.arange(4))
    paths = [tmp_path / name for name in ("cut_off.npz", "a.png", "empty", "labels.npz", "none.png")]
    lines, errors = predict(capfd, trained, *paths, "--json", tmp_path / "out.json", code=1)
    assert [line.split()[0] for line in lines] == [str(tmp_path / "a.png")]
    words = ["cut_off.npz: cannot be read", "empty: no image that", "labels.npz: ", "none.png: no such file"]
    for line, word in zip(errors, words, strict=True):
        assert line.startswith(f"error: {tmp_path}/{word}")
    unreadable = json.loads((tmp_path / "out.json").read_text())["unreadable"]
    assert [(image["path"], f"error: {image['error']}") for image in unreadable] == [
        (str(path), error) for path, error in zip([paths[0], *paths[2:]], errors)
    ]


def test_load_model_restores_everything_and_draws_no_random_numbers(trained, dataset):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    model = load_model(trained)
    assert torch.equal(torch.rand(1), expected)
    assert (model.class_names, model.recipe) == (NAMES, RECIPE) and not model.training
    assert model.mean.tolist() == pytest.approx(dataset.train_images.mean((0, 1, 2)).tolist())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    logits = plain_logits(trained, dataset.test_images)
    assert torch.allclose(model(torch.from_numpy(dataset.test_images)), logits, atol=1e-5)


@pytest.mark.parametrize("how", ["array", "tensor", "reversed view", "read-only"])
def test_predict_accepts_any_memory_layout(trained, dataset, how):
    images = dataset.test_images[:9].copy()
    expected = plain_logits(trained, images).softmax(1)
    if how == "tensor":
        images = torch.from_numpy(images)
    elif how == "reversed view":  # from BGR to RGB, for example
        images = images[..., ::-1].copy()[..., ::-1]
    elif how == "read-only":
        images.flags.writeable = False
    probabilities = load_model(trained).predict(images, batch_size=4)
    assert torch.allclose(probabilities, expected, atol=1e-6) and not probabilities.requires_grad


@pytest.mark.parametrize("images", [np.zeros((2, 32, 32, 3)), np.zeros((2, 3, 32, 32), np.uint8), np.uint8(0)])
def test_predict_refuses_other_dtypes_and_shapes(trained, images):
    with pytest.raises(InputError, match=r"images must be uint8 of shape \(N, 32, 32, 3\), not "):
        load_model(trained).predict(images)


@pytest.mark.gpu
def test_predict_on_a_gpu(trained, dataset, capfd, npz):
    model = load_model(trained).to("cuda")
    probabilities = model.predict(dataset.test_images)
    assert probabilities.device.type == "cuda"
    assert torch.allclose(probabilities.cpu(), plain_logits(trained, dataset.test_images).softmax(1), atol=0.01)
    assert len(predict(capfd, trained, npz, "--device", "cuda")[0]) == 41


@pytest.mark.parametrize("method", ["__call__", "predict"])
@pytest.mark.parametrize(
    "change",
    [
        lambda images: images.float() / 255,
        lambda images: images.float(),
        lambda images: images.permute(0, 3, 1, 2),
        lambda images: images[..., :1],
        lambda images: images[0],
    ],
    ids=["floats of 0 to 1", "floats", "NCHW", "gray", "a single image"],
)
def test_classifier_takes_bytes_only(trained, dataset, method, change):
    model = load_model(trained)
    with pytest.raises(
        InputError, match=r"images must be uint8 of shape \(N, 32, 32, 3\), not .*; the classifier itself"
    ):
        getattr(model, method)(change(torch.tensor(dataset.test_images[:4])))


def test_predict_is_in_eval_mode_and_leaves_each_module_in_its_own(trained, dataset):
    model = load_model(trained)
    expected = model.predict(dataset.test_images)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for change in (model.train, model.model.train, lambda: model.model.seq[2].eval()):
        change()
        modes = [module.training for module in model.modules()]
        assert torch.equal(model.predict(dataset.test_images), expected)
        with pytest.raises(InputError):
            model.predict(dataset.test_images / 255)
        assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_exported_and_traced_classifiers_give_the_same_logits(trained, dataset):
    images = torch.tensor(dataset.test_images[:4])
    model = load_model(trained)
    expected = model(images)
    assert torch.equal(torch.export.export(model, (images,)).module()(images), expected)
    assert torch.allclose(torch.fx.symbolic_trace(model)(images), expected)
    assert torch.allclose(torch.jit.trace(model, images)(images), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.jit.script is deprecated
def test_scripting_is_refused_with_the_ways_that_work(trained):
    model = load_model(trained)
    for given in (model, model.model, torch.nn.Sequential(model, torch.nn.Softmax(1))):
        with pytest.raises(InputError, match=r"use torch.export.export\(model, \(images,\)\) or torch.jit.trace"):
            torch.jit.script(given)


def test_float_images_are_refused_by_every_call(trained, dataset):
    model, images = load_model(trained), torch.tensor(dataset.test_images[:4]) / 255
    for call in (model, model.predict, lambda images: torch.jit.trace(model, images)):
        with pytest.raises(InputError, match="images must be uint8"):
            call(images)


def saved_logits(folder):
    with np.load(folder / "logits.npz") as arrays:
        return dict(arrays)


def test_training_saves_the_logits_of_each_run(tmp_path, npz, dataset):
    flags = f"--dataset npz --data-dir {npz} --output {tmp_path}/out --runs 2 --seed 3 --save-logits"
    assert main(f"train {flags} {FLAGS}".split()) == 0
    saved = saved_logits(tmp_path / "out")
    assert (saved["logits"].shape, saved["logits"].dtype) == ((2, 40, 3), np.float32)
    assert saved["labels"].tolist() == dataset.test_labels.tolist() and saved["seeds"].tolist() == [3, 4]
    last = plain_logits(tmp_path / "out", dataset.test_images)
    assert torch.allclose(torch.from_numpy(saved["logits"][1]), last, atol=1e-5, rtol=1e-4)
    runs = json.loads((tmp_path / "out/summary.json").read_text())["runs"]
    for run, logits in zip(runs, saved["logits"]):
        assert 100 * (logits.argmax(1) == saved["labels"]).mean() == pytest.approx(run["test_accuracy"])
    assert not np.array_equal(*saved["logits"])


@pytest.mark.slow  # whole trainings
def test_resumed_training_saves_the_logits_of_all_runs(tmp_path, npz, monkeypatch):
    """The training is stopped at the end of a run, in the middle of the next one, and at its end."""
    stops = [(0, 2), (1, 1), (1, 2)]
    flags = f"--dataset npz --data-dir {npz} --runs 2 --save-logits {FLAGS}"
    assert main(f"train {flags} --output {tmp_path}/whole".split()) == 0
    command = f"train {flags} --output {tmp_path}/parts"
    with lines_to(stop_after(*stops)):
        for _ in stops:
            assert main(command.split()) == 130
            assert not (tmp_path / "parts/logits.npz").exists()
            command = f"train --resume {tmp_path}/parts"
    assert main(command.split()) == 0
    whole, parts = saved_logits(tmp_path / "whole"), saved_logits(tmp_path / "parts")
    assert all(np.array_equal(whole[name], parts[name]) for name in ("logits", "labels", "seeds"))


def test_added_runs_extend_the_saved_logits(tmp_path, npz):
    flags = f"--dataset npz --data-dir {npz} --save-logits {FLAGS}"
    assert main(f"train {flags} --output {tmp_path}/out".split()) == 0
    first = saved_logits(tmp_path / "out")
    assert main(f"train --resume {tmp_path}/out --runs 2".split()) == 0
    both = saved_logits(tmp_path / "out")
    assert both["seeds"].tolist() == [0, 1] and np.array_equal(both["logits"][:1], first["logits"])


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("eager", "bfloat16"), ("compiled", "float32"), pytest.param("fused", "float32", marks=pytest.mark.slow)],
)
def test_each_backend_returns_the_logits(backend, dtype, uncompiled, few_programs):
    few = small_dataset(train=8, test=4)
    recipe = Recipe(epochs=1, batch_size=4, widths=(4, 8))
    how = dict(backend=backend, device=DEVICE.type, dtype=dtype, log=None)
    result = fit(recipe, few, save_logits=True, **how)
    (logits,) = result.logits
    model = CNN(recipe, 3)
    model.load_state_dict(result.state_dict)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (result.mean, result.std))
    expected = model.eval()((torch.tensor(few.test_images).permute(0, 3, 1, 2) - mean) / std)
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, expected, atol=1e-4)
    assert fit(recipe, few, **how).logits == []


@pytest.mark.parametrize(
    "backend",
    ["eager", pytest.param("compiled", marks=pytest.mark.slow), pytest.param("fused", marks=pytest.mark.nightly)],
)
def test_accuracy_of_a_training_in_bfloat16_is_that_of_predict(tmp_path, backend, uncompiled, few_programs):
    """In bfloat16, two largest logits of an image are often equal."""
    textures = load_dataset("synthetic")
    train = dict(train_images=textures.train_images[:32], train_labels=textures.train_labels[:32])
    test = dict(test_images=textures.test_images[:300], test_labels=textures.test_labels[:300])
    dataset = dataclasses.replace(textures, **train, **test)
    also = save_npz(tmp_path / "also.npz", dataset)
    options = dict(backend=backend, device=DEVICE.type, dtype="bfloat16", log=None, save_logits=True)
    recipe = Recipe(epochs=1, batch_size=8, widths=NARROW)
    result = fit(recipe, dataset, seed=1, output=tmp_path / "out", also_test={"also": also}, **options)
    told = result.runs[0].test_accuracy, result.runs[0].also_test["also"]
    probabilities = load_model(tmp_path / "out").predict(dataset.test_images)
    for predictions in (probabilities.numpy(), result.logits[0].numpy()):
        percent = 100 * (predictions.argmax(1) == dataset.test_labels).mean()
        assert told == (pytest.approx(percent), pytest.approx(percent))


def test_result_of_a_folder_has_the_logits(tmp_path, dataset):
    result = fit(RECIPE, dataset, output=tmp_path / "out", save_logits=True, **HOW)
    (logits,) = RunReader(tmp_path / "out").result().logits
    assert torch.equal(logits, result.logits[0])


def test_saving_logits_cannot_start_when_runs_are_added(tmp_path, dataset):
    fit(RECIPE, dataset, output=tmp_path / "out", **HOW)
    with pytest.raises(InputError, match="save_logits was False, not True"):
        fit(RECIPE, dataset, resume=tmp_path / "out", runs=2, save_logits=True, **HOW)


def test_logits_that_cannot_be_written_stay_in_the_checkpoint(tmp_path, dataset, monkeypatch):
    def full(*args, **how):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        result = fit(RECIPE, dataset, output=tmp_path / "out", save_logits=True, **HOW)
    assert result.unwritten and all("logits.npz could not be written" in line for line in result.unwritten)
    fit(RECIPE, dataset, resume=tmp_path / "out", save_logits=True, **HOW)
    assert np.array_equal(saved_logits(tmp_path / "out")["logits"][0], result.logits[0].numpy())
