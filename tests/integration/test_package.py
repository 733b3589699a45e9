"""What is built and installed: wheel, source archive, and the package beside Hugging Face's kernels."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import cifar_fast

ROOT = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns(
    *(".git", ".venv", "runs", "data", "local", "build", "dist", "*.egg-info", "__pycache__", ".*_cache"),
    *(".hypothesis", ".benchmarks"),
)
HF_KERNELS = "kernels==0.17.2"


def run(*command, cwd, path=None, **environment):
    """The output of a process in ``cwd`` that finds packages in ``path`` first."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    environment.pop("PYTHONPATH", None)
    if path:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(code, **how):
    return run(sys.executable, "-c", code, **how)


def pip(*arguments, cwd):
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, cwd=cwd)


def build(kind, source, into):
    """Build the wheel or sdist of ``source`` with the setuptools that is here, as ``build --no-isolation`` does."""
    pytest.importorskip("setuptools", "77", reason="setuptools 77 or newer, of the extra dev, is not installed")
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(into)!r}))"
    return into / python(code, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source archive, unpacked."""
    tree = tmp_path_factory.mktemp("tree") / "cifar_fast"
    shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
    archive = build("sdist", tree, tmp_path_factory.mktemp("sdist"))
    with tarfile.open(archive) as file:
        file.extractall(archive.parent, filter="data")
    return archive.with_name(archive.name.removesuffix(".tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel, built from the source archive as an index's clients build it."""
    return build("wheel", sdist, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the installed package."""
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--quiet", "--no-index", "--no-deps", "--target", target, wheel, cwd=target.parent)
    return target


def test_the_wheel_holds_the_kernels_inside_the_package_and_no_other_top_level_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"cifar_fast", f"cifar_fast-{cifar_fast.__version__}.dist-info"}
    wanted = {f"cifar_fast/kernels/{file.name}" for file in (ROOT / "kernels").iterdir() if file.is_file()}
    wanted |= {f"cifar_fast/{file.name}" for file in (ROOT / "cifar_fast").iterdir() if file.is_file()}
    assert wanted == {name for name in names if name.startswith("cifar_fast/")}
    assert {"cifar_fast/py.typed", "cifar_fast/kernels/launch.json", "cifar_fast/kernels/launch.py"} <= wanted


def test_the_version_stands_in_one_place(wheel):
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = file.read(name).decode()
    assert f"\nVersion: {cifar_fast.__version__}\n" in metadata and "\nLicense-Expression: MIT\n" in metadata
    assert cifar_fast.__version__ in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {cifar_fast.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.slow
def test_the_commands_run_from_the_installed_package(installed, tmp_path):
    command = installed / "bin/cifar-fast"
    assert run(command, "--version", cwd=tmp_path, path=installed) == f"cifar-fast {cifar_fast.__version__}\n"
    assert "--batch-size" in run(command, "train", "--help", cwd=tmp_path, path=installed)
    for module in ("cifar_fast.train", "cifar_fast.compare"):
        assert "--batch-size" in run(sys.executable, "-m", module, "--help", cwd=tmp_path, path=installed)


@pytest.mark.nightly  # an installation
def test_the_installed_package_stands_beside_the_hugging_face_package_kernels(installed, tmp_path):
    for name in ("huggingface_hub", "packaging", "yaml"):
        pytest.importorskip(name, reason=f"{name}, which {HF_KERNELS} needs, is not installed")
    both = tmp_path / "both"
    shutil.copytree(installed, both)
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--retries",
        "1",
    ]
    done = subprocess.run([*command, "--target", both, HF_KERNELS], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the index does not give {HF_KERNELS}: {done.stderr.strip().splitlines()[-1]}")
    code = """
import sys
import kernels
import torch
import cifar_fast.kernels
from cifar_fast.utils.device import fused_unavailable_reason
print(kernels.__file__, cifar_fast.__file__, cifar_fast.kernels.__file__, sep="\\n")
print(callable(kernels.get_kernel), callable(cifar_fast.kernels.batch_norm_celu))
print(fused_unavailable_reason(torch.device("cpu")))
"""
    how = dict(cwd=tmp_path, path=both, TRITON_INTERPRET="1")
    *files, callables, reason = python(code, **how).splitlines()
    assert files == [str(both / f"{name}/__init__.py") for name in ("kernels", "cifar_fast", "cifar_fast/kernels")]
    assert callables == "True True"
    assert reason == "None", "the fused backend finds its kernels, whatever else is called kernels"
    reason = python(code, **how | {"TRITON_INTERPRET": "0"}).splitlines()[-1]
    assert "need a CUDA GPU" in reason


@pytest.mark.nightly  # an installation
def test_the_kernels_run_from_the_installed_package(installed, tmp_path):
    code = """
import torch
from cifar_fast.kernels import BatchNormCELU2d
norm = BatchNormCELU2d(4, alpha=0.1, pool=2)
x = torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
norm(x).sum().backward()
print(list(x.grad.shape))
"""
    assert python(code, cwd=tmp_path, path=installed, TRITON_INTERPRET="1") == "[2, 4, 8, 8]\n"


def test_the_source_archive_holds_what_its_tests_need(sdist):
    names = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    needed = {"setup.py", "pyproject.toml", "Makefile", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"}
    needed |= {"CITATION.cff", "kernels/launch.json", "cifar_fast/py.typed", "docs/cli.md", "tests/conftest.py"}
    for folder in ("tests", "benchmarks", "examples", "docs", "kernels", "cifar_fast"):
        needed |= {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")}
    assert needed <= names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


@pytest.mark.nightly  # an installation
def test_the_source_archives_tests_run(sdist):
    files = ["tests/test_recipe.py", "tests/test_reference.py"]
    closing = run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *files, "-k", "recipe", cwd=sdist)
    assert re.match(r"\d+ passed, \d+ deselected", closing.splitlines()[-1]), closing
    where = python("import cifar_fast; print(cifar_fast.__file__)", cwd=sdist)
    assert where == f"{sdist}/cifar_fast/__init__.py\n"


def test_the_page_of_the_commands_is_what_their_flags_say():
    namespace = {"__name__": "generate_cli", "__file__": str(ROOT / "docs/generate_cli.py")}
    exec(compile((ROOT / "docs/generate_cli.py").read_text(), "generate_cli.py", "exec"), namespace)
    assert (ROOT / "docs/cli.md").read_text() == namespace["page"](), "run: make docs"


def test_the_documents_link_to_files_that_exist():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith(("http://", "https://")):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_lowest_versions_are_those_that_the_package_declares():
    declared = dict(re.findall(r'"(\w+)>=([\d.]+)[;"]', (ROOT / "setup.py").read_text()))
    pinned = dict(re.findall(r"^(\w+)==([\d.]+)$", (ROOT / ".github/lowest-versions.txt").read_text(), re.MULTILINE))
    for name, lowest in pinned.items():
        assert lowest.startswith(declared[name]), name
