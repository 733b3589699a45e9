"""Build and install the package: wheel, source archive, editable; beside Hugging Face's package kernels too."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import cifar_fast

ROOT = Path(__file__).parents[2]
SOURCES = ("cifar_fast", "kernels", "benchmarks", "docs", "examples", "tests", ".ci", ".github")
HF_KERNELS = "kernels==0.17.2"


def run(*command, cwd, path=None, **environment):
    """Return the output of ``command`` in ``cwd``, with packages in ``path`` found first."""
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
    """Build the wheel, sdist or editable wheel of ``source`` with the installed setuptools."""
    pytest.importorskip("setuptools", "77", reason="needs setuptools 77 or newer, from the extra dev")
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(into)!r}))"
    return into / python(code, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the checkout, with cifar_fast/kernels as a link."""
    path = tmp_path_factory.mktemp("tree") / "cifar_fast"
    path.mkdir()
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, path)
    for folder in SOURCES:
        generated = ("__pycache__", *(("data", "runs") if folder == "examples" else ()))
        shutil.copytree(ROOT / folder, path / folder, symlinks=True, ignore=shutil.ignore_patterns(*generated))
    return path


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory):
    """The source archive, unpacked."""
    archive = build("sdist", tree, tmp_path_factory.mktemp("sdist"))
    with tarfile.open(archive) as file:
        file.extractall(archive.parent, filter="data")
    return archive.with_name(archive.name.removesuffix(".tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel, built from the source archive as pip builds it."""
    return build("wheel", sdist, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the installed package."""
    return install(wheel, tmp_path_factory.mktemp("installed"))


def install(wheel, target):
    pip("install", "--quiet", "--no-index", "--no-deps", "--target", target, wheel, cwd=target.parent)
    return target


def sources(root):
    """Return the files of the package in ``root``, by their paths in an installation."""
    files = [*(root / "cifar_fast").rglob("*"), *(root / "cifar_fast/kernels").glob("*")]  # rglob follows no links
    return {str(path.relative_to(root)) for path in files if path.is_file() and path.suffix != ".pyc"}


def test_wheel_contains_the_kernels_and_no_other_top_level_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"cifar_fast", f"cifar_fast-{cifar_fast.__version__}.dist-info"}
    assert {name for name in names if name.startswith("cifar_fast/")} == sources(ROOT)
    assert {"cifar_fast/py.typed", "cifar_fast/kernels/launch.json", "cifar_fast/kernels/launch.py"} <= sources(ROOT)


def test_wheel_built_from_the_checkout_is_the_same(tree, wheel, tmp_path):
    files = zipfile.ZipFile(build("wheel", tree, tmp_path))
    from_sdist = zipfile.ZipFile(wheel)
    assert sorted(files.namelist()) == sorted(from_sdist.namelist())
    assert all(files.read(name) == from_sdist.read(name) for name in files.namelist() if name.startswith("cifar_fast/"))


def test_editable_installation_imports_the_checkout(tree, tmp_path):
    target = install(build("editable", tree, tmp_path), tmp_path / "installed")
    code = f"""
import importlib.util, site
site.addsitedir({str(target)!r})
print(importlib.util.find_spec("cifar_fast.kernels").origin)
"""
    # -S keeps out the installation of the package that the tests may run from.
    assert run(sys.executable, "-S", "-c", code, cwd=tmp_path) == f"{tree}/cifar_fast/kernels/__init__.py\n"


def test_version_is_the_same_everywhere(wheel):
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = file.read(name).decode()
    assert f"\nVersion: {cifar_fast.__version__}\n" in metadata and "\nLicense-Expression: MIT\n" in metadata
    assert cifar_fast.__version__ in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {cifar_fast.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.slow
def test_commands_run_from_the_installed_package(installed, tmp_path):
    command = installed / "bin/cifar-fast"
    assert run(command, "--version", cwd=tmp_path, path=installed) == f"cifar-fast {cifar_fast.__version__}\n"
    assert "--batch-size" in run(command, "train", "--help", cwd=tmp_path, path=installed)
    for module in ("cifar_fast.train", "cifar_fast.compare"):
        assert "--batch-size" in run(sys.executable, "-m", module, "--help", cwd=tmp_path, path=installed)


@pytest.mark.nightly
def test_installed_package_works_beside_the_hugging_face_package_kernels(installed, tmp_path):
    for name in ("huggingface_hub", "packaging", "yaml"):
        pytest.importorskip(name, reason=f"{name}, which {HF_KERNELS} needs, is not installed")
    both = tmp_path / "both"
    shutil.copytree(installed, both)
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--retries", "1", "--target"]
    command = [sys.executable, "-m", "pip", "install", *options, both, HF_KERNELS]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the index does not give {HF_KERNELS}: {done.stderr.strip().splitlines()[-1]}")
    code = """
import sys
import kernels
import torch
import cifar_fast.kernels
from cifar_fast.utils.device import fused_unavailable_reason
print(kernels.__file__, cifar_fast.__file__, cifar_fast.kernels.__file__, sep="\\n")
print(callable(kernels.get_kernel), callable(cifar_fast.kernels.batch_norm_act))
print(fused_unavailable_reason(torch.device("cpu")))
"""
    how = dict(cwd=tmp_path, path=both, TRITON_INTERPRET="1")
    *files, callables, reason = python(code, **how).splitlines()
    assert files == [str(both / f"{name}/__init__.py") for name in ("kernels", "cifar_fast", "cifar_fast/kernels")]
    assert callables == "True True"
    assert reason == "None", "the fused backend finds its kernels, whatever else is called kernels"
    reason = python(code.replace('"cpu"', '"cuda"'), **how).splitlines()[-1]
    assert "TRITON_INTERPRET=1 is set" in reason


@pytest.mark.nightly
def test_kernels_run_from_the_installed_package(installed, tmp_path):
    code = """
import torch
from cifar_fast.kernels import BatchNormAct2d
norm = BatchNormAct2d(4, alpha=0.1, pool=2)
x = torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
norm(x).sum().backward()
print(list(x.grad.shape))
"""
    assert python(code, cwd=tmp_path, path=installed, TRITON_INTERPRET="1") == "[2, 4, 8, 8]\n"


def test_source_archive_contains_what_its_tests_need(sdist):
    names = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    needed = {"setup.py", "pyproject.toml", "Makefile", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"}
    needed |= {"CITATION.cff", "docs/cli.md", "tests/conftest.py"} | sources(ROOT)
    for folder in ("tests", "benchmarks", "examples", "docs"):
        needed |= {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")}
    assert needed <= names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    assert not (sdist / "cifar_fast/kernels").is_symlink()


@pytest.mark.nightly  # trains in processes
def test_source_archives_tests_run(sdist):
    files = ["tests/test_recipe.py", "tests/kernels/test_record_step.py", "tests/integration/test_reference.py"]
    select = ["-m", "not slow and not nightly", "-k", "recipe or record or weights"]
    report = run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *files, *select, cwd=sdist)
    assert re.match(r"\d+ passed, ", report.splitlines()[-1]), report
    code = "import cifar_fast.kernels; print(cifar_fast.__file__, cifar_fast.kernels.__file__)"
    where = python(code, cwd=sdist, TRITON_INTERPRET="1")
    assert where == f"{sdist}/cifar_fast/__init__.py {sdist}/cifar_fast/kernels/__init__.py\n"


def test_cli_page_matches_the_flags():
    page = runpy.run_path(str(ROOT / "docs/generate_cli.py"))["page"]
    assert (ROOT / "docs/cli.md").read_text() == page(), "run: make docs"


def test_documents_link_to_existing_files():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith(("http://", "https://")):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_lowest_tested_versions_are_the_declared_ones():
    declared = dict(re.findall(r'"(\w+)>=([\d.]+)[;"]', (ROOT / "setup.py").read_text()))
    pinned = dict(re.findall(r"^(\w+)==([\d.]+)$", (ROOT / ".github/lowest-versions.txt").read_text(), re.MULTILINE))
    for name, lowest in pinned.items():
        assert lowest.startswith(declared[name]), name
