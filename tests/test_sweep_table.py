"""The table of a sweep, from cells made by hand: every figure can be computed by another way."""

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml

from simulation.sweep_plot import write_plot
from simulation.sweep_table import level, markdown, rows_of, summary, write_table
from sparsecontrast.auditing import audit
from sparsecontrast.config import as_dict, compose
from sparsecontrast.errors import EvaluationError
from sparsecontrast.item_scores import Question, pooled, read_scores, write_scores
from sparsecontrast.membership import CANARIES, MEMBERSHIP, SCORES, SPLIT
from sparsecontrast.probes import Scored, auroc, bootstrap
from sparsecontrast.sweeps import Job

TASK, LABELS = "two findings", ("nodule", "mass")
ITEMS = np.array([f"film{i:03d}" for i in range(60)])
PATIENTS = np.array([f"p{i // 2:03d}" for i in range(60)])


def scored(quality, seed, count=60):
    """Scores whose AUROC grows with their quality."""
    rng = np.random.Generator(np.random.PCG64(seed))
    labels = (np.arange(count) % 3 == 0).astype(float)
    scores = quality * labels + rng.standard_normal(count)
    return Scored(scores[None], labels, PATIENTS[:count], np.array(["s"] * count), np.ones(1))


def found(quality, seed, canaries=0.0):
    """What a run leaves in ``scores.csv``."""
    told = {}
    for i, label in enumerate(LABELS):
        told[Question(TASK, label, "federated")] = (ITEMS, scored(quality, 10 * seed + i))
        told[Question(TASK, label, "start")] = (ITEMS, scored(0.3, 100 + 10 * seed + i))
    for score in SCORES:
        for against in (SPLIT, CANARIES):
            one = scored(canaries, 200 + seed, 40)
            told[Question(MEMBERSHIP, against, score)] = (PATIENTS[:40], replace(one, patients=ITEMS[:40]))
    return told


def cell(folder, values, quality, canaries=0.0, epsilon=None):
    """A run folder without a run: config, metrics and scores."""
    folder = folder / "-".join(values.values())
    (folder / "rounds").mkdir(parents=True)
    config = compose(["method=patch_contrast", f"output_dir={folder}"])
    record = {**as_dict(config), "overrides": list(config.overrides)}
    (folder / "config.yaml").write_text(yaml.safe_dump(record))
    told = (
        {}
        if epsilon is None
        else {"epsilon": epsilon, "delta": 1e-4, "noise_multiplier": 2.0, "noise_to_signal": 9.0}
    )
    rows = [{"round": 1, "site": site, **told} for site in ("a", "b")]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "evaluation.json").write_text(json.dumps({"round": 1, "membership": {"delta": 1e-4}}))
    write_scores(folder, found(quality, int(values["seed"]), canaries))
    return Job(folder.name, str(folder), (), values)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    return [
        cell(folder, {"epsilon": e, "start": start, "seed": s}, quality, leak, 8.0 if e == "8" else None)
        for e, quality, leak in (("8", 1.0, 0.0), ("inf", 2.5, 9.0))
        for start in ("random", "old")
        for s in ("0", "1", "2")
    ]  # fmt: skip


@pytest.fixture(scope="module")
def rows(jobs):
    return rows_of(jobs, 14)


def by_hand(quality, seeds=3, start=False):
    """Mean over seeds and labels."""
    one = [
        scored(0.3 if start else quality, (100 if start else 0) + 10 * seed + i)
        for seed in range(seeds)
        for i in range(2)
    ]
    return np.mean([auroc(c.scores[0], c.labels) for c in one])


def test_runs_of_all_seeds_are_one_row(rows):
    assert [row["group"] for row in rows] == [
        {"epsilon": e, "start": s} for e in ("8", "inf") for s in ("random", "old")
    ]
    assert {row["task"] for row in rows} == {TASK}
    for row, quality in zip(rows, (1.0, 1.0, 2.5, 2.5), strict=True):
        assert row["seeds"] == 3 and row["seed_values"] == ["0", "1", "2"]
        assert (
            row["auroc"] == pytest.approx(by_hand(quality)) == pytest.approx(np.mean(row["auroc_of_seeds"]))
        )
        assert row["start"] == pytest.approx(by_hand(0, start=True))
        assert row["gain"] == pytest.approx(row["auroc"] - row["start"])
        for key in ("auroc", "start", "gain", *(["membership"] if quality == 1 else [])):
            assert row[f"{key}_low"] < row[key] < row[f"{key}_high"]
    assert rows[2]["gain_low"] > 0


def test_who_beats_the_start_weights_is_said_in_words(jobs, tmp_path):
    # scores of the start have quality 0.3; the same scores again gain nothing
    again, worse = (tmp_path / name for name in ("again", "worse"))
    same = [cell(again, {"epsilon": "8", "start": "old", "seed": s}, 0.3, 0.0, 8.0) for s in ("0", "1", "2")]
    for job in same:
        told = read_scores(again / job.name)
        for question in [q for q in told if q.features == "federated"]:
            told[question]["score"] = told[question._replace(features="start")]["score"]
        write_scores(again / job.name, {q: (t["item"].to_numpy(), pooled([t])) for q, t in told.items()})
    less = [cell(worse, {"epsilon": "8", "start": "odd", "seed": s}, -3.0, 0.0, 8.0) for s in ("0", "1", "2")]
    strong = [job for job in jobs if job.values["epsilon"] == "inf" and job.values["start"] == "old"]
    rows = rows_of([*same, *less, *strong], 14)
    assert [row["beats_start"] for row in rows] == ["not shown", "worse", "apart"]
    assert rows[0]["gain"] == 0 and rows[2]["auroc_low"] > rows[2]["start_high"]
    begins, name = "groups against their own start,", f"old, {TASK}"
    assert summary(rows) == [
        f"At epsilon 8: of 2 {begins} 1 not shown ({name}), 1 worse (odd, {TASK})\n",
        f"Without privacy: of 1 {begins} 1 apart ({name})\n",
    ]
    assert summary(rows)[0] in write_table(rows, tmp_path, "x")


