import os

import pytest

from benchmarks.alone import Alone, remote_clock
from benchmarks.stopwatch import interleave
from sparsecontrast.errors import MethodError


def note(folder):
    with open(folder / f"{os.getpid()}", "a") as file:
        file.write("x")


def build(folder):
    return {
        "work": [(1.0, lambda: note(folder)), (3.0, lambda: None)],
        "end": [(1.0, lambda: os._exit(7))],
    }


def refuse():
    raise MethodError("no such share")


def test_works_run_in_turn_in_processes_of_their_own(tmp_path):
    alone = {name: Alone(build, tmp_path) for name in ("dense", "ours")}
    assert [share for share, _ in alone["ours"].parts("work")] == [1.0, 3.0]
    works = {name: a.parts("work")[:1] for name, a in alone.items()}
    times = interleave(works, ["dense"], remote_clock, (3, 3), 0.0)
    assert {name: len(t.cost) for name, t in times.items()} == {"dense": 3, "ours": 3}
    pids = {str(a._process.pid) for a in alone.values()}
    assert {p.name for p in tmp_path.iterdir()} == pids and str(os.getpid()) not in pids
    for one in alone.values():
        one.close()
        assert one._process.exitcode == 0


def test_what_cannot_be_built_says_why_here():
    with pytest.raises(MethodError, match="no such share"):
        Alone(refuse)


def test_a_process_that_dies_is_an_error_not_a_hang():
    alone = Alone(build, None)
    with pytest.raises(RuntimeError, match="ended with 7"):
        alone.parts("end")[0][1]()
    alone.close()
