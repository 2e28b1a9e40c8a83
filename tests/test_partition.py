"""Partitions: whole patients, every image, the skew that was asked for, and no site left empty."""

import hashlib
import io
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import pytest

from simulation.partition import main, partition, partition_table, patient_groups, plot_partition
from sparsecontrast.config import compose
from sparsecontrast.data.lesions import KINDS
from sparsecontrast.data.phantom import parse_path, phantom_index, render
from sparsecontrast.errors import ConfigError, DataError, PatientLeakError
from sparsecontrast.settings import FederationConfig, PhantomConfig

CUTS = ("iid", "dirichlet", "quantity", "scanner")


@lru_cache
def federation(kind: str, sites: int = 5, alpha: float = 0.5) -> FederationConfig:
    words = [f"federation.partition={kind}", f"federation.sites={sites}", f"federation.alpha={alpha}"]
    return compose([*words, "federation.min_sites=1"]).federation


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return phantom_index(PhantomConfig(sites=6, patients_per_site=30, images_per_patient=3, seed=1))


@pytest.fixture(scope="module")
def photos() -> pd.DataFrame:
    """An index of files: two labels, one of them partly unknown, one to three images a patient."""
    rng = np.random.Generator(np.random.PCG64(0))
    rows: list[Mapping[str, Any]] = []
    for patient in range(300):
        sick, other = rng.random(2) < (0.3, 0.05)
        for image in range(rng.integers(1, 4)):
            name = f"p{patient:03d}-{image}"
            rows.append({
                "image_id": name, "path": f"/data/{name}.png", "patient_id": f"p{patient:03d}",
                "study_id": name, "site": f"clinic_{patient % 3}", "view": "PA",
                "split": "train" if patient % 4 else "test", "height": 10, "width": 10,
                "label_sick": float(sick), "label_other": float(other) if image else np.nan, "boxes": "[]",
            })  # fmt: skip
    return pd.DataFrame(rows)


def spread(cut: pd.DataFrame, label: str) -> float:
    """Total variation between each site's share of a label and the pool's, mean over sites."""
    rates = cut.groupby("site")[f"label_{label}"].mean()
    return float((rates - cut[f"label_{label}"].mean()).abs().mean())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", CUTS)
def test_whole_patients_and_every_image_go_somewhere(frame, kind, seed):
    cut = partition(frame, federation(kind), seed)
    assert (cut.groupby("patient_id")["site"].nunique() == 1).all()
    assert cut["image_id"].tolist() == frame["image_id"].tolist()
    assert sorted(cut["site"].unique()) == [f"site_{i:02d}" for i in range(5)]
    kept = [name for name in frame if name not in ("site", "path", "view", "boxes")]
    assert cut[kept].equals(frame[kept])
    if kind != "scanner":
        assert cut["source_site"].equals(frame["site"])
        assert (cut["partition"] == kind).all()
        made = ["site", "source_site", "partition"]
        assert cut.drop(columns=made).equals(frame.drop(columns="site"))


@pytest.mark.parametrize("kind", CUTS)
def test_the_seed_decides_and_the_order_of_rows_does_not(frame, kind):
    first = partition(frame, federation(kind), 0).set_index("image_id")["site"]
    assert first.equals(partition(frame, federation(kind), 0).set_index("image_id")["site"])
    shuffled = frame.sample(frac=1, random_state=3)
    again = partition(shuffled, federation(kind), 0).set_index("image_id")["site"]
    assert again.loc[first.index].equals(first)
    assert (partition(frame, federation(kind), 1).set_index("image_id")["site"] != first).any()


def test_the_input_is_left_alone(frame):
    before = frame.copy()
    partition(frame, federation("scanner"), 0)
    assert frame.equals(before)


def test_by_site_changes_nothing(frame):
    assert partition(frame, federation("by_site"), 0).equals(frame)


