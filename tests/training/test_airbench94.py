"""The recipe airbench94, from the command to the end of a training."""

import dataclasses
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.airbench94 import compare
from cifar_fast import InputError, Loader, Recipe, fit, fit_sweep, load_dataset, load_model
from cifar_fast.backends.optimizers import make_optimizer, orthogonalize
from cifar_fast.backends.select import build_backend, resolve_backend
from cifar_fast.compare import main as compare_backends
from cifar_fast.data.augment import draw_epoch
from cifar_fast.data.dataset import ARRAYS
from cifar_fast.data.tensors import device_data
from cifar_fast.experiments.sweep import Sweep
from cifar_fast.train import main
from cifar_fast.training import trainer
from cifar_fast.training.evaluate import averaged
from cifar_fast.training.schedule import schedule_notes
from cifar_fast.whitened import Whitened

SMALL = dict(widths=(4, 8), batch_size=16, epochs=4)
FLAGS = "--recipe airbench94 --dataset npz --device cpu --dtype float32 --widths 4 8 --batch-size 16 --epochs 4"


@pytest.fixture
def small():
    return dataclasses.replace(Recipe.load("airbench94"), **SMALL)


def test_command_trains_predicts_and_names_the_recipe(tmp_path, npz):
    assert main(f"{FLAGS} --backend eager --tta --data-dir {npz} --output {tmp_path}/out".split()) == 0
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert 0 <= summary["runs"][0]["tta_accuracy"] <= 100 and "test_accuracy" in summary["runs"][0]
    assert (summary["recipe"]["network"], summary["recipe"]["optimizer"]) == ("whitened", "muon")
    model = load_model(tmp_path / "out")
    assert isinstance(model.model, Whitened)
    images = torch.randint(256, (5, 32, 32, 3), dtype=torch.uint8)
    assert model.predict(images).shape == (5, len(model.class_names))


