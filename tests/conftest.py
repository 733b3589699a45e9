import getpass
import os
import signal
import tempfile

# Before torch is imported, here and in processes that tests start: sharing small tensors between threads costs more
# than it saves, and the tests themselves share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A compiler's cache for each of pytest-xdist's workers: one may read a library that another has not finished writing.
_worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/cifar_fast_tests_{getpass.getuser()}/{_worker}"
)

# Where the tests run in a shell's background SIGINT is ignored, and by processes that they start too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: kernels run on the CPU

from cifar_fast import Dataset
from cifar_fast.data.sources import MIRRORS
from cifar_fast.data.synthetic import PATTERNS, textures
from cifar_fast.kernels.launch import using
from tests.helpers import KINDS, SHARED, launch_table, published, save_npz, small_dataset


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))


@pytest.fixture(scope="session")
def shared():
    """Gives the path of a file that stands beside the project, and skips where it is absent: it is no part of it."""

    def find(name):
        if not (SHARED / name).exists():
            pytest.skip(f"{name} is not beside the project")
        return SHARED / name

    return find


@pytest.fixture(scope="session")
def small():
    return small_dataset()


@pytest.fixture(scope="module")
def tiny():
    """Of three classes, 32 images to train on and 16 to test."""
    return small_dataset(train=32, test=16)


@pytest.fixture(scope="module")
def npz(tmp_path_factory, tiny):
    """A file with ``tiny``, or with what a module has by that name."""
    return save_npz(tmp_path_factory.mktemp("data") / "tiny.npz", tiny)


@pytest.fixture(scope="module")
def no_curves():
    """Draws no curves, which take longest: curves.png is empty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cifar_fast.training.run_folder.draw_curves", lambda rows, recipe, title, file: file.touch())
        yield


@pytest.fixture(autouse=True)
def no_public_source(monkeypatch):
    """No test reaches the network: where a download would go nothing listens."""
    monkeypatch.delenv("CIFAR_FAST_DATA_URL", raising=False)
    for name, kind in KINDS.items():
        monkeypatch.setattr(kind, "url", f"http://127.0.0.1:9/{kind.filename}")
        monkeypatch.setitem(MIRRORS, name, f"http://127.0.0.1:9/mirror/{kind.filename}")


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A folder with a small CIFAR-10 in its published form: 100 of the embedded textures to train on, 50 to test."""
    dataset = Dataset("textures", "textures", *textures(100, seed=0), *textures(50, seed=1), tuple(PATTERNS))
    return published("cifar10", dataset, tmp_path / "cifar10", monkeypatch)


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """The same of CIFAR-100: 200 training images, 100 test images, a hundred classes."""
    return published("cifar100", small_dataset(200, 100, 100), tmp_path / "cifar100", monkeypatch)


@pytest.fixture
def small_blocks():
    """Launch parameters with which small tensors take many blocks, splits of several blocks, and short last ones."""
    with using(launch_table(rows=4, channels=8, splits=3, merge_channels=4, block=1024)):
        yield


@pytest.fixture
def uncompiled(monkeypatch):
    """What torch.compile makes of the model is tested by itself; without it a test takes seconds."""
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)


@pytest.fixture
def few_programs():
    """Launch parameters for tiny tensors: the interpreter takes a millisecond and more a program."""
    with using(launch_table(rows=4096, channels=32, splits=64, merge_channels=32, block=8192)):
        yield