def test_iid_sites_have_equal_numbers_of_patients(frame):
    cut = partition(frame, federation("iid", sites=7), 0)
    for part in (cut, cut[cut["split"] == "train"]):
        sizes = part.groupby("site")["patient_id"].nunique()
        assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("kind", CUTS)
def test_pseudonyms_have_no_say(photos, kind):
    """Their key is random at every site, yet a seed cuts the same files in the same way."""
    other = photos.sample(frac=1, random_state=3)
    for name in ("patient_id", "image_id"):
        other[name] = [hashlib.sha256(value.encode()).hexdigest()[:16] for value in other[name]]
    cuts = [partition(rows, federation(kind), 5, overlap=0.5).set_index("path") for rows in (photos, other)]
    pd.testing.assert_series_equal(cuts[0]["site"], cuts[1]["site"].reindex(cuts[0].index))


def test_a_cut_is_not_cut_again_and_another_one_is_refused(photos):
    cut = partition(photos, federation("iid"), 0)
    assert partition(cut, federation("iid"), 1).equals(cut)
    assert partition(cut, federation("by_site"), 1).equals(cut)
    with pytest.raises(ConfigError, match="was cut by iid"):
        partition(cut, federation("quantity"), 1)


def test_a_patient_at_two_sites_must_have_been_asked_for(photos):
    cut = partition(photos, federation("iid"), 0, overlap=0.5)
    assert (cut.groupby("patient_id")["site"].nunique() > 1).any()
    assert partition(cut, federation("by_site"), 0).equals(cut)
    with pytest.raises(PatientLeakError, match="patients lie at two sites"):
        partition(cut.drop(columns=["overlap"]), federation("by_site"), 0)


def test_small_alpha_skews_labels_more(photos):
    means = [
        np.mean(
            [
                spread(partition(photos, federation("dirichlet", alpha=alpha), seed), "sick")
                for seed in range(8)
            ]
        )
        for alpha in (0.1, 1.0, 100.0)
    ]
    assert means[0] > 1.5 * means[1] > 1.5 * 1.5 * means[2]


def test_small_alpha_skews_sizes_more_and_leaves_labels_alone(photos):
    def unevenness(alpha):
        cuts = [partition(photos, federation("quantity", alpha=alpha), seed) for seed in range(8)]
        return np.mean([np.std(cut.groupby("site").size()) for cut in cuts])

    assert unevenness(0.3) > 1.5 * unevenness(3.0) > 1.5 * 1.5 * unevenness(300.0)
    cut = partition(photos, federation("quantity", sites=3, alpha=3.0), 0)
    assert spread(cut, "sick") < 0.15


def test_by_patient_proportions_follow_the_draw(photos):
    """With one group and a huge alpha every share is 1 / sites: sizes differ by rounding alone."""
    cut = partition(photos, federation("quantity", alpha=1e7), 0)
    sizes = cut.groupby("site")["patient_id"].nunique()
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("kind", CUTS)
@pytest.mark.parametrize("seed", range(4))
def test_every_site_can_train_however_small_alpha(photos, kind, seed):
    cut = partition(photos, federation(kind, sites=9, alpha=0.02), seed)
    train = cut[cut["split"] == "train"].groupby("site")["patient_id"].nunique()
    assert len(train) == 9 and train.min() >= 8


def test_the_minimum_can_be_asked_for(photos):
    cut = partition(photos, federation("dirichlet", sites=5, alpha=0.05), 0, minimum=40)
    assert cut[cut["split"] == "train"].groupby("site")["patient_id"].nunique().min() >= 40
    with pytest.raises(ConfigError, match="federation.sites=5"):
        partition(photos, federation("dirichlet"), 0, minimum=46)  # 225 patients to train on, 230 asked


def test_too_few_patients_for_the_sites_are_refused(photos):
    with pytest.raises(ConfigError, match="cannot give each site"):
        partition(photos.head(6), federation("iid", sites=9), 0)


def test_patients_count_when_nobody_is_in_train(photos):
    cut = partition(photos.assign(split="test"), federation("dirichlet", alpha=0.05), 0)
    assert cut.groupby("site")["patient_id"].nunique().min() >= 8


