import collections
import json

import numpy as np
import pytest
import torch

from cifar_fast import CNN, InputError, Recipe
from cifar_fast.utils.errors import with_flags


def test_network_has_the_reference_parameter_counts():
    parameters = list(CNN(Recipe(), 10).parameters())
    sizes = {4: 0, 1: 0, 2: 0}  # by number of dimensions: convolutions, batch norm, linear
    for parameter in parameters:
        sizes[parameter.dim()] += parameter.numel()
    assert sizes == {4: 6_563_520, 1: 4_480, 2: 5_120}


def test_learning_rate_equals_the_reference_at_every_step():
    recipe = Recipe()
    steps = 97
    for step in range(1, 24 * steps + 1):
        time = step / steps
        warm, cool = 0.1 + 0.5 * time / 4.8, 0.6 * (24 - time) / (24 - 4.8)
        assert recipe.learning_rate(step, steps) * 512 == pytest.approx(warm if time < 4.8 else cool, abs=1e-12)
    assert recipe.learning_rate(24 * steps, steps) == 0
    exact = float(np.interp([1234 / 97], [0, 24 / 5, 24], [0.1 / 512, 0.6 / 512, 0])[0])
    assert recipe.learning_rate(1234, 97) == exact


def test_recipe_survives_a_json_round_trip(tmp_path):
    recipe = Recipe(epochs=3, widths=(6, 7), lr_knots=(0, 2), lr_values=(1, 0), flip=False)
    assert Recipe.from_json(recipe.to_json()) == recipe
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == recipe
    assert Recipe.from_json('{"epochs": 5}') == Recipe(epochs=5)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(epochs=0), "epochs must be at least 1, not 0"),
        (dict(epochs=1.5), "epochs must be a whole number"),
        (dict(batch_size=0), "batch_size must be at least 1"),
        (dict(batch_size=True), "batch_size must be a whole number"),
        (dict(widths=()), "widths must be one or more positive numbers"),
        (dict(widths=(8, 0)), "not 8 0"),
        (dict(widths=7), "widths must be a list of numbers"),
        (dict(widths=(6, 12, 24, 48, 96, 192)), "double at most 5 times"),
        (dict(celu_alpha=0), "celu_alpha must be above 0"),
        (dict(celu_alpha=float("nan")), "celu_alpha must be a finite number"),
        (dict(output_scale=-1), "output_scale must be above 0"),
        (dict(label_smoothing=1.1), "label_smoothing must lie in 0 to 1"),
        (dict(momentum=1), "momentum must lie between 0 and 1"),
        (dict(momentum=0), "momentum must lie between 0 and 1"),
        (dict(weight_decay=-1e-9), "weight_decay must be at least 0"),
        (dict(lr_knots=(1, 2, 3)), "the first one 0"),
        (dict(lr_knots=(0,), lr_values=(1,)), "two or more"),
        (dict(lr_knots=(0, 2, 2)), "lr_knots must increase"),
        (dict(lr_values=(1, 2)), "lr_values must be 3 numbers"),
        (dict(lr_values=(1, -2, 0)), "lr_values must be at least 0"),
        (dict(lr_values=(1, float("inf"), 0)), "lr_values must be a finite number"),
        (dict(crop_padding=32), "crop_padding must lie in 0 to 31"),
        (dict(cutout_size=33), "cutout_size must lie in 0 to 32"),
        (dict(flip=1), "flip must be true or false"),
        (dict(epochs=2**31), "epochs must be a whole number of at most 2147483647"),
        pytest.param(dict(epochs=10**5000), "not a number of many digits", id="long"),
        (dict(weight_decay=10**400), "weight_decay must be a finite number"),
        (
            dict(batch_size=1, widths=(6, 12, 24, 48, 96)),
            "batch_size must be at least 2 with these widths: block 5 has",
        ),
    ],
)
def test_invalid_constant_raises_an_error_with_its_name(values, words):
    with pytest.raises(InputError, match=words) as refusal:
        Recipe(**values)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "must be JSON"),
        ("[]", "a JSON object"),
        ('{"epoch": 3}', "has no constant epoch; its constants are epochs"),
        ('{"epochs": "3"}', "epochs must be a whole number, not '3'"),
        pytest.param('{"epochs": 1' + "0" * 5000 + "}", "must be JSON: Exceeds the limit", id="long"),
        ('{"weight_decay": 1e400}', "weight_decay must be a finite number"),
        pytest.param("[" * 100_000, "must be JSON", id="deep"),
    ],
)
def test_invalid_recipe_file_raises_an_error_with_its_path(tmp_path, text, words):
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(InputError, match=f"recipe.json: .*{words}"):
        Recipe.load(tmp_path / "recipe.json")


