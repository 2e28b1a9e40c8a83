"""keep=auto: the threshold by brute force, the promise by simulation, rows one by one, a whole run."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from sparsecontrast import auto_encode, looked
from sparsecontrast.auto_encode import encode_auto, make_reader
from sparsecontrast.auto_keep import calibrate, failures, patient_weights, rungs_for, uncovered_mass
from sparsecontrast.checkpoint import read_round
from sparsecontrast.config import compose
from sparsecontrast.data.transforms import evaluation_view
from sparsecontrast.errors import ConfigError
from sparsecontrast.evaluation import evaluate_run, run_dataset
from sparsecontrast.export import export_run
from sparsecontrast.features import encode
from sparsecontrast.methods import build_method
from sparsecontrast.report import write_report
from sparsecontrast.runs import read_run
from sparsecontrast.tasks import make_table
from tests.tiny import WORDS, make_run, say_federated

SHARES = (0.25, 0.5, 0.75, 1.0)
TOLERANCE = 0.02
AUTO = ("evaluation.keep=auto", "evaluation.baselines=[pixels]")


def population(n, seed, images=1, noise=0.01):
    """Images whose distance grows with what is left out, and by luck: (distances, uncovered, patients)."""
    generator = np.random.default_rng(seed)
    patients = np.repeat(np.arange(n), images)
    spread = generator.uniform(0.1, 2, (len(patients), 1))
    uncovered = np.exp(-np.arange(4) / spread) * generator.uniform(0.5, 1, (len(patients), 1))
    uncovered[:, -1] = 0
    distances = 0.05 * uncovered + noise * generator.standard_normal(uncovered.shape)
    distances[:, -1] = 0
    return distances, uncovered, patients


def risk_by_hand(threshold, distances, uncovered, patients):
    """Mean over patients of the mean over images of the loss, image by image."""
    by_patient = {}
    for apart, masses, patient in zip(distances, uncovered, patients, strict=True):
        rung = next(r for r, mass in enumerate(masses) if mass <= threshold)
        by_patient.setdefault(patient, []).append(any(d > TOLERANCE for d in apart[rung:-1]))
    return np.mean([np.mean(losses) for losses in by_patient.values()])


@pytest.mark.parametrize("seed", range(20))
def test_the_threshold_is_the_largest_that_qualifies(seed):
    distances, uncovered, patients = population(25, seed, images=1 + seed % 3)
    alpha = (0.05, 0.1, 0.3)[seed % 3]
    found = calibrate(distances, uncovered, patients, SHARES, alpha, TOLERANCE)
    fits = [
        t
        for t in sorted({*uncovered.ravel().tolist(), 1.0})
        if 25 / 26 * risk_by_hand(t, distances, uncovered, patients) + 1 / 26 <= alpha + 1e-12
    ]
    rungs = rungs_for(uncovered, fits[-1]) if fits else np.full(len(patients), 3)
    rows = zip(distances, rungs, strict=True)
    gains = any(r < 3 and (apart[r:-1] <= TOLERANCE).all() for apart, r in rows)
    assert found.threshold == (fits[-1] if gains else None)
    assert (found.reason is None) == (found.threshold is not None) and found.patients == 25


@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_new_patients_are_off_no_more_often_than_was_allowed(alpha):
    realised, saved = [], []
    for seed in range(600):
        distances, uncovered, patients = population(31, seed, images=2)
        cut = patients < 30
        found = calibrate(distances[cut], uncovered[cut], patients[cut], SHARES, alpha, TOLERANCE)
        rungs = rungs_for(uncovered[~cut], found.threshold)
        off = distances[~cut][np.arange(2), rungs] > TOLERANCE
        realised.append(off.mean())
        saved.append(np.mean(np.array(SHARES)[rungs]))
    error = np.std(realised) / math.sqrt(len(realised))
    assert np.mean(realised) <= alpha + 3 * error
    assert np.mean(saved) < 0.95  # not by computing everything


def test_more_threshold_is_less_to_compute_and_more_risk():
    distances, uncovered, patients = population(60, 0, images=2, noise=0.03)
    found = calibrate(distances, uncovered, patients, SHARES, 0.2, TOLERANCE)
    shares, risks = [p.share for p in found.curve], [p.risk for p in found.curve]
    assert shares == sorted(shares, reverse=True) and risks == sorted(risks)
    assert shares[0] == 1 and risks[0] == 0 and shares[-1] == 0.25
    fixed = [p.risk for p in found.fixed]
    assert fixed == sorted(fixed, reverse=True) and fixed[-1] == 0
    thresholds = [
        calibrate(distances, uncovered, patients, SHARES, a, TOLERANCE).threshold or -1
        for a in (0.05, 0.1, 0.2, 0.4)
    ]
    assert thresholds == sorted(thresholds)


def test_a_rung_fails_where_a_rung_above_it_fails():
    distances = np.array([[0.0, 0.9, 0.0, 0.9], [0.9, 0.0, np.nan, 0.0], [0.9, 0.0, 0.0, 0.0]])
    assert failures(distances, 0.02).astype(int).tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]


def test_too_few_patients_mean_dense_and_the_number_that_is_needed():
    distances, uncovered, patients = population(18, 0, images=3)
    found = calibrate(0 * distances, uncovered, patients, SHARES, 1 - 0.95, TOLERANCE)
    assert found.threshold is None
    assert found.reason == "18 patients to calibrate on, where the confidence of 0.95 needs 19"
    distances, uncovered, patients = population(19, 0, images=3)
    assert calibrate(0 * distances, uncovered, patients, SHARES, 1 - 0.95, TOLERANCE).threshold == 1.0


def test_a_confidence_whose_complement_rounds_down_costs_no_patient():
    distances, uncovered, patients = population(9, 0)
    assert 1 - 0.9 < 0.1
    assert calibrate(0 * distances, uncovered, patients, SHARES, 1 - 0.9, TOLERANCE).threshold == 1.0


def test_where_nothing_is_close_all_is_dense_and_says_so():
    distances, uncovered, patients = population(40, 0)
    found = calibrate(distances + 1, uncovered, patients, SHARES, 0.05, TOLERANCE)
    assert found.threshold is None and "75 % of the tokens, 100 % of the embeddings are off" in found.reason
    assert (rungs_for(uncovered, found.threshold) == 3).all() and len(found.curve) > 1


def test_where_all_is_close_the_cheapest_rung_is_taken():
    distances, uncovered, patients = population(40, 0)
    found = calibrate(0 * distances, uncovered, patients, SHARES, 0.05, TOLERANCE)
    assert found.reason is None and (rungs_for(uncovered, found.threshold) == 0).all()


def test_a_single_rung_has_nothing_to_leave_out():
    found = calibrate(np.zeros((40, 1)), np.zeros((40, 1)), np.arange(40), (1.0,), 0.05, TOLERANCE)
    assert found.threshold is None and "nothing to leave out" in found.reason


def test_patients_weigh_the_same_however_many_images_they_have():
    weights = patient_weights(np.array(["a", "b", "a", "a"]))
    np.testing.assert_allclose(weights, [1 / 6, 1 / 2, 1 / 6, 1 / 6])


def test_uncovered_mass_is_what_the_highest_cells_leave():
    scores = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    masses = uncovered_mass(scores, (0, 1, 4, 9)).numpy()
    shares = np.sort(scores.double().softmax(1).numpy(), axis=1)[:, ::-1]
    for column, m in enumerate((0, 1, 4, 9)):
        np.testing.assert_allclose(masses[:, column], 1 - shares[:, :m].sum(1), atol=1e-12)
    assert (masses[:, -1] == 0).all() and (np.diff(masses, axis=1) <= 0).all() and masses.max() <= 1


BACKBONES = {
    "vit": [],
    "vit without focus": ["method.focus=false"],
    "cnn": ["backbone=convnext_atto", "backbone.img_size=64", "backbone.tiles=2"],
}


@pytest.mark.parametrize("words", BACKBONES.values(), ids=BACKBONES)
def test_grouped_by_rung_every_row_is_what_it_is_alone(words):
    base = [w for w in WORDS if not (words and "backbone" in words[0] and w.startswith("backbone."))]
    config = compose([*base, *words])
    method = build_method(config).eval()
    reader = make_reader(method)
    size = config.backbone.img_size
    images = torch.rand(12, size, size, generator=torch.Generator().manual_seed(1))
    images[:6] **= torch.arange(2, 8)[:, None, None]  # some with few bright pixels, so that they differ
    view = evaluation_view((255 * images).to(torch.uint8), size)
    uncovered = reader.compare(view)[1]
    threshold = float(np.median(uncovered[:, len(reader.cells) // 2]))
    together, rungs = reader.encode(view, threshold)
    assert len(set(rungs.tolist())) > 1
    for i in range(len(view)):
        alone, rung = reader.encode(view[i : i + 1], threshold)
        assert rung.tolist() == [rungs[i]]
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-4)
        expected = method.encode(view[i : i + 1], reader.shares[rung[0]])
        torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(reader.encode(view, None)[0], method.encode(view, "dense"))


@pytest.mark.parametrize(("words", "lowest"), [([], 0.25), (BACKBONES["cnn"], 0.25)], ids=["vit", "cnn"])
def test_the_ladder_rises_from_the_least_to_dense_and_shares_are_those_of_the_cells(words, lowest):
    base = [w for w in WORDS if not (words and w.startswith("backbone."))]
    backbone = build_method(compose([*base, *words])).backbone
    reader = make_reader(build_method(compose([*base, *words])))
    assert list(reader.cells) == sorted(set(reader.cells)) and reader.cells[-1] == backbone.num_cells
    assert (
        backbone.least_keep == lowest and reader.cells[0] == 1
    )  # one cell at least has something to focus on
    assert reader.shares[0] == backbone.share(1) and reader.shares[-1] == 1
    assert [backbone.kept_cells(share) for share in reader.shares] == list(reader.cells)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    words = ("data.val_fraction=0.4", "data.phantom.patients_per_site=24")
    return say_federated(make_run(tmp_path_factory.mktemp("auto") / "run", *words))


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_a_run_is_scored_at_auto_and_the_report_says_what_it_kept(run):
    words = [*AUTO, "evaluation.auto.confidence=0.8", "evaluation.auto.tolerance=0.2"]
    found = evaluate_run(run, words, show=False)["auto_keep"]["federated"]
    assert json.loads((run / "evaluation.json").read_text())["auto_keep"]["federated"] == found
    assert found["reason"] is None and 0 < found["threshold"] <= 1 and found["mean_share"] < 1
    assert (found["confidence"], found["tolerance"]) == (0.8, 0.2) and found["patients"] > 10
    assert sum(r["images"] for r in found["rungs"]) == found["scored_images"] > 0
    mean = sum(r["images"] * r["share"] for r in found["rungs"]) / found["scored_images"]
    assert found["mean_share"] == pytest.approx(mean) and 0 <= found["risk"] <= 1
    assert 0 <= found["risk_error"] < 0.5 and found["scored_patients"] < found["scored_images"]
    assert found["curve"][0] == {"share": 1.0, "risk": 0.0} and len(found["fixed"]) == len(found["rungs"])
    page = write_report(run, show=False).read_text()
    assert f"{100 * found['mean_share']:.0f} % of the tokens were computed on average" in page
    assert "at most 20 % of the images of new patients" in page and "share computed against risk" in page


def test_what_cannot_be_proven_is_dense_to_the_bit_and_gives_the_reason(run):
    words = [*AUTO, "evaluation.auto.confidence=0.99"]
    result = evaluate_run(run, words, show=False)
    found = result["auto_keep"]["federated"]
    assert found["threshold"] is None and found["mean_share"] == 1 and found["risk"] == 0
    assert "where the confidence of 0.99 needs 99" in found["reason"]
    assert result["rows"] == evaluate_run(run, ["evaluation.baselines=[pixels]"], show=False)["rows"]
    sentence = looked.auto_sentence(result)
    assert sentence.startswith("All tokens of every image were computed, because ")
    evaluate_run(run, words, show=False)
    assert sentence in write_report(run, show=False).read_text()


def test_a_fixed_share_says_nothing_of_auto(run):
    result = evaluate_run(run, ["evaluation.baselines=[]"], show=False)
    assert result["auto_keep"] == {} and looked.auto_sentence(result) == ""
    del result["auto_keep"]  # as written before there was auto
    assert looked.auto_sentence(result) == ""


def test_without_a_test_split_none_is_left_to_calibrate_on(run):
    words = [*AUTO, "data.test_fraction=0", "evaluation.auto.confidence=0.5"]
    opened = read_run(run, words)
    dataset = run_dataset(opened, show=False)
    table = make_table(dataset.frame)
    assert table.scored_split == "val"
    tensors = read_round(run, 2).tensors
    rows, found = encode_auto(opened.config, tensors, dataset.images, table, lambda text: None, "x")
    assert found["threshold"] is None and "no validation image is left" in found["reason"]
    dense = encode(opened.config, tensors, dataset.images, lambda text: None, "x")  # reads auto densely
    np.testing.assert_allclose(rows, dense, atol=1e-5)


def test_calibration_sees_no_scored_image(run):
    opened = read_run(run, [*AUTO, "evaluation.auto.confidence=0.8", "evaluation.auto.tolerance=0.2"])
    dataset = run_dataset(opened, show=False)
    table = make_table(dataset.frame)
    tensors = read_round(run, 2).tensors

    def read(images):
        return encode_auto(opened.config, tensors, images, table, lambda text: None, "x")

    rows, clean = read(dataset.images)
    poisoned = np.array(dataset.images)
    noise = np.random.default_rng(0).integers(0, 256, poisoned.shape, dtype=np.uint8)
    poisoned[table.splits != "val"] = noise[table.splits != "val"]
    other, dirty = read(poisoned)
    assert clean["threshold"] is not None
    assert all(clean[key] == dirty[key] for key in ("threshold", "curve", "fixed", "patients"))
    np.testing.assert_allclose(rows[table.splits == "val"], other[table.splits == "val"], atol=1e-5)
    assert np.abs(rows - other)[table.splits == "test"].max() > 1e-3


def test_progress_ends_where_it_said(run, monkeypatch):
    words = [*AUTO, "evaluation.baselines=[random_init]"]
    monkeypatch.setattr(auto_encode, "BATCH", 16)
    monkeypatch.setattr("sparsecontrast.features.BATCH", 16)
    monkeypatch.setattr("sparsecontrast.evaluation.BATCH", 16)
    counted = {}

    def count(title, total, show):
        import contextlib

        @contextlib.contextmanager
        def bar():
            done = []
            yield done.append
            counted[title] = (len(done), total)

        return bar()

    monkeypatch.setattr("sparsecontrast.evaluation.progress", count)
    evaluate_run(run, words, show=False)
    assert counted["Features"][0] == counted["Features"][1]


@pytest.mark.parametrize(("words", "match"), [
    (["evaluation.precision=int8"], "int8 scales by whole batches"),
    (["evaluation.auto.confidence=1"], "evaluation.auto.confidence=1"),
    (["evaluation.auto.tolerance=-0.1"], "evaluation.auto.tolerance=-0.1"),
    (["evaluation.auto.sureness=1"], "sureness"),
])  # fmt: skip
def test_what_auto_cannot_be_is_refused(words, match):
    with pytest.raises(ConfigError, match=match):
        compose(["evaluation.keep=auto", *words])


def test_a_graph_cannot_choose_a_share(trained, tmp_path):
    with pytest.raises(ConfigError, match="--keep auto.*give a number"):
        export_run(trained, tmp_path / "out", keep="auto")
    assert not (tmp_path / "out").exists()
