"""The cost of a run, a row or a result does not depend on how many came before: bytes are counted, not seconds."""

import statistics
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from benchmarks import growth
from benchmarks.__main__ import main
from cifar_fast.training.time_to_go import TimeToGo
from tests.helpers import cells

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system counts no bytes"),
    pytest.mark.usefixtures("no_curves"),
]


@pytest.mark.parametrize(("part", "count"), [(growth.runs, 20), (growth.fits, 8), (growth.rows, 400)])
def test_bytes_written_per_repetition_do_not_grow(tmp_path, part, count):
    written = [cost.written for cost in part(tmp_path, count)][1:]
    first, last = (statistics.fmean(some) for some in (written[: count // 4], written[-count // 4 :]))
    assert 0 < last < 1.05 * first, "the digits of a number may be more"


def test_bytes_written_for_a_result_of_a_report_do_not_grow(tmp_path, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **how: path.touch())  # drawing takes seconds
    few, many = growth.results(tmp_path, 40)
    assert 0 < many.written < 1.1 * few.written


def test_table_of_the_command_has_a_line_for_each_part(monkeypatch, capfd):
    monkeypatch.setattr(growth, "PARTS", {"row": (growth.rows, 100), "run": (growth.runs, 22)})
    assert main(["growth", "--share", "0.5"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[:2] == ["row", "run"] and len(lines) == 6, "no lines of the trainings"
    assert [row[:2] for row in cells(lines)[2:]] == [["row", "50"], ["run", "11"]]


def test_time_to_go_of_a_step_does_not_look_at_each_run():
    looks = []

    class Works(list):
        def __iter__(self):
            looks.append(1)
            return super().__iter__()

    to_go = TimeToGo({0: Works([1.0] * 1000)})
    to_go.begin(0, run=0, runs=1000)
    looks.clear()
    to_go.add(0.5)
    assert to_go.seconds() > 0 and not looks
