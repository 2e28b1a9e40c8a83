"""Rows of scores on made-up features: what is compared, what is refused, what is nested."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from sparsecontrast import probes
from sparsecontrast.errors import ConfigError, LabelError, PatientLeakError
from sparsecontrast.scoring import METRICS, Features, Scorer
from sparsecontrast.tasks import Task, divisions, labelled_rows, make_table, parse_tasks


def make_frame(patients: int = 240, seed: int = 0) -> pd.DataFrame:
    """Two images a patient, three sites; ``rare`` has no positive at site c, ``odd`` is known at a only."""
    g = np.random.Generator(np.random.PCG64(seed))
    codes = np.repeat(np.arange(patients), 2)
    site = np.array(["a", "b", "c"])[codes % 3]
    split = np.array(["train", "train", "val", "test", "test", "train"])[(codes // 3) % 6]
    sick = (g.random(patients) < 0.4)[codes].astype(float)
    rare = np.where(site == "c", 0.0, (g.random(len(codes)) < 0.3).astype(float))
    odd = np.where(site == "a", (g.random(len(codes)) < 0.5).astype(float), np.nan)
    return pd.DataFrame({
        "image_id": [f"i{i}" for i in range(len(codes))], "patient_id": [f"p{c}" for c in codes],
        "site": site, "split": split, "label_sick": sick, "label_rare": rare, "label_odd": odd,
    })  # fmt: skip


def make_features(frame: pd.DataFrame, name: str, signal: float, seed: int = 1) -> Features:
    g = np.random.Generator(np.random.PCG64(seed))
    x = g.normal(size=(len(frame), 6))
    x[:, 0] += signal * frame["label_sick"]
    return Features(name, (x,))


SCORER = Scorer((0.1, 1.0), 5, 40, 0)


def score(frame, features, entries=()):
    table = make_table(frame)
    ticks = []
    rows, differences = SCORER.rows(features, table, parse_tasks(entries, table), ticks.append)
    assert ticks
    return pd.DataFrame(rows), pd.DataFrame(differences)


@pytest.fixture(scope="module")
def results():
    frame = make_frame()
    return frame, *score(frame, [make_features(frame, "trained", 2.0), make_features(frame, "noise", 0.0, 2)])


def test_rows_cover_every_cell_once(results):
    _, rows, _ = results
    keys = ["features", "task", "label", "site", "fraction", "metric"]
    assert not rows.duplicated(keys).any()
    # 2 feature sets, 3 labels + macro, pooled + 3 sites, 2 fractions, 2 metrics
    assert len(rows) == 2 * 4 * 4 * 2 * 2
    assert set(rows.metric) == set(METRICS)
    numbers = rows[rows.value.notna()]
    assert numbers.value.between(0, 1).all() and (numbers.low.dropna() <= numbers.high.dropna()).all()


def test_signal_is_found_and_noise_is_not(results):
    _, rows, differences = results
    cell = rows.query("label=='sick' and site=='pooled' and fraction==1 and metric=='linear_probe_auroc'")
    trained, noise = (cell[cell.features == name].iloc[0] for name in ("trained", "noise"))
    assert trained.low > 0.7 and noise.low < 0.5 < noise.high
    gap = differences.query("label=='sick' and fraction==1 and features=='trained - noise'").iloc[0]
    assert gap.value == pytest.approx(trained.value - noise.value) and gap.low > 0


def test_a_pooled_cell_is_the_probe_scored_by_hand(results):
    frame, rows, _ = results
    x, table = make_features(frame, "trained", 2.0).models[0], make_table(frame)
    y = table.labels["sick"]
    train, val, test = (np.flatnonzero(table.splits == s) for s in ("train", "val", "test"))
    probe = probes.fit_probe(x[train], y[train], table.patients[train], (x[val], y[val]))
    by_site = []
    for site in "abc":
        here = test[table.sites[test] == site]
        by_site.append(roc_auc_score(y[here], probe.scores(x[here])))
    query = "features=='trained' and label=='sick' and fraction==1 and metric=='linear_probe_auroc'"
    per_site = rows.query(query + " and site!='pooled'").sort_values("site").value
    np.testing.assert_allclose(per_site, by_site)
    pooled = rows.query(query + " and site=='pooled'").value.item()
    assert pooled == pytest.approx(probes.auroc(probe.scores(x[test]), y[test], table.sources[test]))


def test_a_label_absent_from_one_site_is_a_reason_not_a_crash(results):
    _, rows, _ = results
    at_c = rows.query("label=='rare' and site=='c'")
    assert at_c.value.isna().all() and set(at_c.reason) == {"not computable: no positives"}
    unlabelled = rows.query("label=='odd' and site=='b'")
    assert set(unlabelled.reason) == {"not computable: no labelled image is held out"}
    macro = rows.query("label=='macro' and site=='c' and fraction==1")
    assert (macro.labels_used == 1).all() and (macro.labels_asked == 3).all() and macro.value.notna().all()


def test_macro_is_the_mean_of_its_labels(results):
    _, rows, _ = results
    some = rows.query("features=='trained' and site=='pooled' and fraction==1 and metric=='knn_auroc'")
    labels = some[some.label != "macro"].value
    assert some[some.label == "macro"].value.item() == pytest.approx(labels.mean())


def test_a_budget_of_one_class_is_a_reason():
    frame = make_frame(30)
    frame["label_sick"] = (frame.patient_id == "p0").astype(float)
    frame.loc[frame.patient_id.isin(["p9", "p10", "p11"]), "label_sick"] = 1.0  # of the test split
    rows, _ = score(frame, [make_features(frame, "x", 1.0)], [{"label": "sick", "name": "t"}])
    low = rows[(rows.fraction == 0.1) & (rows.site == "pooled")]
    assert set(low.reason) == {"not computable: the label budget buys patients of one class only"}


def test_task_within_a_source_where_and_cross_validation():
    frame = make_frame()
    frame["source_site"] = np.where(frame.site == "a", "origin_a", "rest")
    entries = [
        {"name": "within", "label": "sick", "site": "origin_a", "where": "odd"},
        {"name": "folds", "labels": ["sick", "rare"], "cross_validate": 4, "site": "rest"},
    ]
    table = make_table(frame)
    within, folds = parse_tasks(entries, table)
    rows = labelled_rows(within, "sick", table)
    assert (frame.site[rows] == "a").all() and (frame.label_odd[rows] == 1).all()
    parts = divisions(folds, labelled_rows(folds, "sick", table), table, 0)
    tested = np.concatenate([p.test for p in parts])
    assert sorted(tested) == sorted(labelled_rows(folds, "sick", table))
    for part in parts:
        assert not set(table.patients[part.train]) & set(table.patients[part.test])
    found, _ = score(frame, [make_features(frame, "x", 2.0)], entries)
    assert set(found.query("task=='within'").site) == {"origin_a"}
    assert (
        found.query(
            "task=='folds' and label=='sick' and fraction==1 and metric=='linear_probe_auroc'"
        ).low.item()
        > 0.6
    )
    assert found.query("task=='folds'").n_images.max() == len(tested)


def test_without_a_test_split_val_is_scored_and_never_chosen_on():
    frame = make_frame()
    frame = frame[frame.split != "test"].reset_index(drop=True)
    table = make_table(frame)
    (part,) = divisions(Task("t", ("sick",)), labelled_rows(Task("t", ("sick",)), "sick", table), table, 0)
    assert len(part.validation) == 0 and (table.splits[part.test] == "val").all()


def test_each_site_alone_is_judged_by_its_own_model():
    frame = make_frame()
    good, bad = make_features(frame, "", 3.0).models[0], make_features(frame, "", 0.0, 5).models[0]
    rows, _ = score(
        frame, [Features("local_only", (good, bad), ("a", "b"))], [{"name": "t", "label": "sick"}]
    )
    full = rows.query("fraction==1 and metric=='linear_probe_auroc'").set_index("site")
    assert full.value["a"] > 0.85 > 0.7 > full.value["b"]
    assert full.reason["c"] == "not computable: no model was trained at these sites"
    alone = [score(frame, [Features("x", (m,))], [{"name": "t", "label": "sick"}])[0] for m in (good, bad)]
    values = [
        r.query("site=='pooled' and fraction==1 and metric=='linear_probe_auroc'").value.item() for r in alone
    ]
    held = [((frame.site == s) & (frame.split == "test")).sum() for s in "ab"]
    assert full.value["pooled"] == pytest.approx(np.average(values, weights=held))


@pytest.mark.parametrize(("entry", "error", "words"), [
    ({"label": "sic"}, LabelError, r"\['sic'\].*known: \['odd', 'rare', 'sick'\]"),
    ({"label": "sick", "where": "none"}, LabelError, "none"),
    ({"label": "sick", "site": "z"}, ConfigError, r"known: \['a', 'b', 'c'\]"),
    ({"label": "sick", "labels": ["odd"]}, ConfigError, "either"),
    ({"labels": []}, LabelError, "known"),
    ({"label": "sick", "folds": 3}, ConfigError, "unknown"),
    ({"label": "sick", "cross_validate": 1}, ConfigError, "at least 2"),
])  # fmt: skip
def test_impossible_tasks_are_refused(entry, error, words):
    with pytest.raises(error, match=words):
        parse_tasks([entry], make_table(make_frame(12)))


def test_two_tasks_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="name of its own"):
        parse_tasks([{"label": "sick"}, {"label": "sick"}], make_table(make_frame(12)))


def test_data_without_labels_is_refused():
    frame = make_frame(12)[["image_id", "patient_id", "site", "split"]]
    with pytest.raises(LabelError, match="no label column"):
        parse_tasks([], make_table(frame))


def test_a_patient_in_two_splits_is_refused():
    frame = make_frame(12)
    frame.loc[0, "split"] = "test"
    with pytest.raises(PatientLeakError, match="1 patients stand in two splits"):
        make_table(frame)