def test_groups_are_combinations_and_rare_ones_join_their_rarest_label():
    labels = {"a": [1, 1, 1, 0, 0, 0, 1], "b": [0, 0, 0, 1, 1, 1, 1], "c": [0, 0, 0, 0, 0, np.nan, 0]}
    table = pd.DataFrame({f"label_{name}": column for name, column in labels.items()})
    table.loc[7] = {"label_a": 0.0, "label_b": 1.0, "label_c": np.nan}  # patient 5 again
    codes = np.array([0, 1, 2, 3, 4, 5, 6, 5])
    groups = patient_groups(table, codes, smallest=3)
    assert len(set(groups[:3])) == len(set(groups[3:6])) == 1 and groups[0] != groups[3]
    assert groups[6] == groups[0], "a+b is a group of one; a and b are equally rare, a comes first"
    assert len(set(patient_groups(table, codes, smallest=1))) == 3


def test_dirichlet_needs_labels(photos):
    bare = photos.drop(columns=["label_sick", "label_other"])
    unknown = photos.assign(label_sick=np.nan, label_other=np.nan)
    for useless in (bare, unknown):
        with pytest.raises(ConfigError, match="no labels"):
            partition(useless, federation("dirichlet"), 0)
    assert partition(bare, federation("iid"), 0)["site"].nunique() == 5


# --- patients at two sites -----------------------------------------------------------------------


def test_overlap_sends_the_asked_share_to_a_second_site(photos):
    several = photos.groupby("patient_id").size() > 1
    for overlap in (0.0, 0.25, 1.0):
        cut = partition(photos, federation("iid"), 0, overlap=overlap)
        at = cut.groupby("patient_id")["site"].nunique()
        assert (at > 1).sum() == round(overlap * several.sum()) and at.max() <= 2
        assert len(cut) == len(photos)
    with pytest.raises(ConfigError, match="overlap=1.5"):
        partition(photos, federation("iid"), 0, overlap=1.5)


def test_a_patient_at_two_natural_sites_is_refused_unless_asked_for(photos):
    torn = photos.copy()
    first = torn.index[torn["patient_id"].duplicated()][0]
    torn.loc[first, "site"] = "elsewhere"
    with pytest.raises(PatientLeakError, match="1 patients lie at two sites"):
        partition(torn, federation("by_site"), 0)
    assert partition(torn, federation("by_site"), 0, overlap=0.1).drop(columns="overlap").equals(torn)
    assert partition(torn, federation("iid"), 0)["site"].nunique() == 5, "a new cut mends it"


# --- scanners ------------------------------------------------------------------------------------


def test_scanner_shift_films_phantoms_at_another_hospital(frame):
    cut = partition(frame, federation("scanner"), 0)
    moved = 0
    for (_, old), (_, new) in zip(frame.iloc[::25].iterrows(), cut.iloc[::25].iterrows(), strict=True):
        was, now = parse_path(old["path"]), parse_path(new["path"])
        assert f"site_{now['site']:02d}" == new["site"] and {**was, "site": now["site"]} == now
        film = render(**now, size=128)
        assert film.labels == {kind: int(old[f"label_{kind}"]) for kind in KINDS}, "labels stay true"
        assert film.view == new["view"]
        for stated, drawn in zip(json.loads(new["boxes"]), film.boxes, strict=True):
            assert stated["label"] == drawn["label"] and abs(stated["x"] / 4 - drawn["x"]) < 0.02
        moved += was["site"] != now["site"]
    assert moved > 0 and "scanner" not in cut


def test_scanner_shift_numbers_the_scanners_of_files(photos, frame):
    cut = partition(photos, federation("scanner"), 0)
    assert (cut["site"] == [f"site_{int(s):02d}" for s in cut["scanner"]]).all()
    assert cut["path"].equals(photos["path"])
    both = pd.concat([photos, frame], ignore_index=True)
    mixed = partition(both, federation("scanner"), 0)
    assert mixed["scanner"].isna().equals(mixed["path"].str.startswith("phantom:"))


