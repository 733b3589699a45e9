"""A small part of ``python -m tests.fuzz``, inside of this process."""

import pytest

from tests import fuzz


@pytest.mark.usefixtures("no_curves")
def test_mutated_files_are_read_or_refused_in_one_line(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed: the extra hf")
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: the extra hf")
    monkeypatch.setenv("CACHES", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    found = [(name, *fuzz.verdict(name, folder)) for name, _, folder in fuzz.inputs(tmp_path, 64, seed=1)]
    assert [one for one in found if one[1] in fuzz.FAILURES] == []
    assert {one[1] for one in found} == {"read", "refused"}
