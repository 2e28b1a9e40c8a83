"""benchmarks.auto_keep says what an evaluation with keep=auto says, of every promise."""

import json

import numpy as np
import pytest
import torch

from benchmarks import auto_keep
from sparsecontrast.auto_encode import encode_auto
from sparsecontrast.errors import ConfigError
from sparsecontrast.evaluation import run_dataset
from sparsecontrast.features import trained_round
from sparsecontrast.runs import read_run
from sparsecontrast.scoring import Scorer
from sparsecontrast.tasks import make_table
from tests.tiny import make_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    words = ("data.val_fraction=0.4", "data.phantom.patients_per_site=24")
    folder = tmp_path_factory.mktemp("auto")
    return [make_run(folder / str(seed), *words, f"seed={seed}") for seed in (0, 1)]


@pytest.fixture(scope="module")
def found(runs):
    return auto_keep.read_all([read_run(folder) for folder in runs])


def test_a_promise_is_kept_as_the_evaluation_keeps_it(runs, found):
    ladders, table, tasks = found
    judge = auto_keep.Judge(Scorer((1.0,), 20, 50, 0), table, tasks, tuple(x.embeddings[-1] for x in ladders))
    row = auto_keep.promise(ladders, table, judge, 0.8, 0.2, 1)
    told = []
    for folder in runs:
        run = read_run(
            folder,
            ["evaluation.keep=auto", "evaluation.auto.confidence=0.8", "evaluation.auto.tolerance=0.2"],
        )
        dataset = run_dataset(run, show=False)
        tensors = trained_round(run).tensors
        told.append(
            encode_auto(run.config, tensors, dataset.images, make_table(dataset.frame), print, "x")[1]
        )
    assert row["share"] == pytest.approx(np.mean([t["mean_share"] for t in told]), abs=1e-3)
    assert row["share"] < 1 and row["dense_runs"] == 0
    assert row["measured_risk"] == pytest.approx(np.mean([t["risk"] for t in told]), abs=1e-3)
    assert row["worst_risk"] == pytest.approx(max(t["risk"] for t in told), abs=1e-3)
    assert row["allowed_risk"] == pytest.approx(0.2)


def test_every_share_is_scored_and_dense_is_dense(found):
    ladders, table, tasks = found
    rows = auto_keep.measure(ladders, table, tasks)
    fixed = [row for row in rows if row["keep"] == "fixed"]
    assert len(rows) == 12 + len(fixed) and len(fixed) == len(ladders[0].reader.cells)
    assert fixed[-1]["share"] == 1 and fixed[-1]["minus_dense"] == 0
    assert [row["share"] for row in fixed] == sorted(row["share"] for row in fixed)
    for row in rows:
        assert row["runs"] == 2 and row["time_of_dense"] > 0 and row["time_of_dense_one"] > 0
        assert row["minus_dense_low"] <= row["minus_dense"] <= row["minus_dense_high"]
    nothing = next(row for row in rows if row.get("confidence") == 0.99)  # of so few patients
    assert nothing["dense_runs"] == 2 and nothing["share"] == 1 and nothing["minus_dense"] == 0


def test_runs_of_other_splits_do_not_pair(runs, tmp_path):
    other = make_run(tmp_path / "other", "data.val_fraction=0.2", "data.phantom.patients_per_site=24")
    with pytest.raises(ConfigError, match="not those of"):
        auto_keep.read_all([read_run(runs[0]), read_run(other)])


def test_the_command_writes_its_rows(runs, tmp_path):
    threads = torch.get_num_threads()
    auto_keep.main([str(runs[0]), str(runs[1]), "--quick", "--json", str(tmp_path / "found.json")])
    torch.set_num_threads(threads)
    told = json.loads((tmp_path / "found.json").read_text())
    assert [row["keep"] for row in told["rows"]] == ["auto", "fixed"]
    assert told["command"] == "python -m benchmarks.auto_keep RUN_0 RUN_1 --quick"
    assert str(tmp_path) not in json.dumps(told)
