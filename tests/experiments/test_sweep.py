"""A sweep trains its variants in turn, resumes after an interruption, and refuses wrong specifications."""

import dataclasses
import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cifar_fast import InputError, Recipe, Sweep, fit, fit_sweep
from cifar_fast.backends.eager import Eager
from cifar_fast.cli.main import main
from cifar_fast.utils.progress import lines_to
from tests.helpers import HOW, contents, diverge, save_npz, small_dataset

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_curves")]  # whole trainings

SPEC = """
dataset = "npz"
data_dir = "{data}"
output = "{output}"
runs = 2
seed = 3
backend = "eager"
device = "cpu"
dtype = "float32"
[recipe]
epochs = 2
batch_size = 16
widths = [4, 8]
[variants.baseline]
[variants.momentum]
momentum = [0.8, 0.85]
"""
BASE = Recipe(epochs=2, batch_size=16, widths=(4, 8))
RECIPES = {
    "baseline": BASE,
    "momentum-0.8": Recipe(**vars(BASE) | {"momentum": 0.8}),
    "momentum-0.85": Recipe(**vars(BASE) | {"momentum": 0.85}),
}
SEEDED = HOW | {"seed": 3}
NO_MEMORY = (
    "the eager backend cannot be set up here (out of memory for the weights of the network); choose smaller widths, "
    "or free memory"
)


@pytest.fixture
def spec(tmp_path, npz):
    """A function that writes the specification with ``changes``, pairs of old and new text, and returns its path."""

    def write(*changes):
        text = SPEC.format(data=npz, output=tmp_path / "sweep")
        for before, after in changes:
            assert before in text
            text = text.replace(before, after)
        (tmp_path / "spec.toml").write_text(text)
        return str(tmp_path / "spec.toml")

    return write


@pytest.fixture(scope="module")
def single_trainings(tmp_path_factory, tiny, no_curves):
    """The contents of the results of each variant, trained by itself."""
    folder = tmp_path_factory.mktemp("single")
    for name, recipe in RECIPES.items():
        fit(recipe, tiny, runs=2, output=folder / name, **SEEDED)
    return {name: contents(folder / name, "data_source") for name in RECIPES}


def sweep_contents(folder):
    """Return the contents of the results of each variant in the sweep's ``folder``."""
    return {name: contents(folder / name, "data_source") for name in RECIPES}


def epochs_in(lines):
    """Return the variant of each epoch that the log ``lines`` report."""
    return [line.split(":")[0] for line in lines if ": epoch " in line]


