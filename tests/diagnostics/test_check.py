"""The check of a machine: yes for each part that works, no with the reason for each part that is broken."""

import functools
import json
from pathlib import Path

import pytest
import torch

import cifar_fast.cli.check
import cifar_fast.diagnostics.kernel_cases as kernel_cases
from cifar_fast import Recipe
from cifar_fast.backends.eager import Eager
from cifar_fast.backends.select import BackendConfig
from cifar_fast.cli.main import main
from cifar_fast.diagnostics.check import Check
from cifar_fast.diagnostics.roofline import COPY_BYTES
from cifar_fast.kernels import launch
from cifar_fast.utils.progress import lines_to
from tests.helpers import NARROW, compiler

ROOT = Path(__file__).parents[2]
without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is here")
NORMS = [
    f"norm {shape}, {direction}"
    for shape in ("4x32x32", "8x32x32, pool")
    for direction in ("forward", "backward", "inference")
]
KERNELS = ["augmentation", *NORMS, "loss and record"]
STEP = ["set-up", "memory", "the same bits again", "time", "24 epochs", "against eager", "auto selects"]
WITHOUT_A_GPU = ["NVIDIA driver", "kernels compile"]


def with_widths(monkeypatch, *widths):
    """Give the command a recipe that takes seconds."""
    monkeypatch.setattr(cifar_fast.cli.check, "Recipe", functools.partial(Recipe, widths=widths))


@pytest.fixture
def narrow(monkeypatch, few_programs):
    with_widths(monkeypatch, *(width * 4 for width in NARROW))  # the command divides them by four on a CPU
    monkeypatch.setitem(COPY_BYTES, "cpu", 2**20)


def check(folder, flags="--device cpu --dtype float32"):
    """Return the exit code, and the written results by name."""
    code = main(["check", *flags.split(), "--json", str(folder / "check.json")])
    report = json.loads((folder / "check.json").read_text())
    assert report["passed"] == (code == 0)
    return code, {result["name"]: result for result in report["results"]}


def noes(lines):
    return [name for name, line in lines.items() if not line["ok"]]


@pytest.mark.slow  # a whole check
@without_a_gpu
def test_every_needed_part_passes_without_a_gpu(tmp_path, narrow, capsys):
    code, lines = check(tmp_path, "--dtype float32")
    assert code == 0 and noes(lines) == WITHOUT_A_GPU
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in shown] == list(lines)
    for line in lines.values():
        assert f"{'yes' if line['ok'] else 'no'} " in shown.pop(0) and line["needed"] == line["ok"]
    assert all("auto does without" in lines[name]["text"] for name in noes(lines))
    assert lines["auto selects"]["text"].startswith("eager, channels_last, float32: no CUDA GPU is here")
    assert lines["network"]["text"].startswith("widths 4 8 8 8 16 32 32 32 in place of 16 32 32 32 64 128 128 128, ")
    assert lines["24 epochs"]["text"].startswith("about ") and "ms/step of 64 images" in lines["24 epochs"]["text"]
    assert all(" allowed" in lines[name]["text"] for name in NORMS)


@without_a_gpu
@pytest.mark.nightly
def test_command_without_any_environment_variable():
    """Run in a new process without TRITON_INTERPRET."""
    done = compiler("-m", "cifar_fast", "check")
    assert not done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if " no " in line[:40]] == [line for line in lines if "auto does without" in line]
    assert any(line.startswith("norm 16x32x32, forward ") for line in lines)
    assert lines[-1].startswith("auto selects ") and "eager, channels_last" in lines[-1]


def other_alpha(function):
    return lambda *tensors, alpha, **how: function(*tensors, alpha=alpha * 1.1, **how)


def no_labels(function):
    return lambda *tensors, labels, **how: function(*tensors, labels=labels * 0, **how)


def not_a_number(function):
    def given(*tensors, **how):
        y = function(*tensors, **how)
        return y + torch.full((), torch.nan, dtype=y.dtype)

    return given


def wrong_schedule(function):
    return lambda loss, correct, state: function(loss, correct, state._replace(schedule=state.schedule * 0.5))


