"""Fixture of the kernels' tests."""

import pytest

from tests.helpers import DEVICE


@pytest.fixture(params=["triton", "native"])
def engine(request, monkeypatch):
    """Run a test on Triton's kernels, and on a CPU also on the compiled C++."""
    if request.param == "native":
        if DEVICE.type == "cuda":
            pytest.skip("the test's tensors are on a GPU")
        monkeypatch.delenv("TRITON_INTERPRET")
    return request.param
