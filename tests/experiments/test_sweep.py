"""A sweep trains its variants in turn, goes on where it stopped, and refuses what does not fit."""

import io
import json
import signal
import subprocess
import sys

import pytest

from cifar_fast import Recipe, Sweep, fit, fit_sweep
from cifar_fast.cli.main import main
from cifar_fast.utils.progress import lines_to
from tests.helpers import HOW, contents, save_npz, small_dataset

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_curves")]  # whole trainings, by the command and from Python

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


@pytest.fixture
def spec(tmp_path, npz):
    """Writes the specification, each pair of ``changes`` replaced in it; gives its path."""

    def write(*changes):
        text = SPEC.format(data=npz, output=tmp_path / "sweep")
        for before, after in changes:
            assert before in text
            text = text.replace(before, after)
        (tmp_path / "spec.toml").write_text(text)
        return str(tmp_path / "spec.toml")

    return write


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny, no_curves):
    """What each variant leaves that is trained by itself, its runs in one go."""
    folder = tmp_path_factory.mktemp("alone")
    for name, recipe in RECIPES.items():
        fit(recipe, tiny, runs=2, output=folder / name, **SEEDED)
    return {name: contents(folder / name, "data_source") for name in RECIPES}


def trained(folder):
    return {name: contents(folder / name, "data_source") for name in RECIPES}


def epochs_in(lines):
    """The variants in the order of the epochs that were trained."""
    return [line.split(":")[0] for line in lines if ": epoch " in line]


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_variant_is_what_its_training_alone_is_and_runs_are_in_turn(tmp_path, spec, alone, capfd):
    assert main(["sweep", spec()]) == 0
    shown = capfd.readouterr().out.splitlines()
    assert epochs_in(shown) == [name for _ in range(2) for name in RECIPES for _ in range(2)]
    assert trained(tmp_path / "sweep") == alone
    assert shown[-1].endswith(f"to see it: cifar-fast report {tmp_path}/sweep")


@pytest.mark.parametrize("epochs", [1, 5, 9])
def test_a_sweep_that_was_stopped_goes_on_with_the_same_bits(tmp_path, spec, alone, capfd, monkeypatch, epochs):
    """In the first epoch of all; in the third variant; in the second round."""
    said = []

    def stop(line):
        said.append(line)
        if len(epochs_in(said)) == epochs:
            raise KeyboardInterrupt

    with lines_to(stop):
        assert main(["sweep", spec()]) == 130
    assert capfd.readouterr().err == f"interrupted; to resume: cifar-fast sweep {tmp_path}/spec.toml\n"
    assert main(["sweep", spec()]) == 0
    again = epochs_in(capfd.readouterr().out.splitlines())
    assert len(again) == 12 - epochs + 1, "the epoch alone whose checkpoint was not written is trained twice"
    assert trained(tmp_path / "sweep") == alone


@pytest.mark.slow  # processes of their own
def test_a_sweep_that_was_killed_goes_on_with_the_same_bits(tmp_path, spec, alone):
    command = [sys.executable, "-m", "cifar_fast", "sweep", spec()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("momentum-0.8: epoch"):
            process.kill()
            break
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert main(["sweep", spec()]) == 0
    assert trained(tmp_path / "sweep") == alone


def test_of_a_sweep_that_has_ended_nothing_is_trained_again(tmp_path, spec, capfd):
    assert main(["sweep", spec()]) == 0
    before = files_of(tmp_path / "sweep")
    capfd.readouterr()
    assert main(["sweep", spec()]) == 0
    assert epochs_in(capfd.readouterr().out.splitlines()) == []
    assert files_of(tmp_path / "sweep") == before


def test_runs_may_grow_and_variants_be_added(tmp_path, spec, alone, capfd):
    assert main(["sweep", spec(("runs = 2", "runs = 1"), ("[0.8, 0.85]", "0.9"))]) == 0
    assert main(["sweep", spec(("runs = 2", "runs = 1"), ("[0.8, 0.85]", "0.9\n[variants.other]"))]) == 0
    capfd.readouterr()
    assert main(["sweep", spec(("[0.8, 0.85]", "0.9\n[variants.other]"))]) == 0
    assert epochs_in(capfd.readouterr().out.splitlines()) == [
        name for name in ("baseline", "momentum", "other") for _ in range(2)
    ]
    assert contents(tmp_path / "sweep/baseline", "data_source") == alone["baseline"]
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
        (("0.8, 0.85", "0.8, 0.7"), "the variant momentum-0.85 was trained there, and is not part of the sweep now"),
        (('"npz"', '"folder"'), "sweep/baseline: dataset was npz, not folder"),
        (("tiny.npz", "other.npz"), "is not the data set that was trained on"),
    ],
)
def test_a_changed_specification_is_one_line_and_exit_code_2_and_changes_nothing(
    tmp_path_factory, swept, npz, capfd, change, words
):
    folder, text = swept
    save_npz(npz.with_name("other.npz"), small_dataset(seed=1))
    assert change[0] in text
    (path := tmp_path_factory.mktemp("changed") / "spec.toml").write_text(text.replace(*change))
    before = files_of(folder)
    capfd.readouterr()
    assert main(["sweep", str(path)]) == 2
    shown = capfd.readouterr()
    assert shown.err.startswith("error: ") and words in shown.err and shown.err.count("\n") == 1
    assert epochs_in(shown.out.splitlines()) == [] and files_of(folder) == before


