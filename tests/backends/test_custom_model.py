"""Trainings of a custom model in each backend."""

import json
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from cifar_fast import CNN, InputError, Loader, Recipe, draw_epoch, fit, load_model
from cifar_fast.backends.fused import Fused, fastest_deterministic_convolutions
from cifar_fast.backends.select import build_backend, resolve_backend
from cifar_fast.data.eval_sets import EvalSet
from cifar_fast.data.tensors import device_data
from cifar_fast.inference.classifier import Classifier
from cifar_fast.model import CustomModel
from cifar_fast.training.evaluate import also_accuracies
from cifar_fast.training.time_to_go import TimeToGo
from tests.helpers import NARROW, small_dataset

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
RECIPE = Recipe(epochs=2, batch_size=8, widths=NARROW, lr_values=(0.05, 0.1, 0.0))
TINY = Recipe(epochs=2, batch_size=4, lr_values=(0.05, 0.1, 0.0))


class MyNet(nn.Module):
    """A model with a buffer, dropout, a frozen weight and an unused weight."""

    def __init__(self, classes=3, drop=0.2):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(drop))
        self.head = nn.Linear(4, classes)
        self.gain = nn.Parameter(torch.full((), 2.0), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(1))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, images):
        if self.training:
            self.steps += 1
        return self.gain * self.head(self.body(images).mean((2, 3)))


class HostRead(MyNet):
    """A model that reads a number on the host. It cannot be captured, nor compiled as a whole."""

    def forward(self, images):
        logits = super().forward(images)
        return logits * 2 if logits.sum().item() > 0 else logits


def train(model, dataset, recipe=RECIPE, **how):
    return fit(recipe, dataset, model=model, **{"device": DEVICE, "dtype": "float32", "log": None} | how)


def same_weights(ours, theirs):
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def losses(result):
    return [row.train_loss for row in result.rows]


def test_recipe_network_as_custom_model_trains_to_the_same_bits(small):
    ours = train(lambda: CNN(RECIPE, 3), small, backend="eager", runs=2, seed=5)
    theirs = fit(RECIPE, small, device=DEVICE, dtype="float32", backend="eager", runs=2, seed=5, log=None)
    assert losses(ours) == losses(theirs) and same_weights(ours.state_dict, theirs.state_dict)
    assert ours.parameters == theirs.parameters and (ours.model, theirs.model) == ("CNN", None)


@pytest.mark.parametrize(
    "backend",
    [
        "eager",
        pytest.param("compiled", marks=pytest.mark.slow),
        "fused, uncompiled",
        pytest.param("fused", marks=pytest.mark.nightly),
    ],
)
def test_every_backend_trains_a_custom_model_and_keeps_its_state(few_programs, request, backend):
    if backend.endswith("uncompiled"):
        request.getfixturevalue("uncompiled")
        backend = backend.split(",")[0]
    dataset = small_dataset(train=10, test=6)
    result = train(lambda: MyNet(drop=0.0), dataset, TINY, backend=backend)
    eager = train(lambda: MyNet(drop=0.0), dataset, TINY, backend="eager", memory_format="channels_last")
    assert result.backend == backend and losses(result) == pytest.approx(losses(eager), rel=1e-4)
    assert result.state_dict["steps"] == 4 and result.state_dict["body.1.num_batches_tracked"] == 4
    assert result.state_dict["gain"] == 2 and result.state_dict["unused"] == 1
    assert [row.test_accuracy for row in result.rows] == [row.test_accuracy for row in eager.rows]


