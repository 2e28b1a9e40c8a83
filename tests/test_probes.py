"""The statistics against scikit-learn and brute force."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sparsecontrast import probes
from sparsecontrast.probes import Scored


def rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def names(codes: np.ndarray) -> np.ndarray:
    return np.array([f"p{c}" for c in codes])


def make_cell(seed: int, n: int = 60, models: int = 1, strata: int = 1, ties: bool = True) -> Scored:
    g = rng(seed)
    labels = (g.random(n) < 0.4).astype(float)
    scores = labels + g.normal(size=(models, n))
    scores = np.round(scores, 1) if ties else scores
    weights = g.random(models)
    return Scored(
        scores, labels, names(g.integers(0, n // 2, n)), g.integers(0, strata, n), weights / weights.sum()
    )


def brute_force(scores, labels, strata):
    wins, pairs = 0.0, 0
    for i in np.flatnonzero(labels == 1):
        for j in np.flatnonzero((labels == 0) & (strata == strata[i])):
            wins += (scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j])
            pairs += 1
    return wins / pairs if pairs else np.nan


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("decimals", [0, 1, 8])
def test_auroc_equals_sklearn_with_ties(seed, decimals):
    g = rng(seed)
    labels = (g.random(80) < 0.3).astype(float)
    scores = np.round(labels + g.normal(size=80), decimals)
    assert probes.auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_auroc_compares_only_within_a_stratum(seed):
    cell = make_cell(seed, strata=4)
    expected = brute_force(cell.scores[0], cell.labels, cell.strata)
    assert probes.auroc(cell.scores[0], cell.labels, cell.strata) == pytest.approx(expected, abs=1e-12)


def test_telling_two_sources_apart_earns_nothing():
    source = np.repeat([0, 1], 100)
    labels = (rng(0).random(200) < np.where(source == 1, 0.9, 0.1)).astype(float)
    score = source.astype(float)
    assert probes.auroc(score, labels) > 0.8
    assert probes.auroc(score, labels, source) == 0.5


def test_auroc_of_one_class_is_nan():
    assert np.isnan(probes.auroc(np.arange(4.0), np.ones(4)))
    assert np.isnan(probes.auroc(np.arange(4.0), np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1])))


def test_bootstrap_equals_repeating_the_rows_of_the_drawn_patients(monkeypatch):
    monkeypatch.setattr(probes, "CHUNK", 200)  # several chunks
    cells = [make_cell(s, models=2, strata=2) for s in (1, 2)]
    counts = probes._PatientCounts(cells, 40, 7)
    expected = []
    for row in counts.counts:
        drawn = dict(zip(counts.names, row, strict=True))
        per_label = []
        for cell in cells:
            rows = np.repeat(np.arange(60), [drawn[p] for p in cell.patients])
            many = cell.select(rows)
            values = [brute_force(s, many.labels, many.strata) for s in many.scores]
            per_label.append(np.dot(values, cell.weights))
        expected.append(np.mean(per_label))
    np.testing.assert_allclose(counts.statistics(cells), expected, atol=1e-12)
    interval = probes.bootstrap(cells, 40, 7)
    np.testing.assert_allclose([interval.low, interval.high], np.percentile(expected, [2.5, 97.5]))
    assert interval.value == pytest.approx(probes.mean_auroc(cells))


def test_every_resample_draws_as_many_patients_as_there_are():
    counts = probes._PatientCounts([make_cell(0)], 25, 0)
    assert (counts.counts.sum(axis=1) == len(counts.names)).all()


def test_bootstrap_interval_is_wider_when_patients_bring_many_images():
    g = rng(3)
    labels = np.tile([0.0, 1.0], 30)
    scores = (labels + g.normal(size=60))[None]
    one = Scored(scores, labels, names(np.arange(60)), np.zeros(60), np.ones(1))
    copies = Scored(
        np.repeat(scores, 5, 1), np.repeat(labels, 5), np.repeat(one.patients, 5), np.zeros(300), np.ones(1)
    )
    a, b = probes.bootstrap([one], 300, 0), probes.bootstrap([copies], 300, 0)
    # Five copies of every image are no new evidence.
    assert (a.low, a.high) == pytest.approx((b.low, b.high))


def test_resamples_without_both_classes_are_counted_and_no_interval_is_invented():
    lonely = Scored(
        np.array([[1.0, 0, 0, 0]]), np.array([1.0, 0, 0, 0]), names(np.arange(4)), np.zeros(4), np.ones(1)
    )
    interval = probes.bootstrap([lonely], 400, 0)
    counts = probes._PatientCounts([lonely], 400, 0).counts
    assert interval.skipped == ((counts[:, 0] == 0) | (counts[:, 0] == 4)).sum() > 0
    assert interval.low == interval.high == 1.0
    two = [lonely, lonely.select(np.array([1, 0, 2, 3])).select(np.arange(4))]
    rare = [
        Scored(c.scores, c.labels, names(np.arange(4) + 4 * i), c.strata, c.weights)
        for i, c in enumerate(two * 2)
    ]
    assert probes.bootstrap(rare, 400, 0).low is None


def test_paired_bootstrap_is_narrower_than_the_parts_and_zero_on_itself():
    a = make_cell(5, n=200, ties=False)
    b = Scored(a.scores + 0.1 * rng(9).normal(size=a.scores.shape), a.labels, a.patients, a.strata, a.weights)
    same = probes.paired_bootstrap([a], [a], 200, 0)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    paired, alone = probes.paired_bootstrap([a], [b], 200, 0), probes.bootstrap([a], 200, 0)
    assert paired.high - paired.low < 0.5 * (alone.high - alone.low)
    assert paired.value == pytest.approx(probes.mean_auroc([a]) - probes.mean_auroc([b]))
    with pytest.raises(ValueError, match="same images"):
        probes.paired_bootstrap([a], [a.select(np.arange(200)[::-1])], 10, 0)


def test_seeds_bootstrap_resamples_models_in_pairs():
    a = make_cell(5, n=200, ties=False)
    models = np.stack([a.scores[0] + k * rng(k).normal(size=200) for k in (1, 2, 3)])
    one = Scored(models, a.labels, a.patients, a.strata, np.full(3, 1 / 3))
    worse = Scored(models + rng(9).normal(size=(3, 200)), a.labels, a.patients, a.strata, one.weights)
    same = probes.seeds_bootstrap([one], [one], 100, 0)
    assert (same.value, same.low, same.high) == (0, 0, 0)  # models are never compared across seeds
    both, patients = (f([one], [worse], 400, 0) for f in (probes.seeds_bootstrap, probes.paired_bootstrap))
    assert both.value == patients.value and both.low < both.value < both.high
    alike = Scored(np.repeat(models[:1], 3, 0), a.labels, a.patients, a.strata, one.weights)
    other = Scored(np.repeat(worse.scores[:1], 3, 0), a.labels, a.patients, a.strata, one.weights)
    whole, only = (f([alike], [other], 400, 0) for f in (probes.seeds_bootstrap, probes.paired_bootstrap))
    assert (whole.low, whole.high) == pytest.approx((only.low, only.high))  # equal models add nothing
    with pytest.raises(ValueError, match="same number of models"):
        probes.seeds_bootstrap([one], [a], 10, 0)


def test_knn_equals_sklearn_on_unit_rows():
    g = rng(0)
    train, queries, labels = (
        g.normal(size=(50, 6)),
        g.normal(size=(20, 6)),
        (g.random(50) < 0.5).astype(float),
    )
    scaler = StandardScaler().fit(train)
    model = KNeighborsClassifier(7, metric="cosine", algorithm="brute").fit(scaler.transform(train), labels)
    expected = model.predict_proba(scaler.transform(queries))[:, 1]
    np.testing.assert_allclose(probes.knn_scores(train, labels, queries, 7), expected)


def test_knn_with_more_neighbours_than_images_says_the_base_rate():
    g = rng(0)
    labels = np.array([1.0, 0, 0, 0])
    assert (probes.knn_scores(g.normal(size=(4, 3)), labels, g.normal(size=(5, 3)), 20) == 0.25).all()


def test_probe_equals_sklearn_pipeline_at_the_chosen_strength():
    g = rng(1)
    weights = np.array([5.0, -3, 0, 0, 0, 0, 0, 0])
    x, v = g.normal(3, 2, size=(120, 8)), g.normal(3, 2, size=(80, 8))
    y, truth = ((a @ weights + 6 * g.normal(size=len(a)) > 6).astype(float) for a in (x, v))
    probe = probes.fit_probe(x, y, names(np.arange(120)), (v, truth))
    quality = {}
    for c in probes.C_GRID:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=500)).fit(x, y)
        quality[c] = roc_auc_score(truth, model.decision_function(v))
    assert probe.chosen_by == "validation"
    assert quality[probe.c] == pytest.approx(max(quality.values()), abs=1e-3)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=probe.c, max_iter=500)).fit(x, y)
    np.testing.assert_allclose(probe.scores(v), model.decision_function(v), atol=1e-3)


def test_without_validation_classes_the_strength_comes_from_training_patients():
    g = rng(2)
    x, patients = g.normal(size=(90, 5)), names(np.arange(90) // 2)
    y = (x[:, 0] + 0.5 * g.normal(size=90) > 0).astype(float)
    one_class = (g.normal(size=(5, 5)), np.ones(5))
    assert probes.fit_probe(x, y, patients, one_class).chosen_by == "folds of the training patients"
    few = probes.fit_probe(x[:2], np.array([0.0, 1.0]), patients[[0, 2]])
    assert few.chosen_by.startswith("fixed") and np.isfinite(few.scores(x)).all()


def test_constant_features_do_not_divide_by_zero():
    x = np.c_[np.ones(20), np.arange(20.0)]
    probe = probes.fit_probe(x, (np.arange(20) > 9).astype(float), names(np.arange(20)))
    assert np.isfinite(probe.scores(x)).all() and probes.auroc(probe.scores(x), np.arange(20) > 9) == 1


def test_label_budgets_are_nested_whole_patients_and_ignore_row_order():
    patients = names(rng(0).integers(0, 300, 700))
    masks = [probes.label_budget(patients, f, 3) for f in (0.001, 0.01, 0.1, 1.0)]
    total = len(set(patients))
    for small, large in zip(masks, masks[1:], strict=False):
        assert (small <= large).all()
    assert [len(set(patients[m])) for m in masks] == [1, *(int(np.ceil(f * total)) for f in (0.01, 0.1, 1))]
    for mask in masks:
        assert not set(patients[mask]) & set(patients[~mask])
    shuffle = rng(1).permutation(700)
    assert (probes.label_budget(patients[shuffle], 0.1, 3) == masks[2][shuffle]).all()
    assert (probes.label_budget(patients, 0.1, 4) != masks[2]).any()


def test_folds_hold_whole_patients_and_are_balanced():
    patients = names(rng(0).integers(0, 103, 400))
    folds = probes.patient_folds(patients, 5, 0)
    sizes = [len(set(patients[folds == f])) for f in range(5)]
    assert max(sizes) - min(sizes) <= 1 and sum(sizes) == len(set(patients))


@pytest.mark.parametrize("size", [32, 40, 16])
def test_downsampled_pixels_average_areas(size):
    images = rng(0).integers(0, 256, size=(3, size, size)).astype(np.uint8)
    small = probes.downsampled_pixels(images, 16)
    assert small.shape == (3, 256)
    # Area weights keep the mean; on a multiple they are block means.
    np.testing.assert_allclose(small.mean(axis=1), images.mean(axis=(1, 2)) / 255, atol=1e-6)
    if size == 32:
        blocks = images.reshape(3, 16, 2, 16, 2).mean(axis=(2, 4)).reshape(3, 256) / 255
        np.testing.assert_allclose(small, blocks, atol=1e-6)