@pytest.fixture(scope="module")
def swept(tmp_path_factory, npz):
    """The folder of a sweep that has ended, and its specification."""
    folder = tmp_path_factory.mktemp("swept") / "sweep"
    text = SPEC.format(data=npz, output=folder)
    (path := folder.parent / "spec.toml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cifar_fast.training.run_folder.draw_curves", lambda rows, recipe, title, file: file.touch())
        assert main(["sweep", str(path)]) == 0
    return folder, text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("runs = 2", "run = 2"), "there is no key 'run' at the top; did you mean runs"),
        (("epochs = 2", "epoch = 2"), "there is no key 'epoch' in [recipe]; did you mean epochs?"),
        (("momentum = [", "momentun = ["), "no key 'momentun' in [variants.momentum]; did you mean momentum?"),
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
def test_a_specification_that_is_wrong_is_one_line_and_exit_code_2_and_makes_nothing(
    tmp_path, spec, capfd, change, words
):
    text = spec(change)
    if change[0] == "[variants.momentum]":
        text = spec(change, ("[variants.baseline]", ""))
    for flags in ([], ["--dry-run"]):
        assert main(["sweep", text, *flags]) == 2
        shown = capfd.readouterr()
        assert shown.err.startswith("error: ") and words in shown.err and shown.err.count("\n") == 1
        assert shown.out == "" and not (tmp_path / "sweep").exists()


def test_a_specification_without_variants_or_that_is_not_there_is_refused(tmp_path, capfd):
    (tmp_path / "spec.toml").write_text("runs = 2\n")
    assert main(["sweep", f"{tmp_path}/spec.toml"]) == 2
    assert "states no variant; add a table [variants.NAME]" in capfd.readouterr().err
    assert main(["sweep", f"{tmp_path}/none.toml"]) == 2
    assert capfd.readouterr().err == f"error: cannot read the sweep {tmp_path}/none.toml: No such file or directory\n"


def test_lists_of_values_make_a_variant_of_each_combination():
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


