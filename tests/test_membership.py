"""Membership inference: blind where nothing was learnt, and sees what was memorised."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sparsecontrast import membership
from sparsecontrast.auditing import audit
from sparsecontrast.checkpoint import read_round
from sparsecontrast.config import compose
from sparsecontrast.errors import ConfigError
from sparsecontrast.evaluation import evaluate_run, run_dataset
from sparsecontrast.item_scores import Question, pooled, read_scores
from sparsecontrast.membership import CANARIES, MEMBERSHIP, SCORES, SPLIT, image_losses
from sparsecontrast.overrides import assign
from sparsecontrast.probes import auroc
from sparsecontrast.runs import read_run
from tests.tiny import make_run

AUDIT = ("method=patch_contrast", "train.crop_area=[1.0,1.0]", "train.rotation=0", "audit.views=4",
         "evaluation.tasks=[{name: odd, label: odd}]", "evaluation.baselines=[start]",
         "evaluation.bootstrap=200", "train.weight_decay=0.0")  # fmt: skip


def noise_index(folder, patients):
    """Two films of noise for each patient: nothing to learn, all to memorise."""
    generator = np.random.Generator(np.random.PCG64(7))
    rows = []
    for number in range(2 * patients):
        path, owner = folder / f"{number:03d}.png", number // 2
        blocks = np.kron(generator.integers(0, 256, (8, 8)), np.ones((4, 4))).astype(np.uint8)
        Image.fromarray(blocks).save(path)
        split, coin = (*(("train", c) for c in ("in", "out", "", "out")), ("test", ""), ("val", ""))[
            owner % 6
        ]
        rows.append({"image_id": f"i{number}", "path": str(path), "patient_id": f"p{owner}", "split": split,
                     "study_id": f"s{number}", "site": "ab"[owner // 6 % 2], "canary": coin})  # fmt: skip
    frame = pd.DataFrame(rows).assign(
        view="PA", height=32, width=32, boxes="[]", label_odd=lambda f: np.arange(len(f)) % 2
    )
    frame.to_csv(folder / "index.csv", index=False)
    return folder / "index.csv"


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return noise_index(tmp_path_factory.mktemp("films"), 36)


@pytest.fixture(scope="module")
def memorised(index, tmp_path_factory):
    """A network that has seen the same 24 films 165 times."""
    told = ("federation.rounds=3", "train.local_epochs=55", "train.batch_size=24", "train.lr=0.01")
    folder = tmp_path_factory.mktemp("memorised") / "run"
    return make_run(folder, *AUDIT, *told, assign("data.index", index))


@pytest.fixture(scope="module")
def evaluated(memorised):
    return evaluate_run(memorised, show=False)


def row_of(result, against, score):
    (row,) = [r for r in result["membership"]["rows"] if (r["against"], r["score"]) == (against, score)]
    return row


@pytest.mark.parametrize("against", [SPLIT, CANARIES])
@pytest.mark.parametrize("score", ["loss", "calibrated"])
def test_memorised_patients_are_found(evaluated, against, score):
    row = row_of(evaluated, against, score)
    assert row["value"] > 0.9 and row["low"] > 0.6
    assert (row["members"], row["others"]) == {SPLIT: (12, 6), CANARIES: (6, 12)}[against]


def test_a_fresh_network_tells_nothing(tmp_path):
    """On ten times the films: of eighteen patients, six may well be the hardest ones by chance."""
    folder = make_run(tmp_path / "run", *AUDIT, assign("data.index", noise_index(tmp_path, 360)))
    run, first = read_run(folder), read_round(folder, 0)
    told, _ = membership.membership(run, first, run_dataset(run, show=False), None)
    rows = told["rows"]
    assert [r["members"] + r["others"] for r in rows] == [180] * 4
    for row in rows:
        assert abs(row["value"] - 0.5) < 0.2  # more than four standard deviations of 120 against 60
    # under the start weights themselves nothing is left of a calibrated loss: all are equal
    assert [r["value"] for r in rows if r["score"] == "calibrated"] == [0.5, 0.5]


def test_a_loss_depends_on_the_image_and_its_place_alone(memorised):
    run = read_run(memorised)
    images = run_dataset(run, show=False).images
    weights = read_round(memorised, 3).tensors
    whole = image_losses(run.config, weights, images)
    again = image_losses(run.config, weights, np.concatenate([images[:10], images[:9:-1]]))
    np.testing.assert_allclose(whole[:10], again[:10], rtol=1e-4)
    assert len(np.unique(whole)) == len(whole) == len(images)


def test_a_patient_scores_the_mean_of_their_films_and_is_compared_within_a_site(memorised, evaluated):
    run = read_run(memorised)
    dataset = run_dataset(run, show=False)
    asked = (dataset.frame["split"] != "val").to_numpy()
    losses = image_losses(run.config, read_round(memorised, 3).tensors, dataset.images[asked])
    frame = dataset.frame[asked].assign(loss=losses)
    expected = frame[frame["canary"] != ""].groupby("patient_id").agg(
        loss=("loss", "mean"), site=("site", "first"), coin=("canary", "first")
    )  # fmt: skip
    kept = read_scores(memorised)[Question(MEMBERSHIP, CANARIES, "loss")]
    np.testing.assert_allclose(np.sort(kept["score"]), np.sort(-expected["loss"]), rtol=1e-12)
    value = auroc(-expected["loss"].to_numpy(), (expected["coin"] == "in").to_numpy(), expected["site"])
    assert row_of(evaluated, CANARIES, "loss")["value"] == pytest.approx(value)


def test_scores_behind_the_probes_give_their_auroc(memorised, evaluated):
    found = read_scores(memorised)
    for features in ("pretrained", "start"):
        one = pooled([found[Question("odd", "odd", features)]])
        (row,) = [r for r in evaluated["rows"] if r["features"] == features and r["site"] == "pooled"
                  and r["metric"] == "linear_probe_auroc" and r["fraction"] == 1.0]  # fmt: skip
        assert auroc(one.scores[0], one.labels, one.strata) == pytest.approx(row["value"])
        assert len(set(one.patients)) == row["n_patients"]


def test_a_method_that_couples_images_has_no_score():
    with pytest.raises(ConfigError, match="audit.views=2: method=sparse_contrast has no loss of a single"):
        compose(["audit.views=2"])


def test_what_memorised_canaries_prove_is_what_the_audit_says_of_their_scores(memorised, evaluated):
    told = evaluated["membership"]["canaries"]
    tables = [read_scores(memorised)[Question(MEMBERSHIP, CANARIES, score)] for score in SCORES]
    scores, coins = np.stack([t["score"] for t in tables]), tables[0]["truth"].to_numpy() == 1
    assert coins.sum() == 6 and len(coins) == 18
    found = audit(scores, coins, 1e-3, 0.95)  # the least delta for 12 patients at the smaller site
    assert (told["epsilon"], told["correct"]) == (found.epsilon, found.correct)
    assert (told["delta"], told["confidence"]) == (1e-3, 0.95)
    assert told["epsilon"] <= told["ceiling"]  # 18 coins prove nothing, however they are told
    assert auroc(scores[1], coins) > 0.9  # higher means trained on


def test_the_bound_is_at_the_delta_that_was_asked_for(memorised):
    run = read_run(memorised, ["audit.delta=1e-7"])
    told, _ = membership.membership(run, read_round(memorised, 3), run_dataset(run, show=False), None)
    assert told["delta"] == told["canaries"]["delta"] == 1e-7


def test_without_coins_nothing_is_proved(memorised):
    run = read_run(memorised)
    dataset = run_dataset(run, show=False)
    plain = dataclasses.replace(dataset, frame=dataset.frame.drop(columns="canary"))
    told, found = membership.membership(run, read_round(memorised, 3), plain, None)
    assert told["canaries"] is None and {q.label for q in found} == {SPLIT}
