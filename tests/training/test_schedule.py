"""Small data: steps without effect and images that are left out."""

import dataclasses
import json

import pytest

from cifar_fast import InputError, Recipe, fit
from cifar_fast.train import main
from tests.helpers import HOW, save_npz, small_dataset

RECIPE = Recipe(epochs=1, batch_size=16, widths=(4, 8))


def lines_of(recipe, train=32):
    lines = []
    fit(recipe, small_dataset(train=train), **HOW | {"log": lines.append})
    return [line for line in lines if "left out" in line or "train nothing" in line]


@pytest.mark.parametrize(
    ("train", "changes", "steps"),
    [
        (16, {}, "the only step has"),
        (31, {}, "the only step has"),
        (64, {"train_subset": 16}, "the only step has"),
        (32, {"classes": (0, 1)}, "the only step has"),
        (96, {"lr_values": (0, 0, 1e-50)}, "all 6 steps have"),
    ],
)
def test_training_without_any_effect_is_refused(tmp_path, train, changes, steps):
    recipe = dataclasses.replace(RECIPE, **changes)
    with pytest.raises(
        InputError, match=f"^small.npz: {steps} learning rate 0, so nothing would be trained; give more"
    ):
        fit(recipe, small_dataset(train=train), output=tmp_path / "out", **HOW)
    assert not (tmp_path / "out").exists()


def test_command_refuses_a_training_of_one_step(tmp_path, capfd):
    path = save_npz(tmp_path / "x.npz", small_dataset(train=32))
    command = f"--dataset npz --data-dir {path} --widths 4 8 --epochs 1 --device cpu --output {tmp_path}/out"
    assert main(f"{command} --batch-size 20".split()) == 2
    assert "give more --epochs, a smaller --batch-size, or other --lr-values" in capfd.readouterr().err
    assert main(f"{command} --batch-size 15".split()) == 0
    assert "2 of 32 training images are left out of each epoch" in capfd.readouterr().out
    assert len(json.loads((tmp_path / "out/summary.json").read_text())["runs"]) == 1


@pytest.mark.parametrize(
    ("train", "recipe", "lines"),
    [
        (32, dict(), ["1 of 2 steps train nothing, because their learning rate is 0"]),
        (32, dict(epochs=6), []),
        (
            33,
            dict(epochs=6),
            ["1 of 33 training images are left out of each epoch, because they do not fill a batch of 16"],
        ),
        (96, dict(lr_values=(0, 0, 0)), ["6 of 6 steps train nothing, because their learning rate is 0"]),
        (96, dict(lr_values=(0.1, 0, 0)), ["5 of 6 steps train nothing, because their learning rate is 0"]),
    ],
)
def test_line_tells_of_images_and_steps_that_train_nothing(train, recipe, lines):
    assert lines_of(dataclasses.replace(RECIPE, **recipe), train) == lines


def test_reference_recipe_gives_no_line():
    recipe = Recipe()
    rates = recipe.learning_rates(50_000 // 512)
    assert list(rates[[0, 1, -1]]) == [recipe.learning_rate(step, 97) for step in (1, 2, 97 * 24)]
    assert 100 * (50_000 % 512) < 50_000 and (rates == 0).sum() == 1