def test_seed_determines_dropout_and_the_callers_generator_is_unchanged(small):
    state = torch.get_rng_state()
    both = train(MyNet, small, runs=2, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(77)
    alone = train(MyNet, small, seed=4)
    assert losses(both)[2:] == losses(alone) and same_weights(both.state_dict, alone.state_dict)
    assert losses(both)[:2] != losses(both)[2:]


def test_dropout_is_active_in_training(small):
    assert losses(train(MyNet, small)) != losses(train(lambda: MyNet(drop=0.0), small))


def test_each_run_starts_from_the_given_module_which_is_unchanged(small):
    model = MyNet()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    still = Recipe(epochs=1, batch_size=8, lr_values=(0.0, 0.0, 0.0))
    result = train(model, small, still, runs=2)
    assert all(torch.equal(result.state_dict[name].cpu(), parameter) for name, parameter in model.named_parameters())
    assert same_weights(model.state_dict(), before) and not torch.equal(result.state_dict["steps"], before["steps"])


class Stopped(Exception):
    pass


@pytest.mark.parametrize("backend", ["eager", pytest.param("fused", marks=pytest.mark.slow)])
def test_stopped_training_resumes_with_the_same_bits(tmp_path, uncompiled, few_programs, backend):
    dataset, lines = small_dataset(train=10, test=6), []
    whole = train(MyNet, dataset, TINY, backend=backend)

    def stop_after_the_first_epoch(line):
        lines.append(line)
        if line.startswith("epoch  1"):
            stop.append(line)

    stop = []

    class Stopping(MyNet):
        def forward(self, images):
            if stop:
                raise Stopped
            return super().forward(images)

    Stopping.__name__ = "MyNet"
    with pytest.raises(Stopped):
        train(Stopping, dataset, TINY, backend=backend, output=tmp_path, log=stop_after_the_first_epoch)
    resumed = train(MyNet, dataset, TINY, backend=backend, resume=tmp_path)
    assert losses(resumed) == losses(whole) and same_weights(resumed.state_dict, whole.state_dict)


def test_summary_names_the_model_and_its_weights_load(tmp_path, small):
    result = train(MyNet, small, output=tmp_path, save_logits=True)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["model"], summary["parameters"]) == ("MyNet", sum(p.numel() for p in MyNet().parameters()))
    with pytest.raises(
        InputError, match=r"holds the weights of the custom model MyNet; call load_model\(path, model\)"
    ):
        load_model(tmp_path)
    classifier = load_model(tmp_path, MyNet())
    right = classifier.predict(small.test_images).argmax(1) == torch.from_numpy(small.test_labels)
    assert 100 * right.float().mean().item() == pytest.approx(result.runs[0].test_accuracy)
    assert torch.equal(result.logits[0].argmax(1), classifier.predict(small.test_images).argmax(1))
    with pytest.raises(InputError, match="does not fit Linear: it lacks weight; it has gain, "):
        load_model(tmp_path, nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (None, "the model was MyNet, now not given; resume in Python"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3072, 3)), "the model was MyNet, now Sequential; resume in Python"),
    ],
)
def test_resuming_with_another_model_is_refused(tmp_path, small, model, words):
    train(MyNet, small, output=tmp_path)
    with pytest.raises(InputError, match=words):
        train(model, small, resume=tmp_path, runs=2)


class Pair(nn.Linear):
    def forward(self, images):
        return super().forward(images.mean((2, 3))), 0


class Outputs(NamedTuple):
    logits: torch.Tensor
    auxiliary: torch.Tensor


class Auxiliary(MyNet):
    """A model that returns more than the logits in training, as GoogLeNet does."""

    def forward(self, images):
        logits = super().forward(images)
        return Outputs(logits, logits) if self.training else logits


class Views(MyNet):
    """A model that needs images of contiguous memory, as many small networks do."""

    def __init__(self, only_in_training=False):
        super().__init__()
        self.flat = nn.Linear(3 * 32 * 32, 3)
        self.only_in_training = only_in_training

    def forward(self, images):
        flat = images.view(len(images), -1) if self.training or not self.only_in_training else images.flatten(1)
        return self.flat(flat) + super().forward(images)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            lambda: MyNet(classes=5),
            "model MyNet must return logits of shape (2, 3) for two images, not torch.float32 of ",
        ),
        (lambda: Pair(3, 3), "model Pair must return logits of shape (2, 3) for two images, not tuple"),
        (Auxiliary, "for two images in training, not Outputs; wrap it in a module that returns the logits alone"),
        (lambda: nn.Linear(7, 3), "model Linear cannot take images of shape (2, 3, 32, 32)"),
        (Views, '); it can with memory_format="contiguous_format"'),
        (lambda: Views(only_in_training=True), "in torch.channels_last in training (RuntimeError: view size"),
        (nn.Flatten(), "model Flatten has no parameter to train"),
        (lambda: 3, "model must make a torch.nn.Module, not int"),
        (Pair, f"model cannot be made by calling {Pair!r} without arguments (TypeError: "),
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), "model Sequential has lazy layers"),
        ("resnet18", "model must be a torch.nn.Module or a function that makes one, not 'resnet18'"),
    ],
)
def test_invalid_model_is_refused_before_anything_is_written(tmp_path, small, model, words):
    with pytest.raises(InputError) as caught:
        train(model, small, output=tmp_path / "out")
    assert words in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_model_that_needs_contiguous_images_trains_with_them(small):
    assert train(Views, small, backend="eager").memory_format == "contiguous_format"


