"""Commands that are killed, or lose power, at a file operation continue with the bits of an uninterrupted command."""

import shutil
import subprocess
import sys

import pytest

from tests.helpers import ROOT, cells

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("cc"), reason="the shim needs Linux and a C compiler"
)


def faults(*arguments):
    """Run ``python -m tests.faults`` and return the rows of its table."""
    command = [sys.executable, "-m", "tests.faults", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return cells(done.stdout.splitlines())[2:]


@pytest.mark.slow  # starts processes
def test_some_kills_and_power_cuts_change_no_bit():
    rows = faults("--sample", "3", "--only", "train")
    assert {row[1] for row in rows} == {"kill", "kept", "undone", "mixed"}


@pytest.mark.nightly
def test_kills_and_power_cuts_at_every_operation_change_no_bit():
    assert len(faults()) == 8 * 4
