"""The check of a machine: a yes for each line where all is well, a no with its reason for what is broken."""

import functools
import json
import sys
from pathlib import Path

import pytest
import torch

import cifar_fast.cli.check
import cifar_fast.kernels.augment
import cifar_fast.kernels.batch_norm_celu
import cifar_fast.kernels.record_step
from cifar_fast import Recipe
from cifar_fast.backends.eager import Eager
from cifar_fast.backends.select import BackendConfig
from cifar_fast.cli.main import main
from cifar_fast.diagnostics.check import Check
from cifar_fast.diagnostics.roofline import COPY_BYTES
from cifar_fast.kernels import launch
from tests.helpers import NARROW, compiler

ROOT = Path(__file__).parents[2]
without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is here")
NORMS = [
    f"norm {shape}, {direction}"
    for shape in ("4x32x32", "8x32x32, pool")
    for direction in ("forward", "backward", "inference")
]
KERNELS = ["augmentation", *NORMS, "loss", "bookkeeping"]
STEP = ["set-up", "memory", "the same bits again", "time", "against eager", "auto takes"]
WITHOUT_A_GPU = ["NVIDIA driver", "kernels compile"]


def with_widths(monkeypatch, *widths):
    """The command with a recipe that takes it seconds."""
    monkeypatch.setattr(cifar_fast.cli.check, "Recipe", functools.partial(Recipe, widths=widths))


@pytest.fixture
def narrow(monkeypatch, few_programs):
    with_widths(monkeypatch, *(width * 4 for width in NARROW))  # of which the command takes a quarter on a CPU
    monkeypatch.setitem(COPY_BYTES, "cpu", 2**20)


def check(folder, flags="--device cpu --dtype float32"):
    """The exit code, and what is written of each line under its name."""
    code = main(["check", *flags.split(), "--json", str(folder / "check.json")])
    report = json.loads((folder / "check.json").read_text())
    assert report["fine"] == (code == 0)
    return code, {line["name"]: line for line in report["lines"]}


def noes(lines):
    return [name for name, line in lines.items() if not line["ok"]]


@pytest.mark.slow  # a whole check
@without_a_gpu
def test_without_a_gpu_all_that_auto_needs_is_a_yes(tmp_path, narrow, capsys):
    code, lines = check(tmp_path, "--dtype float32")
    assert code == 0 and noes(lines) == WITHOUT_A_GPU
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in shown] == list(lines)
    for line in lines.values():
        assert f"{'yes' if line['ok'] else 'no'} " in shown.pop(0) and line["needed"] == line["ok"]
    assert all("auto does without" in lines[name]["text"] for name in noes(lines))
    assert lines["auto takes"]["text"].startswith("eager, channels_last, float32: no CUDA GPU is here")


@without_a_gpu
@pytest.mark.nightly
def test_as_a_person_types_it():
    """In a process of its own, which nobody has told to interpret kernels."""
    done = compiler("-m", "cifar_fast", "check")
    assert not done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if " no " in line[:40]] == [line for line in lines if "auto does without" in line]
    assert any(line.startswith("norm 16x32x32, forward ") for line in lines)
    assert lines[-1].startswith("auto takes ") and "eager, channels_last" in lines[-1]


def other_alpha(function):
    return lambda *tensors, alpha, **how: function(*tensors, alpha=alpha * 1.1, **how)


def no_labels(function):
    return lambda *tensors, labels, **how: function(*tensors, labels=labels * 0, **how)


def not_a_number(function):
    def given(*tensors, **how):
        y = function(*tensors, **how)
        return y + torch.full((), torch.nan, dtype=y.dtype)

    return given


def late(function):
    return lambda loss, correct, state: function(loss, correct, state._replace(schedule=state.schedule * 0.5))


@pytest.mark.slow  # a whole check
@pytest.mark.parametrize(
    ("kernel", "mistake", "named", "words"),
    [
        ("batch_norm_celu", other_alpha, NORMS, "more than twice as large"),
        (
            "batch_norm_celu",
            not_a_number,
            [name for name in NORMS if "backward" not in name],
            "more than twice as large",
        ),
        ("augment", no_labels, ["augmentation"], "labels: not what plain torch gives"),
        ("record", late, ["bookkeeping"], "lr: not what plain torch gives"),
    ],
)
def test_a_kernel_that_computes_something_else_is_a_no_and_exit_code_1(
    tmp_path, narrow, monkeypatch, kernel, mistake, named, words
):
    module = cifar_fast.kernels.record_step if kernel == "record" else sys.modules[f"cifar_fast.kernels.{kernel}"]
    monkeypatch.setattr(module, kernel, mistake(getattr(module, kernel)))
    code, lines = check(tmp_path)
    assert code == 1 and [name for name in noes(lines) if name in KERNELS] == named
    assert all(words in lines[name]["text"] for name in named)


