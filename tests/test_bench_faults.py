"""The fault matrix: it sees what is not withstood, goes on where it stopped, and its fast part holds."""

import json

import pytest

from benchmarks import faults
from benchmarks.fault_cases import inputs, replies
from benchmarks.fault_cases.case import BrokenPromiseError, Case, expect, judge


def case(work):
    return Case("group", "a fault, 1e6!", work)


def test_a_case_is_judged_once_and_a_failed_one_again_when_asked(tmp_path):
    calls = []

    def flaky(folder):
        assert folder.is_dir() and not list(folder.iterdir())
        calls.append(folder)
        expect(len(calls) > 1, "lost  a\nsite")
        return {"found": "named", "sites": 9}

    row = judge(case(flaky), tmp_path)
    assert (row["held"], row["found"], row["fault"]) == (False, "lost a site", "a fault, 1e6!")
    assert judge(case(flaky), tmp_path) == row and len(calls) == 1
    row = judge(case(flaky), tmp_path, again=True)
    assert (row["held"], row["sites"]) == (True, 9)
    assert judge(case(flaky), tmp_path, again=True) == row and len(calls) == 2


def test_an_exception_that_nobody_foresaw_is_a_failed_case(tmp_path):
    row = judge(case(lambda folder: {}["no"]), tmp_path)
    assert not row["held"] and row["found"] == "KeyError: 'no'"


def test_replies_are_refused_and_an_honest_one_would_be_seen_to_pass(tmp_path, monkeypatch):
    monkeypatch.setitem(replies.LIES, "harmless", ("weights", lambda told: None, "payload_norm"))
    chosen = ("the answer of the round before", "harmless")
    monkeypatch.setattr(replies, "QUICK", chosen)
    rows = {row["fault"]: row for row in faults.run_group("replies", tmp_path, quick=True)}
    assert set(rows) == {*chosen, replies.PICKLED}
    assert not rows["harmless"]["held"] and "refused: {}" in rows.pop("harmless")["found"]
    assert all(row["held"] for row in rows.values()), rows


def test_the_fast_groups_hold_and_the_rows_are_written(tmp_path, capsys):
    file = tmp_path / "faults.json"
    assert faults.main(["--quick", "--only", "inputs", "--json", str(file)]) == 0
    told = json.loads(file.read_text())
    assert told["command"] == "python -m benchmarks.faults --quick --only inputs"
    assert f"inputs: {len(told['rows'])} of {len(told['rows'])}" in capsys.readouterr().out


def test_a_sound_file_among_the_broken_ones_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "BROKEN", {"nothing": lambda data: data})
    with pytest.raises(BrokenPromiseError, match="taken for sound.*nothing, mlut_18.dcm"):
        inputs.broken(tmp_path, 2)