@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_resumed_training_has_the_same_bits(tmp_path, npz, backend, monkeypatch):
    """It stops in the last epoch that trains the whitening's bias, and in the first one that does not."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    flags = f"{FLAGS} --backend {backend} --data-dir {npz}"
    assert main(f"{flags} --output {tmp_path}/whole".split()) == 0
    whole = torch.load(tmp_path / "whole/model.pt", weights_only=True)["state_dict"]
    for epoch in (3, 4):
        folder = tmp_path / f"cut{epoch}"
        with monkeypatch.context() as patch:

            def check(losses, step, steps, epoch=epoch):
                if step == epoch * steps - 1:
                    raise KeyboardInterrupt

            patch.setattr(trainer, "check_finite", check)
            assert main(f"{flags} --output {folder}".split()) == 130
        assert main(["--resume", str(folder)]) == 0
        resumed = torch.load(folder / "model.pt", weights_only=True)["state_dict"]
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_fused_agrees_with_eager(small, tiny, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    recipe = dataclasses.replace(small, epochs=1)
    how = dict(device="cpu", dtype="float32", log=None)
    eager, fused = (fit(recipe, tiny, backend=backend, **how) for backend in ("eager", "fused"))
    assert fused.rows[0].train_loss == pytest.approx(eager.rows[0].train_loss, rel=1e-3)
    weights = [result.state_dict["whiten.weight"] for result in (eager, fused)]
    assert torch.equal(*weights)


@pytest.mark.gpu
def test_each_phase_is_captured_and_replayed(small, tiny):
    """The results are those of the uncaptured step, bit for bit."""
    data = device_data(tiny, torch.device("cuda"))
    backend, _ = build_backend(resolve_backend("fused", "cuda", "float16"), small, data)
    model = backend.new_model(torch.Generator().manual_seed(0))
    assert sorted(backend.step_graphs) == [False, True] and all(backend.step_graphs.values())
    weights = []
    for captured in (True, False):
        if not captured:
            backend.step_graphs = dict.fromkeys(backend.step_graphs)
        backend.reset(model)
        order = torch.Generator("cuda").manual_seed(0)
        for epoch in range(small.epochs):
            draws = draw_epoch(len(tiny.train_images), device="cuda", recipe=small, generator=order, epoch=epoch)
            list(backend.train_epoch(draws))
        weights.append({name: tensor.clone() for name, tensor in backend.state_dict().items()})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_first_convolution_whitens_patches():
    """Its outputs are uncorrelated and have variance 1, but for directions that the images hardly have."""
    dataset = load_dataset("synthetic", log=None)
    images = (torch.tensor(dataset.train_images[:500]).permute(0, 3, 1, 2).float() - 120) / 60
    model = Whitened(Recipe.load("airbench94"), 10)
    model.prepare(images)
    outputs = F.conv2d(images, model.whiten.weight).movedim(1, 0).flatten(1)
    first, negative = outputs[:12], outputs[12:]
    assert torch.equal(first, -negative)
    covariance = first @ first.T / first.shape[1]
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-3
    assert ((covariance.diag() > 0) & (covariance.diag() < 1.001)).all() and covariance.diag()[-1] > 0.99


def test_bias_of_the_whitening_is_trained_for_three_epochs(small, tiny):
    biases = []
    model = Whitened(small, 3)
    assert [model.start_epoch(epoch) for epoch in range(5)] == [True, True, True, False, False]
    backend, _ = build_backend(
        resolve_backend("eager", "cpu", "float32"), small, device_data(tiny, torch.device("cpu"))
    )
    backend.reset(backend.new_model(torch.Generator().manual_seed(0)))
    for _ in range(4):
        list(backend.train_epoch(draw_epoch(len(tiny.train_images), device="cpu", recipe=small)))
        biases.append(backend.model.whiten.bias.detach().clone())
    changes = [torch.equal(one, other) for one, other in itertools.pairwise(biases)]
    assert changes == [False, False, True]


def test_no_step_counts_as_untrained_because_one_group_rests(small, tiny):
    assert not [line for line in schedule_notes(small, tiny) if "learning rate" in line]


def test_command_compares_the_backends(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    flags = (
        "--recipe airbench94 --dataset synthetic --device cpu --dtype float32 --widths 4 8 --steps 2 --batch-size 32"
    )
    assert compare_backends(flags.split()) == 0
    assert "conv 5" in capsys.readouterr().out


def test_loader_alternates_the_mirroring(tiny, small):
    recipe = dataclasses.replace(small, crop_padding=0)
    loader = Loader(tiny, 8, augment=recipe, shuffle=False, drop_last=False, device="cpu")
    first, second = (torch.cat([batch for batch, _ in loader]) for _ in range(2))
    assert torch.equal(first.flip(3), second)


def test_filter_of_zeros_stays_finite_in_a_muon_step():
    convolution = nn.Conv2d(3, 4, 3, bias=False)
    nn.init.zeros_(convolution.weight)
    optimizer = make_optimizer(convolution, Recipe(optimizer="muon"))
    convolution(torch.rand(2, 3, 5, 5)).sum().backward()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert convolution.weight.isfinite().all() and convolution.weight.any()


def test_mirroring_is_opposite_in_every_second_epoch(small):
    order = torch.Generator().manual_seed(1)
    epochs = [draw_epoch(40, device="cpu", recipe=small, generator=order, epoch=epoch) for epoch in range(3)]
    flips = [torch.empty(40, dtype=torch.int64).scatter_(0, draws.permutation, draws.flip) for draws in epochs]
    assert torch.equal(flips[0], flips[2]) and torch.equal(flips[0], 1 - flips[1]) and 5 < flips[0].sum() < 35
    assert not torch.equal(epochs[0].permutation, epochs[2].permutation)


def test_views_of_test_time_augmentation():
    """A model that reads one pixel shows which pixels are averaged, with which weights."""
    images = torch.rand(2, 1, 4, 4)
    seen = averaged(lambda x: x[:, 0, 1, 1:2], images, torch.contiguous_format)[:, 0]
    x = images[:, 0]
    expected = (x[:, 1, 1] + x[:, 1, 2]) / 4 + (x[:, 0, 0] + x[:, 0, 1] + x[:, 2, 2] + x[:, 2, 3]) / 8
    torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize("shape", [(8, 30), (30, 8)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices).float())
    assert ((values > 0.5) & (values < 1.5)).all()
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    diagonal = left.mT @ orthogonalize(matrices).float() @ right.mT
    assert (diagonal - torch.diag_embed(diagonal.diagonal(dim1=1, dim2=2))).abs().max() < 0.05


def test_rates_fall_to_zero_and_the_decay_of_a_step_is_the_same_in_all_groups():
    rates = Recipe.load("airbench94").learning_rates(25)
    assert rates.shape == (200, 4) and rates[0].tolist() == [0.24, 0.053, 0.053, 0.67]
    assert rates[199].tolist() == pytest.approx([0.24 / 200, 0, 0.053 / 200, 0.67 / 200])
    assert rates[74, 1] == pytest.approx(0.053 / 75) and rates[75, 1] == 0


def test_recipes_can_be_compared_in_a_sweep(tmp_path, npz, small):
    variants = {"reference": Recipe(epochs=2, batch_size=16, widths=(4, 8)), "airbench94": small}
    sweep = Sweep(
        variants=variants, output=str(tmp_path), dataset="npz", data_dir=str(npz), backend="eager", device="cpu"
    )
    results = fit_sweep(sweep, log=None)
    assert [result.recipe.network for result in results.values()] == ["cnn", "whitened"]


def test_variant_of_a_sweep_starts_from_a_recipe_with_a_name():
    text = '[recipe]\nepochs = 2\n[variants.a]\n[variants.b]\nrecipe = "airbench94"\nepochs = 3'
    sweep = Sweep.from_toml(text, output="out")
    assert sweep.variants == {"a": Recipe(epochs=2), "b": dataclasses.replace(Recipe.load("airbench94"), epochs=3)}
    assert Sweep.from_toml('recipe = "airbench94"\n[variants.a]', output="out").variants["a"].network == "whitened"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--recipe airbench95", "the recipes with a name are reference, airbench94"),
        (
            "--recipe airbench94 --lr-values 0 1 0",
            "--lr-values belongs to optimizer sgd; this recipe has optimizer muon",
        ),
        ("--recipe airbench94 --residual", "--residual belongs to network cnn; this recipe has network whitened"),
        ("--recipe airbench94 --widths 4 4 4 4 4 4 4 4", "--widths must be at most 4 numbers"),
        ("--muon-lr 0.1", "--muon-lr belongs to optimizer muon; this recipe has optimizer sgd"),
    ],
)
def test_constants_of_another_recipe_are_refused_by_name(capsys, tmp_path, flags, words):
    assert main(f"{flags} --dataset synthetic --output {tmp_path}/out".split()) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_unknown_network_is_an_error():
    with pytest.raises(InputError, match="network must be one of cnn, whitened, not resnet"):
        Recipe(network="resnet")


def test_training_equals_the_original_program():
    """The program is not part of this project: set AIRBENCH94 to the path of airbench94_muon.py."""
    if not os.environ.get("AIRBENCH94"):
        pytest.skip("AIRBENCH94 does not name the original program")
    dataset = load_dataset("synthetic", log=None)
    small = dataclasses.replace(dataset, **{name: getattr(dataset, name)[:60] for name in ARRAYS})
    differences = compare(Path(os.environ["AIRBENCH94"]), small, batch_size=30)
    whitening = differences.pop("whitening of 60 images")
    assert whitening < 1e-3 and max(differences.values()) < 1e-10