def test_a_gain_that_noise_alone_makes_too_is_told_from_learning(jobs, tmp_path):
    seeds = ("0", "1", "2")
    control = [cell(tmp_path, {"epsilon": "0.1", "start": "old", "seed": s}, 1.0, 0.0, 0.1) for s in seeds]
    alike, strong = (
        [job for job in jobs if job.values["epsilon"] == e and job.values["start"] == "old"]
        for e in ("8", "inf")
    )
    rows = rows_of([*control, *alike, *strong], 9)
    assert "over_noise" not in rows[0]  # the control itself
    assert rows[1]["gain"] > 0.1 and rows[1]["over_noise"] == 0  # the same scores as those of noise
    assert rows[2]["over_noise_low"] > 0
    assert rows[2]["over_noise"] == pytest.approx(rows[2]["auroc"] - rows[0]["auroc"])
    assert summary(rows)[-1] == f"Better than noise alone: 1 of 2: epsilon inf, old, {TASK}\n"
    lacking = rows_of([*control[:2], *strong], 9)  # seed 2 has no control
    assert "over_noise" not in lacking[1]


def test_an_interval_over_seeds_and_patients_is_wider_than_over_patients_alone():
    one, other = scored(1.0, 1), scored(2.5, 2)
    both = replace(one, scores=np.concatenate([one.scores, other.scores]), weights=np.full(2, 0.5))
    together, patients = level([both]), bootstrap([both], 1000, 0)
    assert together.value == pytest.approx(patients.value)
    assert width(together) > 1.05 * width(patients)
    # where seeds agree there is nothing to add
    same = replace(both, scores=np.concatenate([one.scores, one.scores]))
    assert width(level([same])) == pytest.approx(width(bootstrap([same], 1000, 0)))


def width(interval):
    return interval.high - interval.low


def test_the_promised_epsilon_is_the_worst_sites_and_the_audited_one_holds_for_all_seeds(rows, jobs):
    private, plain = rows[0], rows[2]
    assert (private["epsilon"], private["delta"], private["noise_multiplier"]) == (8.0, 1e-4, 2.0)
    assert private["noise_to_signal"] == 9.0
    assert "epsilon" not in plain
    bounds = []
    for seed in range(3):
        one = scored(9.0, 200 + seed, 40)
        both = np.concatenate([one.scores, one.scores])
        bounds.append(audit(both, one.labels == 1, 1e-4, 1 - 0.05 / 3).epsilon)
    assert plain["epsilon_at_least"] == max(bounds) > 0.5
    assert plain["epsilon_at_least"] <= plain["epsilon_ceiling"] + 1e-3
    assert private["epsilon_at_least"] == 0
    assert plain["canaries"] > 0.95 > private["canaries"]


def test_what_is_missing_is_said(jobs, rows, tmp_path):
    few = rows_of(jobs[:1], 14)
    assert few[0]["seeds"] == 1 and few[0]["auroc_low"] < few[0]["auroc"]
    assert "1 of 14 runs" in markdown(few)
    assert markdown([]) == "no run is done yet\n"
    assert write_plot([], tmp_path) is None


def test_seeds_that_were_scored_on_other_films_are_not_averaged(jobs, tmp_path):
    other = cell(tmp_path, {"epsilon": "8", "start": "random", "seed": "5"}, 1.0)
    told = found(1.0, 5)
    for question, (_, one) in told.items():
        told[question] = (np.array([f"other{i}" for i in range(len(one.labels))]), one)
    write_scores(tmp_path / other.name, told)
    with pytest.raises(EvaluationError, match="not scored on the same 60 items"):
        rows_of([jobs[0], other], 2)


def test_table_json_and_picture_are_written(rows, tmp_path):
    text = write_table(rows, tmp_path, "python -m simulation.sweep x")
    assert (tmp_path / "table.md").read_text() == text
    head, rule, *body = text.splitlines()
    assert head.startswith("| epsilon | start | task | seeds | AUROC |") and set(rule) <= set("| -")
    assert body[0].startswith(f"| 8 | random | {TASK} | 3 | {rows[0]['auroc']:.3f} [")
    assert "12 of 14 runs" in text
    told = json.loads((tmp_path / "sweep.json").read_text())
    assert told["command"] == "python -m simulation.sweep x" and told["rows"] == rows
    picture = write_plot(rows, tmp_path)
    assert picture is not None and picture.read_bytes().startswith(b"\x89PNG")
    plain = [row | {"group": {"tokens": "dense"}} for row in rows]
    assert write_plot(plain, tmp_path / "none") is None  # nothing stands along epsilon
