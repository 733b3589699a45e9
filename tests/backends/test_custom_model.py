"""Trainings of a custom model in each backend."""

import json

import pytest
import torch
from torch import nn

from cifar_fast import CNN, InputError, Recipe, draw_epoch, fit, load_model
from cifar_fast.backends.fused import Fused, fastest_deterministic_convolutions
from cifar_fast.data.tensors import device_data
from cifar_fast.model import CustomModel
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
    with pytest.raises(InputError, match="holds no network"):
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


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            lambda: MyNet(classes=5),
            "model MyNet must return logits of shape (2, 3) for two images, not torch.float32 of ",
        ),
        (lambda: Pair(3, 3), "model Pair must return logits of shape (2, 3) for two images, not tuple"),
        (lambda: nn.Linear(7, 3), "model Linear cannot take images of shape (2, 3, 32, 32)"),
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
        assert backend.step_graph and backend.evaluation_graph
        backend.reset(own(TINY, 3, torch.Generator().manual_seed(0)))
        if not captured:
            backend.step_graph = backend.evaluation_graph = None
        draws = draw_epoch(10, device=device, generator=torch.Generator(device).manual_seed(0))
        with fastest_deterministic_convolutions():
            trained = [tensor.clone() for scored in backend.train_epoch(draws) for tensor in scored]
            seen.append([*trained, backend.evaluate().clone(), *map(torch.clone, backend.state_dict().values())])
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