@pytest.mark.slow  # a whole check
def test_a_launch_that_fails_is_a_no_with_the_first_cause_in_a_line_and_the_rest_goes_on(tmp_path, narrow, monkeypatch):
    def fails(*what):
        try:
            raise RuntimeError("an illegal memory access\nwas encountered")
        except RuntimeError as error:
            raise ValueError("a launch") from error

    monkeypatch.setattr(launch, "run", fails)
    code, lines = check(tmp_path)
    assert code == 1 and [name for name in noes(lines) if name not in WITHOUT_A_GPU] == KERNELS
    assert {lines[name]["text"] for name in KERNELS} == {"RuntimeError: an illegal memory access"}
    assert list(lines)[-len(STEP) :] == STEP


def test_without_triton_the_kernels_are_one_no_that_auto_does_without(tmp_path, narrow, monkeypatch):
    monkeypatch.setitem(sys.modules, "cifar_fast.kernels.launch", None)
    code, lines = check(tmp_path)
    assert code == 0 and not set(KERNELS) & set(lines)
    assert "its kernels cannot be imported" in lines["kernels"]["text"]


@pytest.mark.slow  # a whole check
def test_a_step_that_gives_other_bits_the_next_time_is_a_no(tmp_path, narrow, monkeypatch):
    reset = Eager.reset

    def keeps_weights(self, model):
        reset(self, self.model if hasattr(self, "optimizer") else model)

    monkeypatch.setattr(Eager, "reset", keeps_weights)
    code, lines = check(tmp_path)
    assert code == 1 and "the same bits again" in noes(lines)


@pytest.mark.slow  # a whole check
def test_a_step_past_the_tolerance_of_the_comparison_is_a_no_that_names_the_layer(tmp_path, narrow, monkeypatch):
    reset = Eager.reset

    def other_alpha(self, model):
        reset(self, model)
        if self.memory_format == torch.contiguous_format:
            self.model.seq[2].alpha = 0.08

    monkeypatch.setattr(Eager, "reset", other_alpha)
    code, lines = check(tmp_path)
    assert code == 1 and [name for name in noes(lines) if name not in WITHOUT_A_GPU] == ["against eager"]
    assert lines["against eager"]["text"].startswith("loss, of each image: ")


@pytest.mark.slow  # a whole check
def test_a_backend_that_cannot_be_set_up_is_a_no_and_the_next_one_is_checked(narrow, monkeypatch):
    def broken(*what, **how):
        raise RuntimeError("no compiler\nwas found")

    monkeypatch.setattr(torch, "compile", broken)
    plan = BackendConfig(("compiled", "eager"), torch.device("cpu"), torch.float32, torch.channels_last, "for a test")
    said = []
    found = Check(plan, plan, Recipe(widths=NARROW, batch_size=8), said.append)
    found.run()
    lines = {line.name: line for line in found.lines}
    failure = "the compiled backend cannot be set up here (RuntimeError: no compiler), eager instead"
    assert not found.fine and not lines["set-up"].ok and lines["set-up"].text == failure
    assert lines["time"].ok and lines["auto takes"].text.startswith("eager, channels_last, float32: for a test")
    assert [line for line in said if line in map(str, found.lines)] == list(map(str, found.lines))


def test_where_nothing_can_be_set_up_the_last_line_says_so(tmp_path, narrow, monkeypatch):
    def broken(self, *what):
        raise RuntimeError("no memory")

    monkeypatch.setattr(Eager, "__init__", broken)
    code, lines = check(tmp_path)
    assert code == 1 and lines["set-up"]["text"] == "RuntimeError: no memory"
    assert list(lines)[-1] == "auto takes" and "none can be set up here" in lines["auto takes"]["text"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--json none/check.json", "--json none/check.json: must name a file in a folder that is there"),
        ("--json /proc/check.json", "--json /proc/check.json: "),
        ("--batch-size 7", "--batch-size must be at least 8"),
        ("--device tpu", "unknown device 'tpu'"),
        ("--device cpu --dtype float16", "--dtype float16 needs a GPU"),
        ("--steps 3", "unrecognized arguments"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_before_the_work(capsys, flags, words):
    assert main(["check", *flags.split()]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and words in shown.err and shown.err.count("\n") == 1 and not shown.out


@pytest.mark.gpu
def test_on_a_gpu_every_line_is_a_yes_and_auto_takes_fused(tmp_path, monkeypatch):
    """As wide in the last pool as the comparison's own test, and for its reason."""
    with_widths(monkeypatch, 4, 8, 8, 8, 16, 32, 32, 256)
    monkeypatch.setitem(COPY_BYTES, "cuda", 2**20)
    code, lines = check(tmp_path, "")
    assert code == 0 and not noes(lines) and set(KERNELS) < set(lines)
    assert lines["auto takes"]["text"].startswith("fused, channels_last, float16: a GPU is here")
