"""Coins of an audit: fair, the same for the same files, and whoever draws tails is never trained on."""

import numpy as np
import pandas as pd
import pytest

from simulation import run as simulation
from simulation.canaries import toss
from simulation.partition import write
from sparsecontrast.config import compose
from sparsecontrast.data.dataset import held_out
from sparsecontrast.errors import ConfigError
from sparsecontrast.evaluation import run_dataset, run_sites
from sparsecontrast.features import Baselines
from sparsecontrast.pretrain import pretrain
from sparsecontrast.runs import read_run
from sparsecontrast.tasks import Task, make_table
from tests.federations import MODEL, partitions, rows, serve, words

PHANTOMS = (*MODEL, "federation.sites=2", "federation.rounds=1", "data.phantom.sites=2",
            "data.phantom.patients_per_site=16", "data.phantom.images_per_patient=3")  # fmt: skip


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr("server.roll.SETTLE_SECONDS", 0.0)


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    told = [*PHANTOMS, "audit.canaries=0.8", f"output_dir={tmp_path_factory.mktemp('audited') / 'run'}"]
    return simulation.run(told, evaluation=False)


def index(patients=2000):
    number = np.arange(2 * patients)
    return pd.DataFrame(
        {
            "image_id": [f"i{n}" for n in number],
            "path": [f"/films/{n:05d}.png" for n in number],
            "patient_id": [f"p{n // 2}" for n in number],
            "split": np.where(number // 2 % 4 == 0, "test", "train"),
        }
    )


def coins(frame):
    return frame.groupby("patient_id")["canary"].first()


def test_a_coin_is_fair_and_tossed_for_whole_patients_to_train_on():
    frame = toss(index(), 0.5, seed=3)
    assert (frame.groupby("patient_id")["canary"].nunique() == 1).all()
    assert set(frame.loc[frame["split"] == "test", "canary"]) == {""}
    found = coins(frame[frame["split"] == "train"])
    asked = found[found != ""]
    assert abs(len(asked) - 750) < 5 * np.sqrt(1500 / 4)
    assert abs((asked == "out").sum() - len(asked) / 2) < 5 * np.sqrt(len(asked) / 4)
    everybody = coins(toss(index(), 1.0, seed=3))
    assert (everybody != "").sum() == 1500


def test_coins_depend_on_seed_and_files_alone():
    frame = index()
    found = toss(frame, 0.5, seed=3)
    other = frame.assign(patient_id="q" + frame["patient_id"].str[::-1]).sample(frac=1, random_state=1)
    again = toss(other, 0.5, seed=3).set_index("path").loc[frame["path"], "canary"]
    assert found["canary"].tolist() == again.tolist()
    assert found["canary"].tolist() != toss(frame, 0.5, seed=4)["canary"].tolist()
    assert toss(found, 0.5, seed=4) is found  # coins that an index holds are kept
    assert toss(frame, 0.0, seed=3) is frame


def test_nobody_held_out_is_trained_on(audited, monkeypatch):
    run = read_run(audited)
    dataset = run_dataset(run, show=False)
    frame, table = dataset.frame, make_table(dataset.frame, run_sites(run, dataset))
    out = held_out(frame)
    trained = frame[(frame["split"] == "train") & ~out]
    assert 0 < out.sum() < (frame["split"] == "train").sum()
    assert {r["site"]: r["num_examples"] for r in rows(audited) if r["site"]} == dict(
        trained["site"].value_counts()
    )
    # nor in what the run is compared with
    seen = []
    monkeypatch.setattr(
        "sparsecontrast.features.LocalTrainer.run", lambda self, images, *_: seen.extend(images) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        label = Task("t", (dataset.labels[0],))
        Baselines(run, 1, dataset.images, table, [label]).make("centralised", lambda text: None)
    assert {i.tobytes() for i in seen} <= {i.tobytes() for i in dataset.images[trained.index]}


def test_who_is_held_out_changes_neither_sites_nor_splits(tmp_path):
    tables = []
    for name, share in (("audited", 0.8), ("plain", 0.0)):
        told = [*PHANTOMS, f"audit.canaries={share}", f"output_dir={tmp_path / name}"]
        write(told, tmp_path / f"{name}.csv")
        tables.append(pd.read_csv(tmp_path / f"{name}.csv", keep_default_na=False))
    one, two = (table.drop(columns="patient_id") for table in tables)  # pseudonyms have a key of their own
    assert "canary" not in two and one.drop(columns="canary").equals(two)


def test_the_coins_of_a_continued_run_stay(audited):
    before = (audited / "partition.csv").read_bytes()
    simulation.run([f"resume={audited}", "federation.rounds=2"], evaluation=False)
    assert (audited / "partition.csv").read_bytes() == before
    counts = {(r["round"], r["site"]): r["num_examples"] for r in rows(audited) if r["site"]}
    assert counts[1, "hospital_00"] == counts[2, "hospital_00"]


def test_without_a_coin_nobody_is_said_to_be_held_out(images, tmp_path):
    told = [*PHANTOMS, "audit.canaries=0.5", f"output_dir={tmp_path / 'out'}"]
    with pytest.raises(ConfigError, match="tossed before the sites start"):
        serve(partitions(2), told)
    with pytest.raises(ConfigError, match="has no column canary"):
        pretrain(compose([*told, "federation.rounds=1"]), show=False)
    site = tmp_path / "site.yaml"
    site.write_text(f"name: own\nstate_dir: {tmp_path / 'state'}\noverrides: [data.index={images}]")
    from client.site import resolve

    (found,) = resolve({"site-config": str(site)}, "audit.canaries=1.0")
    assert found.config.audit.canaries == 0  # who is trained on is the hospital's to say


def test_a_partition_made_beforehand_holds_the_coins(images, tmp_path):
    write([*words(images, tmp_path / "out"), "audit.canaries=1.0", "data.min_images=1"], tmp_path / "cut.csv")
    frame = pd.read_csv(tmp_path / "cut.csv", keep_default_na=False)
    assert set(frame.loc[frame["split"] == "train", "canary"]) == {"in", "out"}
    told = [*words(tmp_path / "cut.csv", tmp_path / "out"), "audit.canaries=1.0", "data.min_images=1"]
    serve(partitions(3), [*told, "federation.rounds=1", "federation.min_sites=1"])
    counts = frame[(frame["split"] == "train") & (frame["canary"] == "in")]["site"].value_counts()
    assert {r["site"]: r["num_examples"] for r in rows(tmp_path / "out") if r["site"]} == dict(counts)
