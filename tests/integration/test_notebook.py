"""In a notebook: the example, run in a kernel as a person would, and what a result and a bar look like there."""

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
    """Run the cells in a kernel of their own, in ``folder``, with the modules in ``path`` before all others."""
    paths = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT])),
    }
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    client.execute(env=os.environ | {"OMP_NUM_THREADS": "1"} | paths)


def outputs_of(notebook, start):
    """The outputs of the one cell that has ``start`` at the start of a line."""
    (cell,) = (cell for cell in notebook.cells if re.search(rf"^{re.escape(start)}", cell.source, re.MULTILINE))
    return cell.outputs


def printed(outputs):
    return "".join(output.text for output in outputs if output.output_type == "stream")


def shown(outputs, kind):
    """What the outputs hold of a MIME type."""
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The example, run with a small recipe, and the folder in which it ran."""
    notebook = nbformat.reads(EXAMPLE.read_text(), as_version=4)
    (settings,) = (cell for cell in notebook.cells if "DATASET =" in cell.source)
    settings.source = SMALL
    for cell in [cell for cell in notebook.cells if re.search("^!", cell.source, re.MULTILINE)]:
        # A command that fails is no error of its cell.
        told = nbformat.v4.new_code_cell("assert _exit_code == 0, _exit_code")
        notebook.cells.insert(notebook.cells.index(cell) + 1, told)
    folder = tmp_path_factory.mktemp("notebook")
    execute(notebook, folder)
    return notebook, folder


@pytest.mark.nightly  # a process of its own
def test_the_example_trains_and_shows_accuracy_and_curves(executed):
    notebook, _ = executed
    for start, epochs in (("fit(", 1), ("result = fit(", 2)):
        outputs = outputs_of(notebook, start)
        assert f"epoch  {epochs}  train loss" in printed(outputs)
        (page,) = shown(outputs, "text/html")
        accuracy = re.search(r"test accuracy (\d+\.\d\d) %", printed(outputs))[1]
        assert f"<td>{accuracy} %</td>" in page and "data:image/png;base64," in page


@pytest.mark.nightly  # a process of its own
def test_the_example_leaves_its_files(executed):
    _, folder = executed
    assert (folder / "runs/first_gpu/curves.pdf").read_bytes().startswith(b"%PDF")
    assert (folder / "runs/first_gpu/summary.json").exists()


@pytest.mark.nightly  # a process of its own
def test_the_example_checks_the_machine(executed):
    notebook, _ = executed
    assert printed(outputs_of(notebook, "!python -m cifar_fast check"))


@pytest.mark.nightly  # a process of its own
def test_the_example_shows_where_a_steps_time_goes(executed):
    notebook, folder = executed
    assert "convolutions forward" in printed(outputs_of(notebook, "!python -m cifar_fast profile"))
    assert (folder / "runs/profile/trace.json").exists()


@pytest.mark.nightly  # a process of its own
def test_the_example_installs_nothing_where_the_package_is_there(executed):
    notebook, _ = executed
    assert outputs_of(notebook, "import importlib.util") == []


@pytest.mark.nightly  # a process of its own
def test_the_bar_is_a_widget_in_a_notebook(executed):
    notebook, _ = executed
    outputs = outputs_of(notebook, "result = fit(")
    assert len(shown(outputs, WIDGET)) == 2  # an epoch each
    assert not [output for output in outputs if output.get("name") == "stderr"]


@pytest.mark.nightly  # a process of its own
def test_without_ipywidgets_the_bar_is_plain(tmp_path):
    (tmp_path / "path").mkdir()
    (tmp_path / "path/ipywidgets.py").write_text("raise ImportError('not here')")
    code = """
from cifar_fast.progress import print_line, progress_bar, silent

for log in (print_line, silent):
    with progress_bar(3, f"epoch for {log.__name__}", "step", log) as bar:
        bar.update(3)
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    execute(notebook, tmp_path, tmp_path / "path")
    (outputs,) = (cell.outputs for cell in notebook.cells)
    assert "epoch for print_line:   0%" in printed(outputs) and "silent" not in printed(outputs)
    assert {output.name for output in outputs} == {"stdout"}  # a warning would be on standard error


def test_the_stored_notebook_has_no_outputs_and_one_form():
    text = EXAMPLE.read_text()
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert not [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")]
    assert text == nbformat.writes(notebook) + "\n"


def test_readme_links_to_the_notebook_and_neither_names_a_placeholder():
    texts = [(ROOT / "README.md").read_text(), EXAMPLE.read_text()]
    assert "](examples/first_gpu.ipynb)" in texts[0]
    assert not re.search("YOUR_|colab-badge", "".join(texts))
