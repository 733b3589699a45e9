"""The comparison in lockstep: it passes for equal computations and fails for each of several small mistakes."""

import dataclasses
import json
import math

import pytest

import cifar_fast.backends.fused
import cifar_fast.diagnostics.compare
from cifar_fast import InputError, Recipe, load_dataset
from cifar_fast.backends.fused import Fused
from cifar_fast.backends.select import resolve_backend
from cifar_fast.cli.compare import main
from cifar_fast.data.synthetic import textures
from cifar_fast.diagnostics.compare import TensorDiff, failures
from tests.helpers import save_npz, small_dataset

NARROW = "--widths 4 8 8 8 16 32 32 32 --device cpu"
LAYERS = ["loss", *(f"{kind} {i}" for i in range(1, 9) for kind in ("conv", "norm")), "linear 1"]


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """Save 64 of the embedded textures. Noise in float16 makes the features of a narrow model tie in a max-pool, and
    chance decides which pixel it picks.
    """
    textures = load_dataset("synthetic")
    some = dict(train_images=textures.train_images[:64], train_labels=textures.train_labels[:64])
    return save_npz(
        tmp_path_factory.mktemp("data") / "small.npz",
        textures,
        **some,
        test_images=textures.test_images[:6],
        test_labels=textures.test_labels[:6],
    )


def compare(npz, flags):
    return main(f"--dataset npz --data-dir {npz} {NARROW} --batch-size 8 {flags}".split())


@pytest.mark.nightly  # a compiler
@pytest.mark.parametrize(("dtype", "batch_size"), [("float32", 8), ("float16", 32)])
def test_fused_matches_eager_in_every_layer(tmp_path, npz, few_programs, capsys, dtype, batch_size):
    """Compile, with interpreted kernels. The third batch of 32 of the 64 images is in the second epoch."""
    file = tmp_path / "report.json"
    assert (
        compare(
            npz, f"--backend fused --against eager --steps 3 --dtype {dtype} --json {file} --batch-size {batch_size}"
        )
        == 0
    )
    report = json.loads(file.read_text())
    assert report["within"] and report["dtype"] == dtype and report["backend"] == "fused"
    assert report["higher_precision"] == {"float32": "float64", "float16": "float32"}[dtype]
    rows = report["rows"]
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows) and rows[-1]["step"] == 3
    for step in range(1, 4):
        of_step = [row for row in rows if row["step"] == step]
        assert list(dict.fromkeys(row["layer"] for row in of_step)) == LAYERS
        assert len(of_step) == 1 + 8 * 2 + 8 * 6 + 2
    assert all(0 < row["eager_difference"] < 1 for row in rows if row["layer"] == "loss")
    assert any(row["difference"] > 0 for row in rows), "two backends that agree to the last bit are one backend"
    shown = capsys.readouterr().out
    assert "step 3" in shown and "67 of 67 tensors are within 3 times" in shown


@pytest.mark.slow  # the interpreter
@pytest.mark.parametrize("seed", range(3))
def test_fused_matches_eager_in_bfloat16(uncompiled, few_programs, capsys, seed):
    flags = f"--dataset synthetic {NARROW} --batch-size 8 --backend fused --dtype bfloat16 --steps 1 --seed {seed}"
    assert main(flags.split()) == 0
    assert "67 of 67 tensors are within 3 times" in capsys.readouterr().out


def alpha(patch):
    patch.setattr(
        cifar_fast.backends.fused,
        "fuse",
        with_change(cifar_fast.backends.fused.fuse, lambda layer: setattr(layer, "alpha", 0.08)),
    )


def eps(patch):
    patch.setattr(
        cifar_fast.backends.fused,
        "fuse",
        with_change(cifar_fast.backends.fused.fuse, lambda layer: setattr(layer, "eps", 1e-4)),
    )


def statistics_momentum(patch):
    patch.setattr(
        cifar_fast.backends.fused,
        "fuse",
        with_change(cifar_fast.backends.fused.fuse, lambda layer: setattr(layer, "momentum", 0.11)),
    )


def with_change(fuse, change):
    def changed(model, **options):
        fused = fuse(model, **options)
        change(fused.seq[5])
        return fused

    return changed


def in_the_optimizer(**changes):
    def mistake(patch):
        whole = cifar_fast.backends.fused.make_optimizer

        def broken(*model, **how):
            optimizer = whole(*model, **how)
            optimizer.param_groups[0].update(changes)
            return optimizer

        patch.setattr(cifar_fast.backends.fused, "make_optimizer", broken)

    return mistake


def rate(patch):
    whole = Fused.__init__

    def broken(self, *how):
        whole(self, *how)
        self.state.schedule.mul_(1.001)

    patch.setattr(Fused, "__init__", broken)


def draws(patch):
    patch.setattr(Fused, "train_epoch", with_other_draws(Fused.train_epoch))


def with_other_draws(train_epoch):
    def other(self, draws):
        tensor = draws.tensor.clone()
        tensor[0] = tensor[0].roll(1)
        return train_epoch(self, type(draws)(tensor))

    return other


