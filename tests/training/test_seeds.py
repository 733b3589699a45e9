"""Seeds of a run: ``--seed`` for everything, or separate seeds for weights, order and augmentation."""

import json

import pytest
import torch

import cifar_fast.backends.base
import cifar_fast.training.trainer
from cifar_fast import CNN, InputError, Recipe, draw_epoch, fit
from cifar_fast.cli.main import main as command
from cifar_fast.train import main
from cifar_fast.training.config import TrainConfig
from cifar_fast.utils.seeds import Seeds
from tests.helpers import HOW, NARROW

FLAGS = "--dataset npz --widths 4 8 8 8 16 32 32 32 --epochs 2 --batch-size 32 --device cpu --backend eager"
SOURCES = ("weights", "permutation", "crop", "flip", "cutout")


@pytest.fixture
def drawn(tmp_path, npz, monkeypatch, no_curves):
    """A function of flags that runs the command and returns each run's initial weights and draws of two epochs."""

    def draw(flags):
        models, epochs = [], []

        def model(*args):
            made = CNN(*args)
            models.append(torch.cat([parameter.detach().flatten().clone() for parameter in made.parameters()]))
            return made

        def epoch(*args, **how):
            epochs.append(draw_epoch(*args, **how))
            return epochs[-1]

        with monkeypatch.context() as patch:
            patch.setattr(cifar_fast.backends.base, "make_network", model)
            patch.setattr(cifar_fast.training.trainer, "draw_epoch", epoch)
            assert main(f"{FLAGS} --data-dir {npz} --output {tmp_path}/out --overwrite {flags}".split()) == 0
        pairs = [torch.stack([draws.tensor for draws in epochs[i : i + 2]]) for i in range(0, len(epochs), 2)]
        return [dict(weights=weights, **dict(zip(SOURCES[1:], pair.unbind(1)))) for weights, pair in zip(models, pairs)]

    return draw


def differing(one, other):
    return {name for name in SOURCES if not torch.equal(one[name], other[name])}


@pytest.mark.slow  # whole trainings
@pytest.mark.parametrize(
    ("varied", "differs"),
    [("init", {"weights"}), ("order", {"permutation"}), ("augment", {"crop", "flip", "cutout"})],
)
def test_separate_seed_changes_only_its_own_source(drawn, varied, differs):
    fixed = " ".join(f"--{name}-seed 5" for name in ("init", "order", "augment") if name != varied)
    (one,), (other,) = (drawn(f"{fixed} --{varied}-seed {seed}") for seed in (6, 7))
    assert differing(one, other) == differs


def test_separate_seed_is_the_same_in_all_runs_and_others_follow_the_run_index(drawn, tmp_path):
    """The runs share initial weights, with different order and augmentation."""
    first, second = drawn("--init-seed 5 --seed 3 --runs 2")
    assert differing(first, second) == set(SOURCES) - {"weights"}
    runs = json.loads((tmp_path / "out/summary.json").read_text())["runs"]
    names = ("seed", "init_seed", "order_seed", "augment_seed")
    assert [[run[name] for name in names] for run in runs] == [[3, 5, 3, 3], [4, 5, 4, 4]]
    (alone,) = drawn("--init-seed 5 --seed 4")
    assert not differing(alone, second)


def test_init_seed_gives_the_same_weights_as_an_equal_seed(drawn):
    (separate,), (single,) = drawn("--init-seed 5 --seed 9"), drawn("--seed 5")
    assert torch.equal(separate["weights"], single["weights"])


def test_without_separate_seeds_one_stream_gives_all_numbers_as_in_the_reference(drawn, tmp_path, tiny):
    torch.manual_seed(5)
    weights = torch.cat([parameter.flatten() for parameter in CNN(Recipe(widths=NARROW), 3).parameters()])
    epochs = torch.stack([draw_epoch(len(tiny.train_images), device="cpu").tensor for _ in range(2)])
    (run,) = drawn("--seed 5")
    assert not differing(run, dict(weights=weights.detach(), **dict(zip(SOURCES[1:], epochs.unbind(1)))))
    (run,) = json.loads((tmp_path / "out/summary.json").read_text())["runs"]
    assert (run["seed"], run["init_seed"], run["order_seed"], run["augment_seed"]) == (5, None, None, None)


