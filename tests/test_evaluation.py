"""A real tiny run, scored: what is refused, what is cached, what must not change a number."""

import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import timm
from safetensors.torch import save_file

from sparsecontrast import features
from sparsecontrast.checkpoint import read_round, round_file, write_round
from sparsecontrast.errors import (
    BackboneMismatchError,
    ConfigError,
    LabelError,
    MissingDataError,
    PatientLeakError,
    UntrainedError,
)
from sparsecontrast.evaluation import evaluate_run, run_dataset
from sparsecontrast.features import Baselines, encode, presented_images
from sparsecontrast.report import write_report
from sparsecontrast.runs import read_run
from sparsecontrast.tasks import Task, make_table
from sparsecontrast.trainer import TrainResult
from tests.tiny import make_run, say_federated

ALL = "evaluation.baselines=[pixels,random_init,local_only,centralised]"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return say_federated(make_run(tmp_path_factory.mktemp("eval") / "run"))


@pytest.fixture(scope="module")
def result(trained):
    return evaluate_run(trained, [ALL], show=False)


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_every_feature_set_is_scored_pooled_and_per_site(trained, result):
    rows = pd.DataFrame(result["rows"])
    assert list(dict.fromkeys(rows.features)) == [
        "federated",
        "pixels",
        "random_init",
        "local_only",
        "centralised",
    ]
    assert set(rows.site) == {"pooled", "hospital_00", "hospital_01", "hospital_02"}
    assert set(rows.fraction) == {0.5, 1.0} and set(rows.metric) == {"linear_probe_auroc", "knn_auroc"}
    assert rows.value.notna().any() and (rows.value.notna() | rows.reason.notna()).all()
    assert json.loads((trained / "evaluation.json").read_text()) == json.loads(json.dumps(result))
    assert {d["features"].split(" - ")[0] for d in result["differences"]} == {"federated"}