def test_commands_show_a_constant_as_a_flag_and_a_key_of_a_file_as_it_is(tmp_path):
    with pytest.raises(InputError) as refusal:
        Recipe(batch_size=0)
    assert with_flags(refusal.value.message) == "--batch-size must be at least 1, not 0"
    (tmp_path / "recipe.json").write_text('{"batch_size": 0}')
    with pytest.raises(InputError) as refusal:
        Recipe.load(tmp_path / "recipe.json")
    assert with_flags(refusal.value.message) == f"{tmp_path}/recipe.json: batch_size must be at least 1, not 0"


def test_recipe_file_may_start_with_a_byte_order_mark(tmp_path):
    (tmp_path / "recipe.json").write_text('{"epochs": 3}', encoding="utf-8-sig")
    assert Recipe.load(tmp_path / "recipe.json") == Recipe(epochs=3)


def test_batch_of_one_is_valid_if_feature_maps_have_several_pixels():
    assert Recipe(batch_size=1, widths=(6, 12, 24, 48)).blocks()[-1].out_size == 2


def test_missing_recipe_file_raises_an_error_with_its_path(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the recipe .*none\.json: No such file"):
        Recipe.load(tmp_path / "none.json")


def test_default_blocks_are_the_reference_blocks():
    blocks = [(block.index, block.c_in, block.c_out, block.size, block.pool) for block in Recipe().blocks()]
    assert blocks == [
        (1, 3, 64, 32, 1),
        (2, 64, 128, 32, 2),
        (3, 128, 128, 16, 1),
        (4, 128, 128, 16, 1),
        (5, 128, 256, 16, 2),
        (6, 256, 512, 8, 2),
        (7, 512, 512, 4, 1),
        (8, 512, 512, 4, 1),
    ]
    assert [block.name for block in Recipe().blocks()][1:3] == ["128x32x32, pool", "128x16x16"]
    assert Recipe().final_size == 4


def test_widths_determine_the_pools_and_the_head():
    recipe = Recipe(widths=(5, 10, 10, 20))
    assert [block.pool for block in recipe.blocks()] == [1, 2, 1, 2]
    assert recipe.final_size == 8
    assert CNN(recipe, 4)(torch.zeros(2, 3, 32, 32)).shape == (2, 4)


def test_to_json_writes_plain_json():
    assert json.loads(Recipe().to_json())["lr_values"] == [0.1, 0.6, 0.0]


class Numbers:
    """The least that a sequence needs: a length, and items by index."""

    def __init__(self, *numbers):
        self.numbers = numbers

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        return self.numbers[index]


@pytest.mark.parametrize(
    "make", [tuple, lambda numbers: Numbers(*numbers), collections.deque, collections.UserList, np.array, torch.tensor]
)
def test_any_sequence_is_read_as_the_numbers_it_holds(make):
    recipe = Recipe(widths=make([4, 8]), lr_knots=make([0, 1.5, 4]), lr_values=make([0.5, 1, 0]), classes=make([7, 2]))
    assert recipe == Recipe(widths=[4, 8], lr_knots=[0, 1.5, 4], lr_values=[0.5, 1, 0], classes=[7, 2])
    assert Recipe.from_json(recipe.to_json()) == recipe
    with pytest.raises(InputError, match=r"widths must be a whole number, not 8\.5"):
        Recipe(widths=make([8.5]))


@pytest.mark.parametrize("make", [np.array, torch.tensor, lambda value: np.array([value])[0]])
def test_scalar_of_an_array_library_is_read_as_the_number_it_is(make):
    recipe = Recipe(epochs=make(3), momentum=make(0.5), flip=make(False))
    assert recipe == Recipe(epochs=3, momentum=0.5, flip=False) and Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize("value", ["64 128", b"ab", {4: 8}, {4, 8}, np.array(4), np.array([[4, 8]]), np.array(["4"])])
def test_values_without_an_order_of_numbers_are_not_widths(value):
    with pytest.raises(InputError, match=r"widths must be a (list of numbers|whole number)"):
        Recipe(widths=value)
