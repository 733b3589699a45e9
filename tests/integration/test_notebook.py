"""Run the example notebook in a kernel, and check how results and progress bars look there."""

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/first_gpu.ipynb"
SMALL = """
from cifar_fast import Recipe

DATASET = "synthetic"
RECIPE = Recipe(epochs=2, batch_size=500, widths=(2, 4, 8))
"""
WIDGET = "application/vnd.jupyter.widget-view+json"


def execute(notebook, folder, *path):
    """Run the cells in a new kernel in ``folder``. Modules in ``path`` are found first."""
    paths = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT])),
    }
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    client.execute(env=os.environ | {"OMP_NUM_THREADS": "1"} | paths)


def outputs_of(notebook, start):
    """Return the outputs of the only cell with a line that starts with ``start``."""
    (cell,) = (cell for cell in notebook.cells if re.search(rf"^{re.escape(start)}", cell.source, re.MULTILINE))
    return cell.outputs


def printed(outputs):
    return "".join(output.text for output in outputs if output.output_type == "stream")


def shown(outputs, kind):
    """Return the outputs of the MIME type ``kind``."""
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Run the example with a small recipe; return the notebook and its working folder."""
    notebook = nbformat.reads(EXAMPLE.read_text(), as_version=4)
    (settings,) = (cell for cell in notebook.cells if "DATASET =" in cell.source)
    settings.source = SMALL
    for cell in [cell for cell in notebook.cells if re.search("^!", cell.source, re.MULTILINE)]:
        # A failing command does not fail its cell, so the next cell checks the exit code.
        check = nbformat.v4.new_code_cell("assert _exit_code == 0, _exit_code")
        notebook.cells.insert(notebook.cells.index(cell) + 1, check)
    folder = tmp_path_factory.mktemp("notebook")
    execute(notebook, folder)
    return notebook, folder


@pytest.mark.nightly
def test_example_trains_and_shows_accuracy_and_curves(executed):
    notebook, _ = executed
    for start, epochs in (("fit(", 1), ("result = fit(", 2)):
        outputs = outputs_of(notebook, start)
        assert f"epoch  {epochs}  train loss" in printed(outputs)
        (page,) = shown(outputs, "text/html")
        accuracy = re.search(r"test accuracy (\d+\.\d\d) %", printed(outputs))[1]
        assert f"<td>{accuracy} %</td>" in page and "data:image/png;base64," in page


@pytest.mark.nightly
def test_example_writes_its_files(executed):
    _, folder = executed
    assert (folder / "runs/first_gpu/curves.pdf").read_bytes().startswith(b"%PDF")
    assert (folder / "runs/first_gpu/summary.json").exists()


@pytest.mark.nightly
def test_example_checks_the_machine(executed):
    notebook, _ = executed
    assert printed(outputs_of(notebook, "!python -m cifar_fast check"))


@pytest.mark.nightly
def test_example_profiles_a_step(executed):
    notebook, folder = executed
    assert "convolutions forward" in printed(outputs_of(notebook, "!python -m cifar_fast profile"))
    assert (folder / "runs/profile/trace.json").exists()


@pytest.mark.nightly
def test_example_installs_nothing_if_the_package_is_installed(executed):
    notebook, _ = executed
    assert outputs_of(notebook, "import importlib.util") == []


@pytest.mark.nightly
def test_progress_bar_is_a_widget(executed):
    notebook, _ = executed
    outputs = outputs_of(notebook, "result = fit(")
    assert len(shown(outputs, WIDGET)) == 2  # one per epoch
    assert not [output for output in outputs if output.get("name") == "stderr"]


@pytest.mark.nightly
def test_progress_bar_is_text_without_ipywidgets(tmp_path):
    (tmp_path / "path").mkdir()
    (tmp_path / "path/ipywidgets.py").write_text("raise ImportError('not here')")
    code = """
from cifar_fast.utils.progress import lines_to, progress_bar

for log in (print, None):
    with lines_to(log), progress_bar(3, f"bar of {log}", "step") as bar:
        bar.update(3)
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    execute(notebook, tmp_path, tmp_path / "path")
    (outputs,) = (cell.outputs for cell in notebook.cells)
    assert "bar of <built-in function print>:   0%" in printed(outputs) and "bar of None" not in printed(outputs)
    assert {output.name for output in outputs} == {"stdout"}  # a warning would be on standard error


def test_stored_notebook_has_no_outputs_and_standard_format():
    text = EXAMPLE.read_text()
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert not [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")]
    assert text == nbformat.writes(notebook) + "\n"


def test_readme_links_to_the_notebook_without_placeholders():
    texts = [(ROOT / "README.md").read_text(), EXAMPLE.read_text()]
    assert "](examples/first_gpu.ipynb)" in texts[0]
    assert not re.search("YOUR_|colab-badge", "".join(texts))