@pytest.mark.slow  # a whole check
@pytest.mark.parametrize(
    ("kernel", "mistake", "named", "words"),
    [
        ("batch_norm_act", other_alpha, NORMS, "more than 2 times eager's plus 4 in the last place"),
        (
            "batch_norm_act",
            not_a_number,
            [name for name in NORMS if "backward" not in name],
            "y is finite where the exact result is not, or not finite where it is",
        ),
        ("augment", no_labels, ["augmentation"], "labels differs from plain torch"),
        ("record", wrong_schedule, ["loss and record"], "lr differs from plain torch"),
    ],
)
def test_wrong_kernel_fails(tmp_path, narrow, monkeypatch, kernel, mistake, named, words):
    monkeypatch.setattr(kernel_cases, kernel, mistake(getattr(kernel_cases, kernel)))
    code, lines = check(tmp_path)
    assert code == 1 and [name for name in noes(lines) if name in KERNELS] == named
    assert all(words in lines[name]["text"] for name in named)


@pytest.mark.slow  # a whole check
def test_failed_launch_shows_its_first_cause_and_the_check_continues(tmp_path, narrow, monkeypatch):
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


def test_kernels_that_cannot_run_are_skipped_with_the_reason(tmp_path, narrow, monkeypatch):
    monkeypatch.setattr("cifar_fast.diagnostics.check.fused_unavailable_reason", lambda device: "Triton is not here")
    code, lines = check(tmp_path)
    assert code == 0 and not set(KERNELS) & set(lines)
    assert "Triton is not here" in lines["kernels"]["text"]


@pytest.mark.slow  # a whole check
def test_step_that_is_not_reproducible_fails(tmp_path, narrow, monkeypatch):
    reset = Eager.reset

    def keeps_weights(self, model):
        reset(self, self.model if hasattr(self, "optimizer") else model)

    monkeypatch.setattr(Eager, "reset", keeps_weights)
    code, lines = check(tmp_path)
    assert code == 1 and "the same bits again" in noes(lines)


@pytest.mark.slow  # a whole check
def test_step_past_the_tolerance_fails_and_names_the_layer(tmp_path, narrow, monkeypatch):
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
def test_backend_that_cannot_be_set_up_fails_and_the_next_one_is_checked(narrow, monkeypatch):
    def broken(*what, **how):
        raise RuntimeError("no compiler\nwas found")

    monkeypatch.setattr(torch, "compile", broken)
    config = BackendConfig(("compiled", "eager"), torch.device("cpu"), torch.float32, torch.channels_last, "for a test")
    logged = []
    found = Check(config, config, Recipe(widths=NARROW, batch_size=8), Recipe(widths=NARROW))
    with lines_to(logged.append):
        found.run()
    lines = {result.name: result for result in found.results}
    failure = "the compiled backend cannot be set up here (RuntimeError: no compiler), so eager is used instead"
    assert not found.passed and not lines["set-up"].ok and lines["set-up"].text == failure
    assert lines["time"].ok and lines["auto selects"].text.startswith("eager, channels_last, float32: for a test")
    assert [line for line in logged if line in map(str, found.results)] == list(map(str, found.results))


def test_check_without_any_working_backend_says_so(tmp_path, narrow, monkeypatch):
    def broken(self, *what):
        raise RuntimeError("no memory")

    monkeypatch.setattr(Eager, "__init__", broken)
    code, lines = check(tmp_path)
    assert code == 1 and lines["set-up"]["text"] == "RuntimeError: no memory"
    assert list(lines)[-1] == "auto selects" and "can be set up here" in lines["auto selects"]["text"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--json none/check.json", "--json none/check.json: must name a file in an existing folder"),
        ("--json /proc/check.json", "--json /proc/check.json: "),
        ("--batch-size 7", "--batch-size must be at least 8"),
        ("--device tpu", "unknown device 'tpu'"),
        ("--device cpu --dtype float16", "--dtype float16 needs a GPU"),
        ("--steps 3", "unrecognized arguments"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, flags, words):
    assert main(["check", *flags.split()]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and words in shown.err and shown.err.count("\n") == 1 and not shown.out


@pytest.mark.gpu
def test_every_part_passes_on_a_gpu_and_auto_selects_fused(tmp_path, monkeypatch):
    """Use the width of the last pool that test_compare.py needs, for the same reason."""
    with_widths(monkeypatch, 4, 8, 8, 8, 16, 32, 32, 256)
    monkeypatch.setitem(COPY_BYTES, "cuda", 2**20)
    code, lines = check(tmp_path, "")
    assert code == 0 and not noes(lines) and set(KERNELS) < set(lines)
    assert lines["auto selects"]["text"].startswith("fused, channels_last, float16: a GPU is here")
