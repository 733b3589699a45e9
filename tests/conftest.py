"""Environment and fixtures of the tests."""

import getpass
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

# torch reads this on import, here and in the processes that tests start. Small tensors gain nothing from threads, and
# the test workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Each pytest-xdist worker has its own compiler cache, because one may read a library that another is still writing.
_worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/cifar_fast_tests_{getpass.getuser()}/{_worker}"
)

# A shell's background job ignores SIGINT, and so do the processes that it starts. Some tests send this signal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

os.fsync = lambda descriptor: None  # it takes milliseconds, several times for each epoch of a training

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads this on import; kernels then run on the CPU

from cifar_fast import Dataset
from cifar_fast.data.sources import MIRRORS
from cifar_fast.data.synthetic import PATTERNS, textures
from cifar_fast.kernels.launch import using
from cifar_fast.training import run_folder
from tests.helpers import KINDS, SHARED, launch_table, published, save_npz, small_dataset


def tiers(item):
    return {mark.name for mark in item.own_markers} & {"slow", "nightly"}


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(collector):
    """Refuse a test that is marked both slow and nightly."""
    items = yield
    for item in items if isinstance(items, list) else ():
        if len(tiers(item)) > 1:
            raise collector.CollectError(f"{item.name}: slow and nightly exclude each other")
    return items


@pytest.hookimpl(tryfirst=True)  # before pytest selects tests by ``-m``
def pytest_collection_modifyitems(items):
    """Let a test's own nightly replace the slow of its module. Skip the tests for a GPU without one."""
    modules = {item.getparent(pytest.Module) for item in items}
    for item in items:
        if "slow" in tiers(item.getparent(pytest.Module)) and not tiers(item):
            item.add_marker("slow")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))
    for module in modules:
        module.own_markers = [mark for mark in module.own_markers if mark.name != "slow"]


@pytest.fixture(scope="session")
def shared():
    """Return a function that finds a file beside the project, or skips the test if the file is absent."""

    def find(name):
        if not (SHARED / name).exists():
            pytest.skip(f"{name} is not beside the project")
        return SHARED / name

    return find


@pytest.fixture(scope="session")
def simulator(shared, tmp_path_factory):
    """The path of the GPU simulator's script, after a first run that builds the simulator."""
    script = shared("gpu_stand_in/run.py")
    if not shutil.which("gcc"):
        pytest.skip("the GPU simulator needs gcc")
    import fcntl  # Windows lacks it

    folder = tmp_path_factory.getbasetemp()
    with open(Path(tempfile.gettempdir(), f"simulator-{getpass.getuser()}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two processes that build it at the same time disturb each other
        subprocess.run([sys.executable, script, "--log", folder / "log", "-m", "pytest", "--version"], check=True)
    return str(script)


@pytest.fixture(scope="session")
def small():
    """Three classes, 96 training images and 40 test images."""
    return small_dataset()


@pytest.fixture(scope="module")
def tiny():
    """Three classes, 32 training images and 16 test images."""
    return small_dataset(train=32, test=16)


@pytest.fixture(scope="module")
def npz(tmp_path_factory, tiny):
    """A ``.npz`` file with the images of ``tiny``, which a module may override."""
    return save_npz(tmp_path_factory.mktemp("data") / "tiny.npz", tiny)


@pytest.fixture(scope="module")
def no_curves():
    """Leave curves.png and confusion.png empty, because drawing takes longer than training here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_curves", "draw_confusion"):
            patch.setattr(run_folder, name, lambda *arguments: arguments[-1].touch())
        yield


@pytest.fixture(autouse=True)
def no_public_source(monkeypatch):
    """Point every public source at a port without a listener, so that no test reaches the network."""
    monkeypatch.delenv("CIFAR_FAST_DATA_URL", raising=False)
    for name, kind in KINDS.items():
        monkeypatch.setattr(kind, "url", f"http://127.0.0.1:9/{kind.filename}")
        monkeypatch.setitem(MIRRORS, name, f"http://127.0.0.1:9/mirror/{kind.filename}")


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A folder with a small CIFAR-10 in its published form: 100 training images and 50 test images, all textures."""
    dataset = Dataset("textures", "textures", *textures(100, seed=0), *textures(50, seed=1), tuple(PATTERNS))
    return published("cifar10", dataset, tmp_path / "cifar10", monkeypatch)


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """A folder with a small CIFAR-100 in its published form: 200 training images and 100 test images."""
    return published("cifar100", small_dataset(200, 100, 100), tmp_path / "cifar100", monkeypatch)


@pytest.fixture
def small_blocks():
    """Launch parameters that cut small tensors into many blocks, several per split, with a short last block."""
    with using(launch_table(rows=4, channels=8, splits=3, merge_channels=4, block=1024)):
        yield


@pytest.fixture
def uncompiled(monkeypatch):
    """Replace torch.compile by the identity to save seconds; other tests compile."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.fixture
def few_programs():
    """Launch parameters that need few programs, because the interpreter takes a millisecond or more per program."""
    with using(launch_table(rows=4096, channels=32, splits=64, merge_channels=32, block=8192)):
        yield