MISTAKES = {
    "alpha": (alpha, "norm 2"),
    "eps": (eps, "norm 2"),
    "momentum of the statistics": (statistics_momentum, "norm 2, statistics"),
    "weight decay": (in_the_optimizer(weight_decay=5e-4 * 8 * 1.1), "weight"),
    "momentum": (in_the_optimizer(momentum=0.91), "weight"),
    "no nesterov": (in_the_optimizer(nesterov=False), "weight"),
    "learning rate": (rate, "weight"),
    "draws": (draws, "loss"),
}


@pytest.mark.parametrize(
    "mistake", [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("eps", "draws"))) for name in MISTAKES]
)
def test_small_mistake_fails(npz, uncompiled, few_programs, monkeypatch, capsys, mistake):
    make, named = MISTAKES[mistake]
    make(monkeypatch)
    steps = 3 if "momentum" in mistake else 1  # there is no momentum at the first step
    assert compare(npz, f"--steps {steps} --dtype float32") == 1
    verdict = capsys.readouterr().out.split("\n\n")[-1]
    assert any(
        line.startswith(named) or named in line
        for line in verdict.splitlines()
        if line.endswith("eager's own difference")
    )


def test_backends_with_two_dtypes_are_refused(small):
    configs = [resolve_backend("eager", "cpu", dtype) for dtype in ("float32", "bfloat16")]
    with pytest.raises(InputError, match="not on cpu in float32 against cpu in bfloat16"):
        next(cifar_fast.diagnostics.compare.compare(Recipe(batch_size=8), small, *configs))


def test_eager_equals_itself(npz, capsys, tmp_path):
    assert compare(npz, f"--backend eager --steps 2 --dtype float32 --drift --json {tmp_path}/r.json") == 0
    assert all(row["difference"] == 0 for row in json.loads((tmp_path / "r.json").read_text())["rows"])


def rows(*ratios, layer="conv 1", quantity="gradient of weight"):
    return [TensorDiff(step + 1, layer, quantity, 0.1, 0.1, 0.1, 0.1, ratio) for step, ratio in enumerate(ratios)]


def test_only_gradients_may_exceed_the_tolerance_at_a_single_step():
    assert not failures(rows(1, 50, 1, 1), 3)
    assert failures(rows(1, 50, 50, 50), 3) == [("conv 1", "gradient of weight", 50)]
    assert failures(rows(1, 50, 1, 1, layer="norm 1", quantity="statistics, mean"), 3)
    assert failures(rows(1, 50, 1, 1, layer="loss", quantity="of each image"), 3)
    assert failures(rows(1, math.nan, 1, 1), 3) and failures(rows(1, math.inf, 1, 1), 3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--steps 0", "--steps must be at least 1"),
        ("--seed -1", "--seed must lie between 0 and 2^63"),
        ("--tolerance 0", "--tolerance must be above 0"),
        ("--against jit", "invalid choice: 'jit'"),
        ("--batch-size 97 --backend eager", "64 training images are fewer than one batch of 97"),
        ("--runs 2", "unrecognized arguments"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(npz, capsys, flags, words):
    assert compare(npz, flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1


@pytest.mark.parametrize("place", ["file/r.json", "none/r.json", "folder", "/proc/r.json"])
def test_unwritable_report_is_an_error_before_the_work(npz, capsys, tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    assert compare(npz, f"--backend eager --steps 1 --dtype float32 --json {tmp_path / place}") == 2
    shown = capsys.readouterr()
    assert f"--json {tmp_path / place}" in shown.err and shown.err.count("\n") == 1
    assert not shown.out


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "dtype", "classes"),
    [
        ("fused", "float16", 10),
        pytest.param("fused", "bfloat16", 10, marks=pytest.mark.slow),
        pytest.param("fused", "float32", 10, marks=pytest.mark.slow),
        pytest.param("fused", "float16", 2, marks=pytest.mark.slow),
        pytest.param("fused", "float16", 100, marks=pytest.mark.slow),
        pytest.param("compiled", "float16", 10, marks=pytest.mark.slow),
        pytest.param("compiled", "bfloat16", 10, marks=pytest.mark.slow),
        pytest.param("compiled", "float32", 10, marks=pytest.mark.slow),
    ],
)
def test_compiled_and_fused_match_eager_on_a_gpu(tmp_path, backend, dtype, classes):
    """Train two epochs of two batches and a rest.

    The last pool has 16,384 windows. So few of a thousand would tie that chance decides whether a gradient shows one,
    and machines would differ.
    """
    given = small_dataset(150, 7, classes)
    if classes <= 10:  # textures have fewer ties than noise
        images, labels = textures(150, 0)
        given = dataclasses.replace(given, train_images=images, train_labels=labels % classes)
    npz = save_npz(tmp_path / "small.npz", given)
    flags = f"--dataset npz --data-dir {npz} --widths 4 8 8 8 16 32 32 256 --device cuda --batch-size 64 --steps 4"
    assert main(f"{flags} --dtype {dtype} --backend {backend}".split()) == 0


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_fused_matches_eager_on_a_gpu_at_full_width(tmp_path, dtype):
    dataset = save_npz(tmp_path / "small.npz", small_dataset(train=1024, test=6, classes=10))
    flags = f"--dataset npz --data-dir {dataset} --device cuda --batch-size 256 --steps 4 --dtype {dtype}"
    assert main(flags.split()) == 0
