"""The log of what left: whole after any crash, and broken for all to see after any change."""

import json
import os
import subprocess
import sys

import pytest

from sparsecontrast.egress import FILE, HEAD, TORN, EgressLog
from sparsecontrast.errors import EgressError, StorageError
from sparsecontrast.ledger import Ledger
from tests.ledgers import charged

FACTS = {"status": "ok", "round": 1, "run_key": "ab", "sha256": "0" * 64}


def filled(folder, rows=3):
    log = EgressLog(folder)
    for number in range(rows):
        log.append("train", FACTS | {"round": number + 1})
    return log


def test_rows_vouch_for_each_other_and_say_what_they_were_given(tmp_path):
    log = filled(tmp_path)
    rows = log.rows()
    assert [r.number for r in rows] == [1, 2, 3] and rows[2].previous == rows[1].hash
    assert rows[1].content.items() >= (FACTS | {"round": 2}).items() and "time" in rows[1].content
    assert log.verify() == rows[-1] == log.verify(f"3:{rows[2].hash}")
    with pytest.raises(EgressError, match="no row 3:"):
        log.verify("3:" + "0" * 64)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_changed_row_is_named_and_nothing_leaves_any_more(tmp_path, number):
    log = filled(tmp_path)
    lines = log.path.read_text().splitlines()
    lines[number] = lines[number].replace('\\"status\\":\\"ok\\"', '\\"status\\":\\"no\\"')
    log.path.write_text("\n".join(lines) + "\n")
    for use in (log.rows, log.verify, lambda: log.append("train", FACTS)):
        with pytest.raises(EgressError, match=f"row {number + 1} "):
            use()


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_log_that_lost_its_end_is_refused(tmp_path, kept):
    log = filled(tmp_path)
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join(lines[:kept]))
    with pytest.raises(EgressError, match="its end was cut off"):
        log.append("train", FACTS)


def test_a_log_made_anew_or_taken_away_is_refused(tmp_path):
    log, other = filled(tmp_path / "a"), EgressLog(tmp_path / "b")
    for number in range(4):
        other.append("query", FACTS | {"round": number})
    log.path.write_bytes(other.path.read_bytes())
    with pytest.raises(EgressError, match="made anew"):
        log.rows()
    log.path.unlink()
    for use in (log.rows, lambda: log.append("train", FACTS)):
        with pytest.raises(EgressError, match="missing"):
            use()
    with pytest.raises(EgressError, match="made by the first answer"):
        EgressLog(tmp_path / "c").rows()


@pytest.mark.parametrize("cut", [1, 40, 5])
def test_a_torn_line_is_set_aside_and_told(tmp_path, cut):
    """A crash in the middle of a row: that row never left; the bytes are kept, the chain goes on."""
    log = filled(tmp_path)
    whole = log.path.read_bytes()
    torn = whole.splitlines()[-1][:-cut]
    log.path.write_bytes(whole + torn)
    assert len(log.rows()) == 3
    log.append("train", FACTS)
    assert [r.kind for r in log.rows()] == ["train"] * 3 + ["torn", "train"]
    assert log.rows()[3].content["bytes"] == len(torn)
    assert (tmp_path / TORN).read_bytes() == torn + b"\n"


def test_a_head_that_is_behind_is_no_fault_and_a_damaged_one_is(tmp_path):
    log = filled(tmp_path, 2)
    head = log.head.read_bytes()
    log.append("train", FACTS)
    log.head.write_bytes(head)  # killed between row and head
    assert len(log.rows()) == 3
    log.append("train", FACTS)
    assert json.loads(log.head.read_bytes())["count"] == 4
    log.head.write_bytes(b"{")
    with pytest.raises(EgressError, match="damaged"):
        log.append("train", FACTS)


def cut_to(log, kept):
    """Delete the head, and all rows but the first."""
    log.head.unlink()
    lines = log.path.read_bytes().splitlines(keepends=True)
    if kept:
        log.path.write_bytes(b"".join(lines[:kept]))
    else:
        log.path.unlink()