def test_a_dry_run_lists_variants_and_runs_and_where_they_stand(tmp_path, spec, capfd, monkeypatch):
    assert main(["sweep", spec(), "--dry-run"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == f"3 variants, 2 runs each, on npz, to {tmp_path}/sweep"
    assert (
        lines[2] == "momentum-0.8: eager, contiguous_format, float32; epochs 2, batch_size 16, widths 4 8, momentum 0.8"
    )
    runs = [f"run {run} of {name}, seed {run + 2}: to do" for run in (1, 2) for name in RECIPES]
    assert lines[4:] == runs and not (tmp_path / "sweep").exists()

    def stop(line):
        if line.startswith("momentum-0.8: epoch  2"):
            raise KeyboardInterrupt

    with lines_to(stop):
        assert main(["sweep", spec()]) == 130
    before = files_of(tmp_path / "sweep")
    capfd.readouterr()
    assert main(["sweep", spec(), "--dry-run"]) == 0
    stands = [line.partition(": ")[2] for line in capfd.readouterr().out.splitlines()[4:]]
    assert stands == ["has ended", "will resume after epoch 1", "to do", "to do", "to do", "to do"]
    assert files_of(tmp_path / "sweep") == before


def test_what_was_left_to_auto_is_what_it_was_for_new_variants_too(tmp_path, spec):
    fixed = ('"eager"', '"eager"\nmemory_format = "contiguous_format"')  # auto alone is channels_last
    one = ("[variants.momentum]\nmomentum = [0.8, 0.85]", "")
    assert main(["sweep", spec(fixed, one)]) == 0
    path = tmp_path / "sweep/baseline/training.json"
    training = json.loads(path.read_text())
    training["config"]["threads"] += 1
    path.write_text(json.dumps(training))
    assert main(["sweep", spec(('"eager"', '"auto"'))]) == 0
    found = [json.loads((tmp_path / "sweep" / name / "summary.json").read_text()) for name in RECIPES]
    assert [(one["backend"], one["memory_format"]) for one in found] == [("eager", "contiguous_format")] * 3
    assert [one["environment"]["threads"] for one in found[1:]] == [training["config"]["threads"]] * 2


def test_a_variant_that_diverges_is_told_and_left_out(tmp_path, spec, alone, capfd):
    wild = "0.8\nlr_values = [1e30, 1e30, 0]\n[variants.last]"
    assert main(["sweep", spec(("[0.8, 0.85]", wild))]) == 1
    lines = capfd.readouterr().out.splitlines()
    assert sum("momentum: the loss is not finite" in line for line in lines) == 1
    assert contents(tmp_path / "sweep/baseline", "data_source") == alone["baseline"]
    assert len(json.loads((tmp_path / "sweep/last/summary.json").read_text())["runs"]) == 2


def test_what_is_compiled_is_set_up_once_for_each_variant(tmp_path, tiny, spec, uncompiled, capfd):
    assert main(["sweep", spec(('"eager"', '"compiled"'))]) == 0
    lines = capfd.readouterr().out.splitlines()
    set_up = [line.split(":")[0] for line in lines if "setting up the compiled backend" in line]
    assert set_up == list(RECIPES)
    recipe = RECIPES["momentum-0.8"]
    again = fit(recipe, tiny, runs=2, **SEEDED | {"backend": "compiled"})
    summary = json.loads((tmp_path / "sweep/momentum-0.8/summary.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "sweep/momentum-0.8/metrics.jsonl").read_text().splitlines()]
    assert [row["train_loss"] for row in rows] == [row.train_loss for row in again.rows]
    assert summary["backend"] == "compiled"


def test_before_a_run_has_left_something_nothing_stays(tmp_path, spec, monkeypatch):
    def stop(line):
        if line.startswith("baseline: torch"):
            raise KeyboardInterrupt

    with lines_to(stop):
        assert main(["sweep", spec(("/sweep", "/a/sweep"))]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["spec.toml"]


def test_a_folder_in_which_a_sweep_is_at_work_is_refused(spec, capfd, monkeypatch):
    codes = []

    def second(line):
        if line.startswith("baseline: epoch  1") and not codes:
            codes.append(None)
            codes.append(main(["sweep", path]))

    path = spec()
    with lines_to(second):
        assert main(["sweep", path]) == 0 and codes == [None, 2]
    error = capfd.readouterr().err
    assert "another sweep is at work there" in error and error.count("\n") == 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_sweep_of_ones_own_in_python_is_silent_without_a_log(tmp_path, npz, alone, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    sweep = Sweep(
        RECIPES, str(tmp_path / "sweep"), "npz", str(npz), runs=2, **{k: SEEDED[k] for k in SEEDED if k != "log"}
    )
    results = fit_sweep(sweep, log=None)
    assert list(results) == list(RECIPES) and [len(result.runs) for result in results.values()] == [2, 2, 2]
    assert trained(tmp_path / "sweep") == alone
    assert sys.stderr.getvalue() == "", "no bar, which a terminal would show"
