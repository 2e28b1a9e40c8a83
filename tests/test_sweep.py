"""A sweep killed in the middle and given again ends with what an undisturbed one ends with."""

import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from simulation import sweep
from simulation.cell import LOG, _continued, is_done
from sparsecontrast import checkpoint
from sparsecontrast.overrides import merge
from sparsecontrast.sweeps import plan

ROOT = Path(__file__).parents[1]
TINY = (
    "experiment=privacy_sweep", "seed=0", "images=phantoms", "tokens=sparse",
    "backbone.depth=1", "train.batch_size=8",
    "data.phantom.sites=2", "data.phantom.patients_per_site=24", "data.min_images=2",
    "federation.sites=2", "federation.rounds=2", "evaluation.bootstrap=20", "epsilon=8,inf",
    "start=random",
)  # fmt: skip


def told(folder, *words):
    return merge(TINY, [f"output_dir={folder}", *words])


def command(words):
    line = [sys.executable, "-m", "simulation.sweep", *words, "--workers", "1"]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def children(pid):
    """Process ids of a process, its children, and theirs."""
    own = Path(f"/proc/{pid}/task/{pid}/children")
    below = own.read_text().split() if own.exists() else []
    return [pid, *(one for child in below for one in children(child))]


def killed_when(words, file):
    """Give the command and kill its first process, as ``kill -9`` does, when a file appears."""
    with command(words) as process:
        try:
            while not file.exists():
                assert process.poll() is None, process.stdout.read()  # type: ignore[union-attr]
                time.sleep(0.005)
            return children(process.pid)
        finally:
            process.kill()


def gone(pid, seconds=20.0):
    """Whether a process ends within some seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        path = Path(f"/proc/{pid}/stat")
        if not path.exists() or path.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def results(folder):
    """All that a sweep computed: weights of every run, scores, and the table."""
    weights = {p.relative_to(folder): p.read_bytes() for p in folder.glob("**/rounds/*.safetensors")}
    scores = {p.relative_to(folder): p.read_text() for p in folder.glob("**/scores.csv")}
    return weights, scores, json.loads((folder / "sweep.json").read_text())["rows"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep that nobody disturbed: a private run and one without privacy."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert sweep.main([*told(folder), "--workers", "2"]) == 0
    return folder


@pytest.mark.e2e
def test_kill_nine_anywhere_and_the_same_command_give_the_same_results(whole, tmp_path):
    folder = tmp_path / "out"
    private, plain = plan(told(folder)).cells
    for job in (private, plain):
        family = killed_when(told(folder), checkpoint.round_file(Path(job.folder), 1, ".json"))
        assert len(family) >= 2  # the sweep, its run at work, and that one's workers
        assert all(gone(pid) for pid in family)
        assert not is_done(job)
    with command(told(folder)) as process:
        output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "2 runs, 1 of them done" in output
    assert results(folder) == results(whole)
    assert "continuing" in (Path(plain.folder) / LOG).read_text()
    assert "continuing" not in (Path(private.folder) / LOG).read_text()


@pytest.mark.e2e
def test_the_table_has_a_row_for_each_cell(whole):
    rows = json.loads((whole / "sweep.json").read_text())["rows"]
    assert [row["group"]["epsilon"] for row in rows] == ["8", "inf"]
    for row in rows:
        assert row["seeds"] == 1 and 0 < row["auroc"] < 1 and 0 < row["membership"] < 1
    private, plain = rows
    assert 7.9 < private["epsilon"] <= 8 and private["noise_multiplier"] > 0.3
    assert private["epsilon_at_least"] <= private["epsilon"] and "epsilon" not in plain
    assert private["start"] == plain["start"]  # the very same weights
    assert (whole / "sweep.png").stat().st_size > 1000 and "| 8 |" in (whole / "table.md").read_text()


@pytest.mark.e2e
def test_what_is_done_is_not_done_again_and_other_settings_are_refused(whole, capsys):
    before = {p: p.stat().st_mtime_ns for p in whole.glob("**/rounds/*")}
    found = plan(told(whole))
    assert all(is_done(job) for job in found.cells)
    assert sweep.main([*told(whole), "--workers", "1"]) == 0
    assert "2 runs, 2 of them done" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in whole.glob("**/rounds/*")} == before
    assert sweep.main(told(whole, "train.lr=0.5")) == 2
    assert "holds another run: train.lr was" in capsys.readouterr().err
    # another way of scoring is the same run, scored again
    assert not is_done(plan(told(whole, "evaluation.bootstrap=30")).cells[0])


@pytest.mark.e2e
def test_a_run_without_its_report_is_not_done(whole):
    cell = plan(told(whole)).cells[1]
    report = Path(cell.folder) / "report.html"
    aside = report.rename(report.with_suffix(".aside"))
    assert not is_done(cell)
    aside.rename(report)
    assert is_done(cell)


@pytest.mark.e2e
def test_a_killed_private_run_begins_anew_and_a_plain_one_goes_on(whole):
    private, plain = plan(told(whole)).cells
    for job, fresh in ((private, True), (plain, False)):
        longer = dataclasses.replace(job, words=(*job.words, "federation.rounds=3"))
        words, deletes = _continued(longer, Path(job.folder))
        assert deletes == fresh and any(w.startswith("resume=") for w in words) != fresh
        words, deletes = _continued(job, Path(job.folder))  # all trained: only scores are missing
        assert not deletes and any(w.startswith("resume=") for w in words)


def test_a_dry_run_lists_and_does_nothing(tmp_path, capsys):
    assert sweep.main([*told(tmp_path / "out", "start=pretrained"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("new ") for line in lines) == 3 and not (tmp_path / "out").exists()


@pytest.mark.e2e
def test_a_run_that_fails_does_not_stop_the_others(whole, monkeypatch, capsys):
    ends = {"8": 1, "inf": 0}  # exit statuses

    def start(job):
        process = multiprocessing.get_context("fork").Process(
            target=os._exit, args=(ends[job.values["epsilon"]],)
        )
        process.start()
        return sweep.Active(job, process, time.monotonic())

    monkeypatch.setattr(sweep, "_start", start)
    monkeypatch.setattr(sweep, "run_all", lambda found, workers: sweep._run_phase(found.cells, workers))
    assert sweep.main([*told(whole), "--workers", "1"]) == 1
    said = capsys.readouterr()
    assert "[1/2] FAILED" in said.out and "[2/2] done" in said.out
    private, _ = plan(told(whole)).cells
    last = [line for line in (Path(private.folder) / LOG).read_text().splitlines() if line.strip()][-1]
    assert f"failed: {private.name}: {last}" in said.err  # where and why, on one line


def test_impossible_words_are_found_before_anything_runs(tmp_path, capsys):
    assert sweep.main(told(tmp_path / "out", "backbone.depth=0,1")) == 2
    assert "backbone.depth=0" in capsys.readouterr().err and not (tmp_path / "out").exists()