def test_equal_separate_seeds_give_independent_streams():
    """Equal streams would tie the crops to the order: both are remainders of the same random numbers."""
    generators = Seeds(5, 5, 5, 5).generators(torch.device("cpu"))
    assert len({tuple(generator.get_state().tolist()) for generator in generators}) == 3


@pytest.mark.parametrize(
    ("seed", "words"), [(-1, "order_seed must lie between 0"), (1.5, "order_seed must be a whole number")]
)
def test_invalid_separate_seed_is_refused(small, seed, words):
    with pytest.raises(InputError, match=words):
        fit(Recipe(epochs=1, batch_size=32, widths=NARROW), small, device="cpu", order_seed=seed, log=None)


def test_profile_uses_the_seeds_given_to_train(tmp_path, npz, monkeypatch):
    taken = []
    monkeypatch.setattr(
        "cifar_fast.diagnostics.profile.profile", lambda backend, draws, *given, **how: taken.append(draws)
    )
    flags = f"{FLAGS} --data-dir {npz} --profile {tmp_path}/out"
    for seeds in ("--order-seed 6", "--order-seed 7", "--order-seed 7 --augment-seed 8"):
        assert main(f"{flags} {seeds}".split()) == 0
    first, second, third = taken
    assert torch.equal(first.crop, second.crop) and not torch.equal(first.permutation, second.permutation)
    assert torch.equal(second.permutation, third.permutation) and not torch.equal(second.crop, third.crop)


FIXED = dict(init_seed=1, order_seed=1, augment_seed=1)


@pytest.mark.parametrize(
    ("options", "recipe"),
    [
        (FIXED, Recipe()),
        (dict(init_seed=0, order_seed=5), Recipe(crop_padding=0, flip=False, cutout_size=0)),
    ],
)
def test_runs_that_would_be_equal_are_refused(tmp_path, tiny, options, recipe):
    with pytest.raises(InputError, match=r"runs 3: the runs would be equal, because init_seed.*; leave one of the"):
        fit(recipe, tiny, runs=3, output=tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())
    TrainConfig(recipe=recipe, **options).check_runs_differ()
    TrainConfig(recipe=recipe, runs=3, init_seed=0, augment_seed=0).check_runs_differ()
    TrainConfig(runs=3, init_seed=0, order_seed=0).check_runs_differ()


def test_runs_that_would_be_equal_are_refused_by_the_commands(tmp_path, npz, capfd):
    flags = f"--dataset npz --data-dir {npz} --runs 2 --init-seed 1 --order-seed 2 --augment-seed 3"
    assert command(f"train {flags} --output {tmp_path}/out".split()) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: --runs 2: the runs would be equal, because --init-seed, --order-seed and --augm")
    assert error.count("\n") == 1
    (tmp_path / "spec.toml").write_text("runs = 2\ninit_seed = 1\norder_seed = 2\naugment_seed = 3\n[variants.a]\n")
    assert command(["sweep", f"{tmp_path}/spec.toml"]) == 2
    error = capfd.readouterr().err
    assert "spec.toml: variant a: runs 2: the runs would be equal" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["spec.toml"]


def test_resume_with_more_runs_that_would_be_equal_is_refused(tmp_path, tiny, no_curves):
    recipe, folder = Recipe(epochs=2, batch_size=16, widths=(4, 8)), tmp_path / "out"
    fit(recipe, tiny, output=folder, **FIXED, **HOW)
    with pytest.raises(InputError, match="runs 2: the runs would be equal"):
        fit(recipe, tiny, resume=folder, runs=2, **FIXED, **HOW)
