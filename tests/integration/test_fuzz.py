"""A small part of ``python -m tests.fuzz``, and proof that it notices what a reader must not do."""

import shutil

import pytest

pytest.importorskip("pyarrow", reason="pyarrow is not installed: the extra hf")
pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: the extra hf")

from tests import fuzz
from tests.fuzzing.readers import READERS, write_files
from tests.helpers import compiler

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_curves")]  # trains, and starts processes

UNSAFE = """
import os, pathlib, pickle, sys
from tests import fuzz

def reader(folder):
    pickle.loads((folder / "file").read_bytes())

folder = pathlib.Path(sys.argv[1]).resolve()
os.environ["CACHES"] = str(folder / "caches")
fuzz.Bomb.place = str(folder.parent / "made")
(folder / "file").write_bytes(pickle.dumps(fuzz.Bomb()))
sys.addaudithook(fuzz.watch)
fuzz.READERS["unsafe"] = (), reader
print(*fuzz.verdict("unsafe", folder))
"""


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        for name in fuzz.CACHES:
            patch.setenv(name, str(folder))
        worker = fuzz.Worker()
    yield worker
    worker.process.kill()


def test_valid_files_are_read_by_each_reader(tmp_path, worker):
    """Otherwise a reader could refuse all mutations for a reason of another file."""
    folders = write_files(tmp_path)
    assert {name: worker(name, folders / name)[0] for name in READERS} == dict.fromkeys(READERS, "read")


def test_mutated_files_are_read_or_refused_in_one_line(tmp_path, worker):
    found = [(name, *worker(name, folder)[:2]) for name, _, folder in fuzz.inputs(tmp_path, 64, seed=1)]
    assert [one for one in found if one[1] in fuzz.FAILURES] == []
    assert {one[1] for one in found} == {"read", "refused"}


def test_a_seed_gives_the_same_inputs_again(tmp_path):
    def all_bytes():
        root = tmp_path / "root"
        root.mkdir()
        inputs = fuzz.inputs(root, 2 * len(READERS), seed=1)
        yield from ((name, file, (folder / file).read_bytes()) for name, file, folder in inputs)
        shutil.rmtree(root)

    for one, again in zip(all_bytes(), list(all_bytes()), strict=True):
        assert one == again


def test_a_reader_that_runs_what_a_file_holds_is_noticed(tmp_path):
    (tmp_path / "input").mkdir()
    done = compiler("-c", UNSAFE, str(tmp_path / "input"))
    assert done.stdout.startswith(f"outside os.mkdir {tmp_path}/made")