@pytest.mark.parametrize("kept", [2, 3, 6])
def test_rows_without_a_head_are_refused(tmp_path, kept):
    log = filled(tmp_path, 6)
    cut_to(log, kept)
    for use in (log.rows, log.verify, lambda: log.append("train", FACTS)):
        with pytest.raises(EgressError, match="head.json: missing, but"):
            use()


@pytest.mark.parametrize("torn", [False, True])
def test_crashes_one_after_the_other_leave_no_two_rows_without_a_head(tmp_path, torn):
    """Killed between a row and its head, in one answer after the other; the first row may have been torn."""
    log, real = EgressLog(tmp_path), EgressLog._write_head

    def killed_at_head(number):
        calls = []

        def write(self, row):
            calls.append(row)
            if len(calls) == number:
                raise KeyboardInterrupt
            real(self, row)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EgressLog, "_write_head", write)
            with pytest.raises(KeyboardInterrupt):
                log.append("train", FACTS)

    if torn:
        log.path.write_bytes(b'{"body": ')
    else:
        killed_at_head(1)
        assert not log.head.exists() and len(log.rows()) == 1
    killed_at_head(2)
    assert json.loads(log.head.read_bytes())["count"] == 1 and len(log.rows()) == 2
    assert log.append("train", FACTS).number == 3


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_the_ledger_has_seen_a_log_that_was_cut_with_its_head(tmp_path, kept):
    charged(tmp_path)
    log = filled(tmp_path, 6)
    assert log.verify().number == 6 and Ledger(tmp_path).verify()
    cut_to(log, kept)
    says = "there were 6: its end was cut off" if kept == 1 else "missing, but"
    for use in (log.rows, log.verify, lambda: log.append("train", FACTS)):
        with pytest.raises(EgressError, match=says):
            use()
    assert log.begun()


def test_without_a_ledger_only_a_noted_row_tells_of_a_log_begun_anew(tmp_path):
    log = filled(tmp_path, 6)
    last = log.verify()
    cut_to(log, 0)
    assert not log.begun()
    log.append("hello", FACTS)
    assert log.verify().number == 1
    with pytest.raises(EgressError, match="no row 6:"):
        log.verify(f"{last.number}:{last.hash}")


def test_a_damaged_ledger_is_no_witness_and_stops_no_answer(tmp_path):
    """It says itself that it is damaged, to whoever needs it."""
    charged(tmp_path)
    log = filled(tmp_path, 2)
    Ledger(tmp_path).path.write_bytes(b"no database" * 500)
    log.append("train", FACTS)
    assert log.verify().number == 3


def test_a_full_disk_is_told_and_nothing_counts(tmp_path, monkeypatch):
    log = filled(tmp_path, 1)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        log.append("train", FACTS)


def test_processes_that_write_at_once_make_one_chain_and_survive_kills(tmp_path):
    """Twelve writers, a third of them killed with SIGKILL in the middle: the log stays whole."""
    code = (
        "import sys, pathlib; from sparsecontrast.egress import EgressLog\n"
        "log = EgressLog(pathlib.Path(sys.argv[1]))\n"
        "for n in range(10**6):\n"
        "    log.append('train', {'writer': sys.argv[2], 'n': n})\n"
        "    print(n, flush=True)\n"
        "    if n == int(sys.argv[3]): break\n"
    )
    told = []
    for wave in range(3):
        started = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(tmp_path), f"{wave}{i}", str(5 if i < 3 else 10**6)],
                stdout=subprocess.PIPE,
            )
            for i in range(4)
        ]
        for process in started[:3]:
            process.wait()
        started[3].kill()
        told += [process.communicate()[0].split() for process in started]
    rows = EgressLog(tmp_path).rows()
    counts = {}
    for row in rows:
        if row.kind == "train":
            counts[row.content["writer"]] = counts.get(row.content["writer"], 0) + 1
    assert len(counts) == 12
    # what a writer was told is in the log; the killed one may have one more that it was not told of
    for (_, logged), said in zip(sorted(counts.items()), told, strict=True):
        assert len(said) <= logged <= len(said) + 1
    assert EgressLog(tmp_path).verify() == rows[-1]
    assert {p.name for p in tmp_path.iterdir()} <= {FILE, HEAD, TORN, *(p.name for p in tmp_path.glob(".*"))}