def test_the_same_evaluation_gives_the_same_numbers_and_trains_nothing_again(trained, result, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a kept baseline was trained again")

    monkeypatch.setattr(features.LocalTrainer, "run", refuse)
    again = evaluate_run(trained, [ALL], show=False)
    assert again["rows"] == result["rows"] and again["differences"] == result["differences"]


def test_a_torn_baseline_is_trained_again_to_the_same_weights(run, result):
    torn = sorted((run / "baselines").iterdir())[0]
    whole = torn.read_bytes()
    torn.write_bytes(whole[: len(whole) // 2])
    evaluate_run(run, [ALL], show=False)
    assert torn.read_bytes() == whole


def test_scores_do_not_depend_on_the_key_of_the_pseudonyms(run):
    dataset = run_dataset(read_run(run), show=False)
    frame = dataset.frame.assign(patient_id=[f"other-{p[::-1]}" for p in dataset.frame.patient_id])
    assert (make_table(dataset.frame).patients == make_table(frame).patients).all()


def test_budgets_match_what_the_federation_presented(trained, result):
    budgets = result["budgets"]
    presented = presented_images(read_run(trained))
    assert presented == {1: 72, 2: 72} and budgets["federated"] == {"rounds": 2, "images": 144}
    # a fresh draw of as many images, in whole batches of 8
    dataset = run_dataset(read_run(trained), show=False)
    pool = (dataset.frame.split == "train").sum()
    assert budgets["centralised"]["images"] == 2 * (min(72, pool) // 8) * 8


def test_the_data_of_other_sites_never_reach_a_site_alone(run):
    opened = read_run(run)
    dataset = run_dataset(opened, show=False)
    table = make_table(dataset.frame)
    seen = {}

    def spy(self, images, patients, number, rounds):
        seen.setdefault(self.site, set()).update(image.tobytes() for image in images)
        raise features.TooFewImagesError("seen enough")

    kept = features.LocalTrainer.run
    features.LocalTrainer.run = spy
    try:
        task = Task("t", (dataset.labels[0],))
        shutil.rmtree(run / "baselines", ignore_errors=True)
        found, _ = Baselines(opened, 2, dataset.images, table, [task]).make("local_only", lambda text: None)
    finally:
        features.LocalTrainer.run = kept
    assert found.models == () and sorted(seen) == ["hospital_00", "hospital_01", "hospital_02"]
    for site, images in seen.items():
        mine = (table.sites == site) & (table.splits == "train")
        assert images == {image.tobytes() for image in dataset.images[mine]}


def test_baselines_learn_from_the_sites_that_gave_the_run_a_round(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["site"] == "hospital_00":
            row["status"] = "refused"
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    opened = read_run(run)
    table = make_table(run_dataset(opened, show=False).frame)
    made = Baselines(opened, 2, np.zeros(0), table, [Task("t", ("nodule",))])
    assert set(table.sites[made._training_rows("")]) == {"hospital_01", "hospital_02"}
    assert made._models("local_only") == ["hospital_01", "hospital_02"]
    assert set(table.sites[made._training_rows("hospital_02")]) == {"hospital_02"}


def test_a_site_too_small_to_train_alone_is_a_reason(run, monkeypatch):
    train = features.LocalTrainer.run

    def fail_at_one(self, *args, **kwargs):
        if self.site == "hospital_01":
            raise features.TooFewImagesError("one patient")
        return train(self, *args, **kwargs)

    monkeypatch.setattr(features.LocalTrainer, "run", fail_at_one)
    shutil.rmtree(run / "baselines")
    rows = pd.DataFrame(evaluate_run(run, ["evaluation.baselines=[local_only]"], show=False)["rows"])
    cell = rows.query("features=='local_only' and site=='hospital_01'")
    reasons = set(cell.reason[cell.label != "macro"])
    assert "not computable: no model was trained at these sites" in reasons and cell.value.isna().all()
    assert rows.query("features=='local_only' and site=='pooled' and label=='macro'").value.notna().all()


def test_keep_changes_what_the_run_sees_but_not_the_pixels(run, result):
    sparse = evaluate_run(run, ["evaluation.keep=0.7", "evaluation.baselines=[pixels]"], show=False)
    assert sparse["keep"] == 0.7
    dense = {
        (r["features"], r["label"], r["site"], r["fraction"], r["metric"]): r["value"] for r in result["rows"]
    }
    changed = {"federated": 0, "pixels": 0}
    for r in sparse["rows"]:
        key = (r["features"], r["label"], r["site"], r["fraction"], r["metric"])
        changed[r["features"]] += dense[key] != r["value"]
    assert changed["federated"] > 0 == changed["pixels"]


def test_two_runs_are_paired_on_the_same_patients(trained, run):
    tensors = read_round(run, 2).tensors
    write_round(run, 2, {n: t + 0.05 if t.dim() == 1 else t for n, t in tensors.items()}, {"rows": []})
    found = evaluate_run(trained, ["evaluation.baselines=[pixels]"], show=False, against=[run])
    assert found["features"] == ["federated", "run", "pixels"]
    assert "federated - run" in {d["features"] for d in found["differences"]}
    with pytest.raises(ConfigError, match="other data"):
        evaluate_run(trained, ["data.phantom.seed=5"], show=False, against=[run])


def test_a_moved_run_folder_is_scored_where_it_lies(run, result):
    moved = evaluate_run(run, [ALL], show=False)
    assert moved["rows"] == result["rows"]


def test_an_untrained_run_is_refused(run):
    for path in (run / "rounds").glob("round_000[12]*"):
        path.unlink()
    with pytest.raises(UntrainedError, match="no round was trained"):
        evaluate_run(run, show=False)


def test_weights_equal_to_the_initial_ones_are_refused(run):
    write_round(run, 2, read_round(run, 0).tensors, {"rows": []})
    with pytest.raises(UntrainedError, match="nothing was learnt"):
        evaluate_run(run, show=False)


def test_a_torn_last_round_is_skipped(run):
    path = round_file(run, 2)
    path.write_bytes(path.read_bytes()[:100])
    found = evaluate_run(run, ["evaluation.baselines=[]"], show=False)
    assert found["round"] == 1


@pytest.mark.parametrize(("words", "error", "match"), [
    (["backbone.depth=2"], BackboneMismatchError, "do not fit"),
    (["evaluation.baselines=[imagenet]"], ConfigError, "unknown.*known: pixels"),
    (["evaluation.tasks=[{name: t, label: gout}]"], LabelError, "known: .*nodule"),
    (["evaluation.tsaks=[]"], ConfigError, "tsaks"),
    (["evaluation.keep=some"], ConfigError, "evaluation.keep=some: must be dense"),
    (["evaluation.keep=0.1"], ConfigError, r"number in \[0.25, 1\]"),
    (["evaluation.label_fractions=[0,1]"], ConfigError, "label_fractions"),
    (["evaluation.knn_neighbours=0"], ConfigError, "knn_neighbours=0"),
    (["evaluation.bootstrap=0"], ConfigError, "bootstrap=0"),
])  # fmt: skip
def test_what_cannot_be_scored_is_refused_by_name(run, words, error, match):
    with pytest.raises(error, match=match):
        evaluate_run(run, words, show=False)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(MissingDataError, match="no run folder"):
        evaluate_run(tmp_path, show=False)


def test_a_patient_in_two_splits_is_refused(run):
    dataset = run_dataset(read_run(run), show=False)
    frame = dataset.frame.copy()
    frame["patient_id"] = np.where(np.arange(len(frame)) < 2, "shared", frame.patient_id)
    frame.loc[0, "split"], frame.loc[1, "split"] = "train", "test"
    frame.to_csv(run / "index.csv", index=False)
    with pytest.raises(PatientLeakError, match="two splits"):
        evaluate_run(run, [f"data.index={run / 'index.csv'}"], show=False)


def test_sites_are_those_of_the_partition_and_a_changed_data_set_is_refused(run):
    dataset = run_dataset(read_run(run), show=False)
    table = pd.DataFrame({"image_id": dataset.frame.image_id, "site": "one_of_two"})
    table.loc[::2, "site"] = "two_of_two"
    table.to_csv(run / "partition.csv", index=False)
    rows = evaluate_run(run, ["evaluation.baselines=[]"], show=False)["rows"]
    assert {r["site"] for r in rows} == {"pooled", "one_of_two", "two_of_two"}
    table.iloc[3:].to_csv(run / "partition.csv", index=False)
    with pytest.raises(PatientLeakError, match="3 of .* images are not in partition.csv"):
        evaluate_run(run, ["evaluation.baselines=[]"], show=False)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A run that started from given weights, whose file is gone since."""
    folder = tmp_path_factory.mktemp("started")
    weights = folder / "weights.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", depth=1).state_dict(), weights)
    run = make_run(folder / "run", f"backbone.pretrained={weights}")
    weights.unlink()
    return run


def test_given_start_weights_are_not_needed_to_evaluate_and_are_no_random_network(started, monkeypatch):
    evaluate_run(started, [ALL], show=False)
    opened = read_run(started)
    assert opened.config.backbone.pretrained  # with it the network could not be built any more
    images = run_dataset(opened, show=False).images[:5]
    untrained = opened.config
    untrained = dataclasses.replace(
        untrained, backbone=dataclasses.replace(untrained.backbone, pretrained=False)
    )
    found, _ = Baselines(opened, 2, images, None, ()).make("random_init", lambda text: None)  # type: ignore
    np.testing.assert_array_equal(found.models[0], encode(untrained, None, images, lambda text: None, "x"))


def test_trained_baselines_start_from_the_weights_that_the_run_started_from(started, monkeypatch):
    beginnings = []

    def spy(self, images, patients, number, rounds):
        beginnings.append({n: t.clone() for n, t in self.module.state_dict().items()})
        return TrainResult(len(images), 1, len(images), 0.0, {"loss": 0.0})

    monkeypatch.setattr(features.LocalTrainer, "run", spy)
    shutil.rmtree(started / "baselines", ignore_errors=True)
    evaluate_run(started, ["evaluation.baselines=[centralised]"], show=False)
    first = read_round(started, 0).tensors
    assert all((beginnings[0][name] == tensor).all() for name, tensor in first.items())
    shutil.rmtree(started / "baselines")


def test_a_run_that_ends_with_its_given_start_weights_is_refused(started, tmp_path):
    run = shutil.copytree(started, tmp_path / "run")
    write_round(run, 2, read_round(run, 0).tensors, {"rows": []})
    with pytest.raises(UntrainedError, match="nothing was learnt"):
        evaluate_run(run, show=False)


def test_encoding_does_not_depend_on_the_batch(trained, monkeypatch):
    opened = read_run(trained)
    images = run_dataset(opened, show=False).images[:7]
    tensors = read_round(trained, 2).tensors
    whole = encode(opened.config, tensors, images, lambda text: None, "x")
    monkeypatch.setattr(features, "BATCH", 2)
    np.testing.assert_allclose(
        encode(opened.config, tensors, images, lambda text: None, "x"), whole, atol=1e-5
    )
    assert whole.shape == (7, 2 * 192)


@pytest.mark.parametrize(
    ("word", "width"),
    [
        ("method=dense_contrast", 192),
        *((f"selection={name}", 2 * 192) for name in ("attention", "random", "centre", "energy")),
    ],
)
@pytest.mark.parametrize("keep", ["dense", "0.5"])
def test_every_selection_and_the_dense_method_are_scored_and_reported(chosen, word, width, keep):
    run = chosen(word)
    result = evaluate_run(run, [f"evaluation.keep={keep}"], show=False)
    rows = pd.DataFrame(result["rows"])
    assert set(rows.features) == {"pretrained", "pixels", "random_init"}
    assert rows.value.notna().groupby(rows.features).any().all()
    assert result["selection"]["chance"] == (1 if "dense" in word else 5 / 16)
    opened = read_run(run)
    assert f"selection {opened.config.method.selection}" in write_report(run).read_text()
    images = run_dataset(opened, show=False).images[:3]
    for tensors in (read_round(run, 1).tensors, None):  # trained, and not
        assert encode(opened.config, tensors, images, lambda text: None, "x").shape == (3, width)


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """Make one run of a round for each word, once."""
    made = {}

    def make(word):
        if word not in made:
            folder = tmp_path_factory.mktemp("chosen") / "run"
            made[word] = make_run(folder, "federation.rounds=1", word)
        return made[word]

    return make