def file_bytes(folder):
    """Return the bytes of each file below ``folder``, by its path."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_variants_take_turns_and_equal_single_trainings(tmp_path, spec, single_trainings, capfd):
    assert main(["sweep", spec()]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert epochs_in(lines) == [name for _ in range(2) for name in RECIPES for _ in range(2)]
    assert sweep_contents(tmp_path / "sweep") == single_trainings
    assert lines[-1].endswith(f"to see it: cifar-fast report {tmp_path}/sweep")


@pytest.mark.parametrize("epochs", [1, 5, 9])  # in the first variant, in the third, in the second round
def test_stopped_sweep_resumes_with_the_same_bits(tmp_path, spec, single_trainings, capfd, monkeypatch, epochs):
    lines = []

    def stop(line):
        lines.append(line)
        if len(epochs_in(lines)) == epochs:
            raise KeyboardInterrupt

    with lines_to(stop):
        assert main(["sweep", spec()]) == 130
    assert capfd.readouterr().err == f"interrupted; to resume: cifar-fast sweep {tmp_path}/spec.toml\n"
    assert main(["sweep", spec()]) == 0
    resumed = epochs_in(capfd.readouterr().out.splitlines())
    assert len(resumed) == 12 - epochs + 1, "only the epoch without a checkpoint is trained twice"
    assert sweep_contents(tmp_path / "sweep") == single_trainings


@pytest.mark.slow  # starts a process
def test_killed_sweep_resumes_with_the_same_bits(tmp_path, spec, single_trainings):
    command = [sys.executable, "-m", "cifar_fast", "sweep", spec()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("momentum-0.8: epoch"):
            process.kill()
            break
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert main(["sweep", spec()]) == 0
    assert sweep_contents(tmp_path / "sweep") == single_trainings


def test_finished_sweep_is_not_trained_again(tmp_path, spec, capfd):
    assert main(["sweep", spec()]) == 0
    before, made = file_bytes(tmp_path / "sweep"), ("summary.json", "curves.png", "model.pt", "metrics.jsonl")
    inodes = [(tmp_path / "sweep" / name / file).stat().st_ino for name in RECIPES for file in made]
    capfd.readouterr()
    assert main(["sweep", spec()]) == 0
    assert epochs_in(capfd.readouterr().out.splitlines()) == []
    assert file_bytes(tmp_path / "sweep") == before
    again = [(tmp_path / "sweep" / name / file).stat().st_ino for name in RECIPES for file in made]
    assert again == inodes, "files of a variant without a new run are not written again"


def test_variants_that_begin_after_a_resume_state_the_reasons_of_auto(tmp_path, spec):
    changes = [("runs = 2", "runs = 1"), ('dtype = "float32"', ""), ("[0.8, 0.85]", "0.8")]
    own = ("[variants.momentum]", '[variants.own]\nmemory_format = "channels_last"\n[variants.momentum]')

    def stop(line):
        if epochs_in([line]):
            raise KeyboardInterrupt

    def reasons():
        summaries = [json.loads(path.read_text()) for path in sorted((tmp_path / "sweep").glob("*/summary.json"))]
        return [summary["auto"] for summary in summaries]

    assert main(["sweep", spec(*changes, own)]) == 0
    whole = reasons()
    shutil.rmtree(tmp_path / "sweep")
    with lines_to(stop):
        assert main(["sweep", spec(*changes, own)]) == 130
    assert main(["sweep", spec(*changes, own)]) == 0
    assert reasons() == whole and len(whole) == 3 and all("bfloat16" in found[0] for found in whole)


def test_later_sweep_may_add_runs_and_variants(tmp_path, spec, single_trainings, capfd):
    assert main(["sweep", spec(("runs = 2", "runs = 1"), ("[0.8, 0.85]", "0.9"))]) == 0
    assert main(["sweep", spec(("runs = 2", "runs = 1"), ("[0.8, 0.85]", "0.9\n[variants.other]"))]) == 0
    capfd.readouterr()
    assert main(["sweep", spec(("[0.8, 0.85]", "0.9\n[variants.other]"))]) == 0
    assert epochs_in(capfd.readouterr().out.splitlines()) == [
        name for name in ("baseline", "momentum", "other") for _ in range(2)
    ]
    assert contents(tmp_path / "sweep/baseline", "data_source") == single_trainings["baseline"]
    assert list(json.loads((tmp_path / "sweep/sweep.json").read_text())["variants"]) == [
        "baseline",
        "momentum",
        "other",
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("epochs = 2", "epochs = 3"), "sweep/baseline: epochs was 2, not 3"),
        (("seed = 3", "seed = 4"), "sweep/baseline: seed was 3, not 4"),
        (("seed = 3", "order_seed = 4"), "sweep/baseline: seed was 3, not 0"),
        (("runs = 2", "runs = 1"), "sweep/baseline: runs was 2, and may grow, but not shrink to 1"),
        (('"eager"', '"compiled"'), "sweep/baseline: backend was eager, not compiled"),
        (("[variants.momentum]", "[variants.momentum]\nflip = false"), "sweep/momentum-0.8: flip was True, not False"),
        (("0.8, 0.85", "0.8, 0.7"), "the variant momentum-0.85 was trained there, but is no longer part of the sweep"),
        (('"npz"', '"folder"'), "sweep/baseline: dataset was npz, not folder"),
        (("tiny.npz", "other.npz"), "is not the data set that was trained on"),
    ],
)
def test_changed_specification_is_refused_and_changes_nothing(tmp_path_factory, finished, npz, capfd, change, words):
    folder, text = finished
    save_npz(npz.with_name("other.npz"), small_dataset(seed=1))
    assert change[0] in text
    (path := tmp_path_factory.mktemp("changed") / "spec.toml").write_text(text.replace(*change))
    before = file_bytes(folder)
    capfd.readouterr()
    assert main(["sweep", str(path)]) == 2
    output, error = capfd.readouterr()
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert epochs_in(output.splitlines()) == [] and file_bytes(folder) == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory, npz, no_curves):
    """The folder of a finished sweep, and its specification."""
    folder = tmp_path_factory.mktemp("finished") / "sweep"
    text = SPEC.format(data=npz, output=folder)
    (path := folder.parent / "spec.toml").write_text(text)
    assert main(["sweep", str(path)]) == 0
    return folder, text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("runs = 2", "run = 2"), "there is no key 'run' at the top; did you mean runs"),
        (("epochs = 2", "epoch = 2"), "there is no key 'epoch' in [recipe]; did you mean epochs?"),
        (("momentum = [", "momentun = ["), "no key 'momentun' in [variants.momentum]; did you mean momentum"),
        (("runs = 2", "zzz = 2"), "there is no key 'zzz' at the top; there are variants, output, dataset, "),
        (("runs = 2", 'runs = "2"'), "runs must be a whole number, not '2'"),
        (("runs = 2", "runs = true"), "runs must be a whole number, not True"),
        (("runs = 2", "runs = 0"), "runs must be at least 1, not 0"),
        (('"npz"', '"mnist"'), "unknown data set 'mnist'"),
        (('"eager"', "1"), "backend must be text, not 1"),
        (('"eager"', '"jit"'), "unknown backend 'jit'"),
        (("[recipe]", "[also_test]\na = 1\n[recipe]"), "also_test.a must be text, not 1"),
        (("epochs = 2", "epochs = 0"), "recipe: epochs must be at least 1, not 0"),
        (("0.85", "1.5"), "variants.momentum: momentum must lie between 0 and 1, not 1.5"),
        (("0.85", "0.8"), "variants.momentum: there are two variants momentum-0.8"),
        (("[0.8, 0.85]", "[]"), "variants.momentum: momentum is an empty list"),
        (("variants.momentum", 'variants."a/b"'), "'a/b-0.8' cannot name a folder"),
        (("[variants.momentum]", "[variants]"), "variants.momentum must be a table, not [0.8, 0.85]"),
        (("runs = 2", "runs = "), "a sweep must be TOML: Invalid value (at line"),
    ],
)
def test_wrong_specification_is_refused_and_writes_nothing(tmp_path, spec, capfd, change, words):
    path = spec(change)
    if change[0] == "[variants.momentum]":
        path = spec(change, ("[variants.baseline]", ""))
    for flags in ([], ["--dry-run"]):
        assert main(["sweep", path, *flags]) == 2
        output, error = capfd.readouterr()
        assert error.startswith("error: ") and words in error and error.count("\n") == 1
        assert output == "" and not (tmp_path / "sweep").exists()


def test_missing_specification_and_missing_variants_are_refused(tmp_path, capfd):
    (tmp_path / "spec.toml").write_text("runs = 2\n")
    assert main(["sweep", f"{tmp_path}/spec.toml"]) == 2
    assert "states no variant; add a table [variants.NAME]" in capfd.readouterr().err
    assert main(["sweep", f"{tmp_path}/none.toml"]) == 2
    assert capfd.readouterr().err == f"error: cannot read the sweep {tmp_path}/none.toml: No such file or directory\n"


def test_no_file_of_a_sweep_holds_the_token_of_a_url(tmp_path, spec, capfd):
    path = Path(spec())
    path.write_text('data_url = "https://me:s3cret@example.org/a.gz?sig=s3cret"\n' + path.read_text())
    assert main(["sweep", str(path)]) == 0
    found = json.loads((tmp_path / "sweep/sweep.json").read_text())["data_url"]
    assert found == "https://example.org/a.gz?..."
    assert not [path for path in tmp_path.rglob("*.json*") if "s3cret" in path.read_text()]
    assert "s3cret" not in "".join(capfd.readouterr())


def test_each_combination_of_listed_values_is_a_variant():
    text = """
    [variants.wide]
    widths = [[4, 8], [8, 16]]
    flip = [true, false]
    lr_knots = [0, 1, 2]
    weight_decay = [5e-4]
    """
    sweep = Sweep.from_toml(text, output="runs/wide")
    expected = {
        f"wide-{','.join(map(str, widths))}-{str(flip).lower()}-0.0005": Recipe(
            widths=widths, flip=flip, lr_knots=(0, 1, 2)
        )
        for widths in ((4, 8), (8, 16))
        for flip in (True, False)
    }
    assert sweep.variants == expected and sweep.output == "runs/wide"


def test_dry_run_lists_variants_and_the_state_of_each_run(tmp_path, spec, capfd, monkeypatch):
    assert main(["sweep", spec(), "--dry-run"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == f"3 variants, 2 runs each, on npz, to {tmp_path}/sweep"
    assert (
        lines[2] == "momentum-0.8: eager, contiguous_format, float32; epochs 2, batch_size 16, widths 4 8, momentum 0.8"
    )
    runs = [f"run {run} of {name}, seed {run + 3}: to do" for run in (0, 1) for name in RECIPES]
    assert lines[4:] == runs and not (tmp_path / "sweep").exists()

    def stop(line):
        if line.startswith("momentum-0.8: epoch  2"):
            raise KeyboardInterrupt

    with lines_to(stop):
        assert main(["sweep", spec()]) == 130
    before = file_bytes(tmp_path / "sweep")
    capfd.readouterr()
    assert main(["sweep", spec(), "--dry-run"]) == 0
    states = [line.partition(": ")[2] for line in capfd.readouterr().out.splitlines()[4:]]
    assert states == ["has ended", "will resume after epoch 1", "to do", "to do", "to do", "to do"]
    assert file_bytes(tmp_path / "sweep") == before


def test_new_variants_use_the_backend_and_threads_of_earlier_ones(tmp_path, spec):
    named = ('"eager"', '"eager"\nmemory_format = "contiguous_format"')  # auto would choose channels_last
    without_momentum = ("[variants.momentum]\nmomentum = [0.8, 0.85]", "")
    assert main(["sweep", spec(named, without_momentum)]) == 0
    path = tmp_path / "sweep/baseline/training.json"
    training = json.loads(path.read_text())
    training["config"]["threads"] += 1
    path.write_text(json.dumps(training))
    assert main(["sweep", spec(('"eager"', '"auto"'))]) == 0
    summaries = [json.loads((tmp_path / "sweep" / name / "summary.json").read_text()) for name in RECIPES]
    used = [(summary["backend"], summary["memory_format"]) for summary in summaries]
    assert used == [("eager", "contiguous_format")] * 3
    assert [summary["environment"]["threads"] for summary in summaries[1:]] == [training["config"]["threads"]] * 2


def test_other_seeds_and_variants_are_trained_beside_a_diverged_run(
    tmp_path, spec, single_trainings, monkeypatch, capfd
):
    wild = "0.8\nlr_values = [1e30, 1e30, 0]\n[variants.last]"
    path = spec(("[0.8, 0.85]", wild))
    for _ in range(2):  # the second sweep trains nothing
        assert main(["sweep", path]) == 1
        output, error = capfd.readouterr()
        lines = [f"error: momentum: run {run} of 2, seed {run + 3}: the loss is not finite" for run in (0, 1)]
        assert all(map(str.startswith, error.splitlines(), lines)) and error.count("\n") == 2
    assert "epoch  1" not in output
    assert contents(tmp_path / "sweep/baseline", "data_source") == single_trainings["baseline"]
    assert len(json.loads((tmp_path / "sweep/last/summary.json").read_text())["runs"]) == 2
    assert main(["sweep", path, "--dry-run"]) == 0
    assert "run 1 of momentum, seed 4: diverged at step " in capfd.readouterr().out
    assert main(["report", str(tmp_path / "sweep")]) == 0
    output = capfd.readouterr().out
    assert "| 0 of 2 |" in output and "Warning: momentum: 0 of 2 runs have finished; diverged: seed 3 at step" in output


def test_variant_with_a_diverged_seed_has_its_other_seeds(tmp_path, npz, tiny, monkeypatch):
    diverge(monkeypatch, 3)
    options = {name: value for name, value in SEEDED.items() if name != "log"}
    sweep = Sweep({"a": BASE}, str(tmp_path / "sweep"), "npz", str(npz), runs=2, **options)
    result = fit_sweep(sweep, log=None)["a"]
    assert ([run.seed for run in result.runs], [run.seed for run in result.diverged]) == ([4], [3])
    monkeypatch.undo()
    assert result.runs[0].test_accuracy == fit(BASE, tiny, **SEEDED | {"seed": 4}).runs[0].test_accuracy


def test_variant_that_fails_costs_no_other_variant(tmp_path, spec, single_trainings, monkeypatch, capfd):
    reset = Eager.reset

    def fail(backend, model):
        if backend.recipe.momentum == 0.8:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        reset(backend, model)

    with monkeypatch.context() as patch:
        patch.setattr(Eager, "reset", fail)
        assert main(["sweep", spec()]) == 1
    assert capfd.readouterr().err == f"error: momentum-0.8: {NO_MEMORY}\n"
    assert contents(tmp_path / "sweep/momentum-0.85", "data_source") == single_trainings["momentum-0.85"]
    assert main(["sweep", spec()]) == 0
    assert sweep_contents(tmp_path / "sweep") == single_trainings


def test_sweep_of_which_each_run_fails_is_an_error(spec, monkeypatch, capfd):
    def fail(*arguments):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(Eager, "reset", fail)
    assert main(["sweep", spec()]) == 2
    assert capfd.readouterr().err == f"error: {NO_MEMORY}\n"


def test_compiled_backend_is_built_once_for_each_variant(tmp_path, tiny, spec, uncompiled, capfd):
    assert main(["sweep", spec(('"eager"', '"compiled"'))]) == 0
    lines = capfd.readouterr().out.splitlines()
    built = [line.split(":")[0] for line in lines if "setting up the compiled backend" in line]
    assert built == list(RECIPES)
    recipe = RECIPES["momentum-0.8"]
    single = fit(recipe, tiny, runs=2, **SEEDED | {"backend": "compiled"})
    summary = json.loads((tmp_path / "sweep/momentum-0.8/summary.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "sweep/momentum-0.8/metrics.jsonl").read_text().splitlines()]
    assert [row["train_loss"] for row in rows] == [row.train_loss for row in single.rows]
    assert summary["backend"] == "compiled"


def test_interrupt_before_the_first_epoch_leaves_no_folder(tmp_path, spec, monkeypatch):
    def stop(line):
        if line.startswith("baseline: torch"):
            raise KeyboardInterrupt

    with lines_to(stop):
        assert main(["sweep", spec(("/sweep", "/a/sweep"))]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["spec.toml"]


def test_second_sweep_in_the_same_folder_is_refused(spec, capfd, monkeypatch):
    codes = []

    def start_second(line):
        if line.startswith("baseline: epoch  1") and not codes:
            codes.append(None)  # the second sweep logs too
            codes.append(main(["sweep", path]))

    path = spec()
    with lines_to(start_second):
        assert main(["sweep", path]) == 0 and codes == [None, 2]
    error = capfd.readouterr().err
    assert "another sweep is at work there" in error and error.count("\n") == 1


class Terminal(io.StringIO):
    """A stream that looks like a terminal."""

    def isatty(self):
        return True


def test_sweep_in_python_prints_nothing_without_a_log(tmp_path, npz, single_trainings, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    options = {name: value for name, value in SEEDED.items() if name != "log"}
    sweep = Sweep(RECIPES, str(tmp_path / "sweep"), "npz", str(npz), runs=2, **options)
    results = fit_sweep(sweep, log=None)
    assert list(results) == list(RECIPES) and [len(result.runs) for result in results.values()] == [2, 2, 2]
    assert sweep_contents(tmp_path / "sweep") == single_trainings
    assert sys.stderr.getvalue() == "", "a terminal shows no progress bar"


def test_variant_has_its_own_dtype_backend_and_logits_and_the_sweep_a_log(tmp_path, npz):
    text = SPEC.format(data=npz, output=tmp_path / "sweep").replace("runs = 2", 'runs = 1\nlog = "tensorboard"')
    text = (
        text.split("[variants.baseline]")[0] + '[variants.own]\ndtype = ["bfloat16", "float32"]\nsave_logits = true\n'
    )
    sweep = Sweep.from_toml(text + "[variants.common]\n", output="out")
    assert sweep.tensorboard and list(sweep.variants) == ["own-bfloat16", "own-float32", "common"]
    configs = [sweep.config(name) for name in sweep.variants]
    assert [config.dtype for config in configs] == ["bfloat16", "float32", "float32"]
    assert [config.save_logits for config in configs] == [True, True, False]
    results = fit_sweep(dataclasses.replace(sweep, tensorboard=False), log=None)
    assert [result.dtype for result in results.values()] == ["bfloat16", "float32", "float32"]
    assert [len(result.logits) for result in results.values()] == [1, 1, 0]
    with pytest.raises(InputError, match="log must be none or tensorboard, not 'wandb'"):
        Sweep.from_toml(text.replace("tensorboard", "wandb"), output="out")
    with pytest.raises(InputError, match=r"no key 'cutout' in .variants\.own.; did you mean cutout_size"):
        Sweep.from_toml(text + "cutout = 4\n", output="out")
