"""``TrainConfig``: one field is an argument of ``fit``, a flag of ``cifar-fast train`` and a key of a sweep."""

import inspect
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from cifar_fast import InputError, Recipe, Sweep, fit
from cifar_fast.cli.flags import config_of
from cifar_fast.cli.train import make_parser
from cifar_fast.training.config import TrainConfig
from cifar_fast.utils.errors import with_flags
from tests.helpers import save_npz

DEFAULT = TrainConfig()
CHANGED = dict(
    backend="eager",
    device="cpu",
    dtype="float32",
    memory_format="channels_last",
    seed=3,
    init_seed=4,
    order_seed=5,
    augment_seed=6,
    validation=0.25,
    validation_seed=7,
    runs=2,
    checkpoint_every=7,
    verify_every=2,
    also_test={"again": "test.npz"},
    save_logits=True,
    tta=True,
    tensorboard=True,
    threads=1,
)
"""A value other than the default for each option."""
MAY_CHANGE = {"runs", "checkpoint_every", "verify_every", "tensorboard", "threads"}


def test_these_tests_change_every_option():
    assert list(CHANGED) == TrainConfig.names()
    assert not any(getattr(DEFAULT, name) == value for name, value in CHANGED.items())


def test_fit_has_an_argument_with_the_same_default_for_each_option():
    parameters = inspect.signature(fit).parameters
    defaults = {name: parameters[name].default for name in TrainConfig.names()}
    assert TrainConfig(**defaults) == DEFAULT
    assert parameters["recipe"].default is inspect.Parameter.empty


each_way = pytest.mark.parametrize("default", ["runs", "augment_seed"])
"""Several runs are refused if all seeds are given, so one option keeps its default."""


@each_way
def test_fit_uses_every_argument(tmp_path, tiny, default):
    recipe = Recipe(epochs=1, batch_size=8, widths=(4, 8))
    also_test = {"again": str(save_npz(tmp_path / "test.npz", tiny, images=tiny.test_images, labels=tiny.test_labels))}
    options = CHANGED | {"also_test": also_test, default: getattr(DEFAULT, default)}
    assert fit(recipe, tiny, log=None, **options).config == TrainConfig(recipe=recipe, **options)


def config_from(flags):
    """Return the config of flags of ``cifar-fast train``, which spells two options in its own way."""
    args = make_parser().parse_args(flags.split())
    args.also_test, args.tensorboard = dict(args.also_test), args.log == "tensorboard"
    return config_of(args)


def test_each_option_is_a_flag_of_train_with_the_same_default_and_help():
    assert config_from("") == DEFAULT
    flags = (
        "--backend eager --device cpu --dtype float32 --memory-format channels_last --seed 3 --init-seed 4 "
        "--order-seed 5 --augment-seed 6 --validation 0.25 --validation-seed 7 --runs 2 "
        "--checkpoint-every 7 --verify-every 2 --also-test again=test.npz "
        "--save-logits --tta --log tensorboard --threads 1"
    )
    assert config_from(flags) == TrainConfig(**CHANGED)
    text = "".join(make_parser().format_help().split())
    assert [name for name in TrainConfig.names() if "".join(TrainConfig.help(name).split()) not in text] == []


@each_way
def test_each_option_is_a_key_of_a_sweep(default):
    assert set(TrainConfig.names()) <= set(Sweep.names())
    changed = {name: value for name, value in CHANGED.items() if name != default}
    tables = {name: value for name, value in changed.items() if isinstance(value, dict)}
    lines = [f"{name} = {json.dumps(value)}" for name, value in changed.items() if name not in tables]
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    sweep = Sweep.from_toml("\n".join([*lines, "[variants.same]"]), output="out")
    assert sweep.config("same") == TrainConfig(**changed)
    assert Sweep.from_toml("[variants.same]", output="out").config("same") == DEFAULT


def test_import_of_the_config_does_not_import_torch():
    code = "import sys, cifar_fast.training.config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


@pytest.mark.parametrize("config", [DEFAULT, TrainConfig(recipe=Recipe(epochs=3, widths=(4, 8)), **CHANGED)])
def test_config_survives_json(config):
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", TrainConfig.names())
def test_difference_names_each_option_that_must_not_change(name):
    difference = TrainConfig(**{name: CHANGED[name]}).difference(DEFAULT)
    assert (difference is None) if name in MAY_CHANGE else difference[0] == name


def test_difference_names_the_first_changed_option():
    changed = DEFAULT.replace(order_seed=4, dtype="float16", runs=2)
    assert DEFAULT.difference(DEFAULT) is None
    assert changed.difference(DEFAULT) == ("dtype", "auto", "float16")
    assert DEFAULT.replace(order_seed=4).difference(DEFAULT) == ("order_seed", "not given", "4")
    assert changed.replace(recipe=Recipe(widths=(4, 8))).difference(changed.replace(recipe=Recipe(widths=(4,)))) == (
        "widths",
        "4",
        "4 8",
    )


def test_moved_test_sets_and_another_gpu_are_no_difference():
    before = TrainConfig(device="cuda:3", also_test={"again": "old.npz"})
    assert before.replace(device="cuda:0", also_test={"again": "new.npz"}).difference(before) is None
    assert before.replace(device="cpu").difference(before) == ("device", "cuda", "cpu")
    assert before.replace(also_test={"other": "old.npz"}).difference(before) == ("also_test", "again", "other")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("runs", 0, "must be at least 1, not 0"),
        ("runs", None, "must be a whole number, not None"),
        ("checkpoint_every", -1, "must be at least 0, not -1"),
        ("threads", 0, "must be at least 1, not 0"),
        ("seed", 1.5, "must be a whole number, not 1.5"),
        ("seed", -1, "must lie between 0 and 2^63, not -1"),
        ("init_seed", 2**63, f"must lie between 0 and 2^63, not {2**63}"),
        ("order_seed", "5", "must be a whole number, not '5'"),
        ("augment_seed", -1, "must lie between 0 and 2^63, not -1"),
        ("validation", 1.5, "must be a number of images or a fraction between 0 and 1, not 1.5"),
        ("validation", -1, "must be a number of images or a fraction between 0 and 1, not -1"),
        ("validation", True, "must be a number of images or a fraction between 0 and 1, not True"),
    ],
)
def test_bad_value_is_an_error_that_names_the_option(name, value, words):
    with pytest.raises(InputError) as caught:
        TrainConfig(**{name: value})
    assert str(caught.value) == f"{name} {words}"
    assert with_flags(caught.value.message) == f"--{name.replace('_', '-')} {words}"


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_scalars_of_array_libraries_become_options_that_json_can_hold(make):
    options = dict(seed=3, runs=2, threads=1, save_logits=True, tensorboard=False)
    config = TrainConfig(**{name: make(value) for name, value in options.items()})
    assert config == TrainConfig(**options)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(save_logits=1), "save_logits must be true or false, not 1"),
        (dict(seed=np.array([1])), r"seed must be a whole number, not array\(\[1\]\)"),
        (dict(also_test=["test.npz"]), r"also_test must be paths by names, not \['test.npz'\]"),
    ],
)
def test_option_of_another_kind_is_refused_with_its_name(options, words):
    with pytest.raises(InputError, match=words):
        TrainConfig(**options)