def test_the_cache_applies_the_scanner_of_a_row(tmp_path):
    from PIL import Image

    from sparsecontrast.data.cache import load_dataset

    grey = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)
    rows = []
    for i in range(20):
        Image.fromarray(grey).save(tmp_path / f"{i}.png")
        rows.append({
            "image_id": f"i{i}", "path": str(tmp_path / f"{i}.png"), "patient_id": f"p{i}",
            "study_id": f"s{i}", "site": "a", "view": "PA", "split": "train",
            "height": 64, "width": 64, "label_x": 0.0, "boxes": "[]",
        })  # fmt: skip
    cut = partition(pd.DataFrame(rows), federation("scanner", sites=2), 0)
    config = compose(["backbone.img_size=64"])
    data = load_dataset(config, tmp_path / "cache", tmp_path / "state", progress=False, index=cut)
    means = [
        data.images[(data.frame["site"] == site).to_numpy()].mean((1, 2)) for site in ("site_00", "site_01")
    ]
    assert abs(means[0].mean() - means[1].mean()) > 10 * max(means[0].std(), means[1].std())


# --- what is shown and written -------------------------------------------------------------------


def test_table_counts(photos):
    cut = partition(photos, federation("dirichlet"), 0)
    table = partition_table(cut)
    assert list(table) == ["site", "images", "patients", "sick", "other"]
    for _, row in table.iterrows():
        own = cut[cut["site"] == row["site"]]
        assert row["images"] == len(own) and row["patients"] == own["patient_id"].nunique()
        assert row["sick"] == own["label_sick"].sum() and row["other"] == (own["label_other"] == 1).sum()
    assert table["images"].sum() == len(photos)


def test_plot_shows_the_partition_it_is_given(photos, tmp_path):
    from PIL import Image

    pictures = []
    for seed in (0, 1):
        held = io.BytesIO()
        plot_partition(partition(photos, federation("dirichlet"), seed), held)
        pictures.append(held.getvalue())
    assert pictures[0] != pictures[1]
    plot_partition(photos.drop(columns=["label_sick", "label_other"]), tmp_path / "plain.png")
    with Image.open(tmp_path / "plain.png") as short, Image.open(io.BytesIO(pictures[0])) as tall:
        assert short.height < tall.height and np.asarray(short.convert("L")).std() > 10
    with pytest.raises(DataError, match="no images"):
        plot_partition(photos.head(0), tmp_path / "none.png")


def test_command_line_writes_an_index_that_the_data_section_accepts(tmp_path, capsys):
    from sparsecontrast.data.cache import load_rows

    phantoms = "{sites: 3, patients_per_site: 12, images_per_patient: 2, seed: 0}"
    out = tmp_path / "partition.csv"
    words = [f"data.phantom={phantoms}", "federation.sites=4", "federation.partition=dirichlet"]
    words.append(f"output_dir={tmp_path / 'run'}")
    assert main([*words, "--out", str(out), "--plot", str(tmp_path / "partition.png")]) == 0
    assert "site_03" in capsys.readouterr().out and (tmp_path / "partition.png").stat().st_size > 5000
    frame, _ = load_rows(compose([*words, f"data.index={out}"]).data, tmp_path)
    config = compose(words)
    expected = partition(load_rows(config.data, tmp_path)[0], config.federation, config.seed)
    assert frame["site"].tolist() == expected["site"].tolist()


def test_command_line_explains_errors(tmp_path, capsys):
    small = "data.phantom={sites: 1, patients_per_site: 2, images_per_patient: 1, seed: 0}"
    words = [small, "federation.partition=iid", "federation.sites=50"]
    assert main([*words, "--out", str(tmp_path / "p.csv")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error [config]: federation.sites=50") and not (tmp_path / "p.csv").exists()
