"""Commands that are killed, or lose power, at a file operation continue with the bits of an uninterrupted command."""

import random
import shutil
import subprocess
import sys

import pytest

from tests.faults.power import Operation, cut_power
from tests.helpers import ROOT, cells

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("cc"), reason="the shim needs Linux and a C compiler"
)


def inode(path):
    return path.stat().st_ino if path.exists() else 0


def faults(*arguments):
    """Run ``python -m tests.faults`` and return the rows of its table."""
    command = [sys.executable, "-m", "tests.faults", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return cells(done.stdout.splitlines())[2:]


@pytest.mark.parametrize(
    ("fault", "kept"),
    [("kept", {"synced": b"12", "half": b"1", "new": b""}), ("undone", {"synced": b"12", "half": b"1", "old": b"0"})],
)
def test_a_power_cut_drops_what_was_not_synced(tmp_path, fault, kept):
    """A name that was not synced is kept or undone. Bytes that were not synced are always dropped."""
    folder, crashed = tmp_path / "work", tmp_path / "crashed"
    folder.mkdir()
    for name, data in {"synced": b"12", "half": b"12", "new": b"12"}.items():
        (folder / name).write_bytes(data)
    (tmp_path / "old").write_bytes(b"0")
    shutil.copytree(folder, crashed)
    lines = [
        *(("create", name, 0, "", "") for name in ("synced", "half")),
        ("sync", "synced", 2, "", ""),
        ("sync", "half", 1, "", ""),
        ("sync", "", 0, "", ""),
        ("create", "new", 0, "", ""),
        ("unlink", "old", 0, "", str(tmp_path / "old")),
    ]
    log = [
        Operation(1, True, kind, folder / name, inode(crashed / name), size, source, grave)
        for kind, name, size, source, grave in lines
    ]
    cut_power(folder, crashed, log, fault, random.Random(0))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept


@pytest.mark.slow  # starts processes
def test_some_kills_and_power_cuts_change_no_bit():
    rows = faults("--sample", "3", "--only", "train")
    assert {row[1] for row in rows} == {"kill", "kept", "undone", "mixed"}


@pytest.mark.nightly
def test_kills_and_power_cuts_at_every_operation_change_no_bit():
    assert len(faults()) == 8 * 4
