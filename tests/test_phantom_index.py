"""The index of the phantoms: its schema, and who is in it."""

import json

import numpy as np
import pytest

from sparsecontrast.data.lesions import KINDS
from sparsecontrast.data.phantom import (
    NOMINAL_SIZE,
    parse_path,
    phantom_index,
    prevalence,
    render,
)
from sparsecontrast.data.splits import assign_splits
from sparsecontrast.errors import ConfigError
from sparsecontrast.settings import PhantomConfig


@pytest.fixture(scope="module")
def frame():
    return phantom_index(
        PhantomConfig(sites=10, patients_per_site=30, images_per_patient=2, seed=0), "salt", 0.2, 0.2
    )


def test_index_has_the_schema(frame, tmp_path):
    from sparsecontrast.data.index import label_names, read_index, write_index

    assert label_names(frame) == list(KINDS)
    assert frame["image_id"].is_unique and (frame[["height", "width"]] == NOMINAL_SIZE).all(axis=None)
    write_index(frame, tmp_path / "index.csv")
    again = read_index(tmp_path / "index.csv")
    assert (
        again["path"].tolist() == frame["path"].tolist()
        and again["boxes"].tolist() == frame["boxes"].tolist()
    )


def test_index_agrees_with_the_films(frame):
    for _, row in frame.sample(5, random_state=0).iterrows():
        film = render(**parse_path(row["path"]), size=NOMINAL_SIZE // 4)
        assert film.view == row["view"]
        assert film.labels == {kind: int(row[f"label_{kind}"]) for kind in KINDS}
        nominal = json.loads(row["boxes"])
        assert [b["label"] for b in nominal] == [b["label"] for b in film.boxes]
        for stated, drawn in zip(nominal, film.boxes, strict=True):
            assert all(abs(stated[k] / 4 - drawn[k]) < 0.02 for k in "xywh")


def test_patients_are_disjoint_across_sites_and_splits(frame):
    assert (frame.groupby("patient_id")["site"].nunique() == 1).all()
    assert (frame.groupby("patient_id")["split"].nunique() == 1).all()
    assert sorted(frame["site"].unique()) == [f"hospital_{i:02d}" for i in range(10)]
    assert (frame.groupby("site")["patient_id"].nunique() == 30).all()
    assert frame["split"].tolist() == assign_splits(frame["patient_id"].tolist(), "salt", 0.2, 0.2)
    assert set(frame.groupby("patient_id").size()) == {1, 2}


def test_all_kinds_occur_and_hospitals_differ_in_their_mix(frame):
    people = frame.drop_duplicates("patient_id")
    share = people.groupby("site")[[f"label_{kind}" for kind in KINDS]].mean()
    assert (people[[f"label_{kind}" for kind in KINDS]].sum() >= 10).all()
    assert ((share.max() - share.min()) > 0.25).all()
    expected = np.array([[prevalence(0, site)[kind] for kind in KINDS] for site in range(10)])
    assert np.corrcoef(share.to_numpy().ravel(), expected.ravel())[0, 1] > 0.8


def test_growing_the_collection_changes_no_one(frame):
    grown = phantom_index(
        PhantomConfig(sites=11, patients_per_site=35, images_per_patient=2, seed=0), "salt", 0.2, 0.2
    )
    kept = grown[grown["image_id"].isin(frame["image_id"])].reset_index(drop=True)
    assert kept.equals(frame)


@pytest.mark.parametrize(
    "wrong",
    [{"sites": 0}, {"patients_per_site": 0}, {"images_per_patient": 0}, {"seed": -1}, {"sites": 10**9}],
)
def test_impossible_collections_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"data.phantom.{next(iter(wrong))}="):
        phantom_index(PhantomConfig(**wrong))