class Centers(nn.Module):
    """A model that writes into its input, or that does not."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.head = nn.Linear(4, 3)

    def forward(self, images):
        images = images.sub_(0.7).mul_(1.5) if self.in_place else (images - 0.7) * 1.5
        return self.head(self.body(images).mean((2, 3)))


@pytest.mark.parametrize(
    ("backend", "compiled"),
    [
        ("eager", False),
        ("compiled", False),
        pytest.param("compiled", True, marks=pytest.mark.nightly),
        ("fused", False),
        pytest.param("fused", True, marks=pytest.mark.nightly),
    ],
)
def test_model_that_writes_into_its_input_changes_no_stored_image(few_programs, request, backend, compiled):
    if not compiled:
        request.getfixturevalue("uncompiled")
    dataset = small_dataset(train=10, test=6)
    images = {name: getattr(dataset, name).copy() for name in ("train_images", "test_images")}
    also = EvalSet("same", dataset.test_images, dataset.test_labels)
    config = resolve_backend(backend, DEVICE, "float32")
    results = []
    for in_place in (True, False):
        own = CustomModel(lambda in_place=in_place: Centers(in_place))
        trained, _ = build_backend(config, TINY, device_data(dataset, config.device), own)
        trained.reset(own(TINY, 3, torch.Generator().manual_seed(0)))
        seen = []
        for seed in range(2):
            generator = torch.Generator(config.device).manual_seed(seed)
            draws = draw_epoch(10, device=config.device, generator=generator)
            seen += [tensor.clone() for step in trained.train_epoch(draws) for tensor in step]
            seen += [
                trained.evaluate()[1].clone(),
                trained.evaluate()[1].clone(),
                torch.tensor(also_accuracies(trained, [also], ["a", "b", "c"], TimeToGo())[0]["same"]),
            ]
        results.append(seen)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert all(np.array_equal(getattr(dataset, name), before) for name, before in images.items())


def test_classifier_and_loader_hand_out_images_that_a_model_may_write_into():
    dataset = small_dataset(train=10, test=6)
    mean, std = [100.0] * 3, [50.0] * 3
    classifier = Classifier(Centers(in_place=True), TINY, ["a", "b", "c"], mean, std).eval()
    images = torch.from_numpy(dataset.test_images.copy())
    first, again = (classifier.predict(images, flip_average=True) for _ in range(2))
    assert torch.equal(first, again) and np.array_equal(images, dataset.test_images)
    for split in ("train", "test"):
        loader = Loader(dataset, 4, split=split, augment=False, shuffle=False, drop_last=False, device=DEVICE)
        kept = loader.images.clone(), loader.labels.clone()
        batches = [[tensor.clone() for tensor in batch] for batch in loader]
        for batch, expected in zip(loader, batches, strict=True):
            assert all(map(torch.equal, batch, expected))
            for tensor in batch:
                tensor.zero_()
        assert torch.equal(loader.images, kept[0]) and torch.equal(loader.labels, kept[1])
        assert all(torch.equal(*pair) for batch in zip(loader, batches) for pair in zip(*batch))


@pytest.mark.nightly
def test_model_with_a_host_read_trains_compiled_and_is_refused_by_fused(few_programs):
    dataset = small_dataset(train=10, test=6)
    eager, compiled = (train(lambda: HostRead(drop=0.0), dataset, TINY, backend=name) for name in ("eager", "compiled"))
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-3)
    with pytest.raises(
        InputError, match=r"the fused backend cannot take the model HostRead here \(.*\); choose another backend"
    ):
        train(HostRead, dataset, TINY, backend="fused")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_replayed_step_of_a_custom_model_equals_the_called_step_bit_for_bit(dtype):
    dataset, own = small_dataset(train=10, test=7), CustomModel(lambda: MyNet(drop=0.0))
    device, seen = torch.device("cuda", 0), []
    for captured in (True, False):
        backend = Fused(TINY, device_data(dataset, device), device, dtype, torch.channels_last, own)
        assert all(backend.step_graphs.values()) and backend.evaluation_graph
        backend.reset(own(TINY, 3, torch.Generator().manual_seed(0)))
        if not captured:
            backend.step_graphs, backend.evaluation_graph = {True: None}, None
        draws = draw_epoch(10, device=device, generator=torch.Generator(device).manual_seed(0))
        with fastest_deterministic_convolutions():
            trained = [tensor.clone() for scored in backend.train_epoch(draws) for tensor in scored]
            seen.append([*trained, backend.evaluate()[1].clone(), *map(torch.clone, backend.state_dict().values())])
    assert all(map(torch.equal, *seen)) and seen[0][0].dtype == (
        torch.float16 if dtype == torch.float16 else torch.float32
    )


@pytest.mark.gpu
@pytest.mark.slow  # a GPU simulator has no random numbers in a capture
def test_captured_step_draws_new_numbers_each_time_and_repeats_with_the_seed():
    dataset = small_dataset(train=10, test=7)
    first, again = (train(MyNet, dataset, TINY, backend="fused", dtype="float16") for _ in range(2))
    assert losses(first) == losses(again)
    assert losses(first) != losses(train(lambda: MyNet(drop=0.0), dataset, TINY, backend="fused", dtype="float16"))


@pytest.mark.gpu
@pytest.mark.slow  # two compilations
def test_model_that_cannot_be_captured_falls_back_with_the_reason():
    result = train(HostRead, small_dataset(train=10, test=7), TINY, dtype="float16")
    assert result.backend == "compiled" and any(
        "the fused backend cannot take the model HostRead here" in line for line in result.auto
    )
