import builtins
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from sparsecontrast.config import compose
from sparsecontrast.data import cache, index, transforms
from sparsecontrast.data.cache import load_dataset
from sparsecontrast.errors import EmptySiteError, IndexSchemaError
from sparsecontrast.settings import Config, PhantomConfig
from tests.image_files import SIZE, expected, make_files, reading, reads, stores


def make_frame(files: list[Path], **columns: object) -> pd.DataFrame:
    frame = pd.DataFrame({"path": [str(f) for f in files]})
    frame["image_id"] = [f"id{i}" for i in range(len(files))]
    frame["patient_id"] = [f"p{i // 2}" for i in range(len(files))]
    frame["site"] = ["b" if i % 3 else "a" for i in range(len(files))]
    frame["split"] = ["val" if i % 5 == 0 else "train" for i in range(len(files))]
    return frame.assign(**{"height": 0, "width": 0, "boxes": "[]", "label_mass": 0.0, **columns})


@pytest.fixture(scope="module")
def config() -> Config:
    config = compose(["data=phantom"])
    return dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=SIZE))


def test_an_epoch_reads_no_image_file(tmp_path, config, monkeypatch):
    files = make_files(tmp_path / "in", 12)
    data = load_dataset(config, tmp_path / "cache", tmp_path / "state", False, make_frame(files))
    for file in files:
        file.unlink()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a file was opened")

    monkeypatch.setattr(builtins, "open", refuse)
    monkeypatch.setattr(Image, "open", refuse)
    monkeypatch.setattr(os, "open", refuse)
    generator = torch.Generator().manual_seed(0)
    site = data.site("b").split("train")
    seen = 0
    for rows in torch.randperm(len(site), generator=generator).split(2):
        views = transforms.two_views(torch.from_numpy(site.images[rows.numpy()]), generator, SIZE)
        seen += len(views.first)
    assert seen == len(site) > 4


def test_scanner_column_of_a_csv_may_be_blank_in_places(tmp_path, config):
    files = make_files(tmp_path / "in", 4)
    plain = load_dataset(config, tmp_path / "cache", tmp_path, False, make_frame(files))
    for columns in (["", "2", "", "2"], [None, 2, np.nan, 2.0]):
        shown = load_dataset(config, tmp_path / "cache", tmp_path, False, make_frame(files, scanner=columns))
        assert shown.frame["path"].tolist() == plain.frame["path"].tolist()
        changed = [(a != b).any() for a, b in zip(shown.images, plain.images, strict=True)]
        assert changed == [path in (str(files[1]), str(files[3])) for path in plain.frame["path"]]


def test_bad_files_are_quarantined_and_the_rest_goes_on(tmp_path, config):
    files = make_files(tmp_path / "in", 4) + make_files(tmp_path / "in", 2, "broken")
    files.append(tmp_path / "in" / "absent.png")
    data = load_dataset(config, tmp_path / "cache", tmp_path / "state", False, make_frame(files))
    (files[4]).write_bytes(b"not an image")
    data = load_dataset(config, tmp_path / "cache", tmp_path / "state", False, make_frame(files))
    assert sorted(data.frame["path"]) == [str(f) for f in [files[5], *files[:4]]]
    assert list(data.frame.index) == list(range(5)) and len(data.images) == len(data.boxes) == 5
    written = pd.read_csv(tmp_path / "state" / "quarantine.csv")
    pd.testing.assert_frame_equal(written, data.quarantine, check_dtype=False)
    assert sorted(written["path"]) == sorted([str(files[4]), str(files[6])])
    assert set(written["stage"]) == {"decode"} and written["reason"].str.len().min() > 5


def test_repaired_file_leaves_the_quarantine(tmp_path, config):
    files = make_files(tmp_path / "in", 3)
    good = files[1].read_bytes()
    files[1].write_bytes(good[:60])
    arguments = (config, tmp_path / "cache", tmp_path / "state", False, make_frame(files))
    assert len(load_dataset(*arguments)) == 2
    files[1].write_bytes(good)
    data = load_dataset(*arguments)
    assert len(data) == 3 and data.quarantine.empty


def test_nothing_readable_is_an_empty_site_with_its_reasons(tmp_path, config):
    files = make_files(tmp_path / "in", 3, "broken")
    for _ in range(2):  # the second time from the cache
        with pytest.raises(EmptySiteError, match="3 in .*quarantine.csv: broken on purpose"):
            load_dataset(config, tmp_path / "cache", tmp_path / "state", False, make_frame(files), reading)
    assert len(pd.read_csv(tmp_path / "state" / "quarantine.csv")) == 3
    assert len(reads(tmp_path / "in")) == 3
    with pytest.raises(EmptySiteError, match="no row"):
        load_dataset(config, tmp_path / "cache", tmp_path / "state", False, make_frame([]))


def test_index_without_its_columns_is_refused(tmp_path, config):
    with pytest.raises(IndexSchemaError, match="patient_id.*site"):
        load_dataset(config, tmp_path, tmp_path, False, make_frame([]).drop(columns=["site", "patient_id"]))


def painted(folder: Path, height: int, width: int, box: tuple[int, int, int, int]) -> Path:
    pixels = np.zeros((height, width), dtype=np.uint8)
    x, y, w, h = box
    pixels[y : y + h, x : x + w] = 255
    file = folder / f"{height}x{width}.png"
    Image.fromarray(pixels).save(file)
    return file


@pytest.mark.parametrize(("height", "width"), [(300, 180), (180, 300), (96, 96), (40, 24)])
@pytest.mark.parametrize("known", [True, False])
def test_boxes_land_on_the_pixels(tmp_path, config, height, width, known):
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=96))
    box = (width // 3, height // 4, width // 2, height // 3)
    files = [painted(tmp_path, height, width, box)]
    text = json.dumps([{"label": "mass", **dict(zip("xywh", box, strict=True))}])
    size = {"height": height, "width": width} if known else {}
    data = load_dataset(config, tmp_path / "c", tmp_path / "s", False, make_frame(files, boxes=text, **size))
    rows, columns = np.nonzero(data.images[0] > 127)
    seen = np.array([columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1])
    assert data.box_labels == [["mass"]] and data.boxes[0].dtype == np.float32
    np.testing.assert_allclose(data.boxes[0][0], seen, atol=1.0)


def test_boxes_of_a_file_given_in_other_pixels_are_scaled(tmp_path, config):
    files = [painted(tmp_path, 48, 96, (24, 12, 48, 24))]
    text = json.dumps([{"label": "mass", "x": 240, "y": 120, "w": 480, "h": 240}])
    frame = make_frame(files, boxes=text, height=480, width=960)
    data = load_dataset(config, tmp_path / "c", tmp_path / "s", False, frame)
    np.testing.assert_allclose(data.boxes[0], [[8, 12, 16, 8]])


def test_rows_are_grouped_in_the_source_order_and_parts_stay_mapped(tmp_path, config):
    files = make_files(tmp_path / "in", 30)
    frame = make_frame(files)
    frame["image_id"] = frame["image_id"].to_numpy()[::-1]
    data = load_dataset(config, tmp_path / "cache", tmp_path / "state", False, frame)
    assert sorted(data.frame["path"]) == sorted(frame["path"])
    for site in ("a", "b"):
        for split in ("train", "val"):
            part = data.site(site).split(split)
            wanted = frame[(frame["site"] == site) & (frame["split"] == split)]["path"].tolist()
            assert part.frame["path"].tolist() == wanted
            assert list(part.frame.index) == list(range(len(wanted)))
            assert (part.images == expected([Path(p) for p in wanted])).all()
            assert np.shares_memory(part.images, data.images)


def test_select_takes_masks_and_numbers_in_their_order(tmp_path, config):
    files = make_files(tmp_path / "in", 8)
    data = load_dataset(config, tmp_path / "cache", tmp_path / "state", False, make_frame(files))
    for rows in ([5, 2, 7], [3], [], [6, 7, 0]):
        part = data.select(rows)
        assert len(part) == len(part.images) == len(part.boxes) == len(part.box_labels) == len(rows)
        assert part.frame["image_id"].tolist() == [data.frame["image_id"][i] for i in rows]
        assert (part.images == data.images[np.array(rows, dtype=int)]).all()
    mask = np.arange(8) % 3 == 0
    assert data.select(mask).frame["image_id"].tolist() == data.frame["image_id"][mask].tolist()
    assert data.labels == ["mass"]
    codes = data.patient_codes
    assert codes.dtype == np.int64
    same = data.frame["patient_id"].to_numpy()[:, None] == data.frame["patient_id"].to_numpy()
    assert ((codes[:, None] == codes) == same).all()
    # another key of pseudonyms orders them otherwise, and a seed must draw the same patients
    others = data.frame["patient_id"].map({f"p{i}": f"p{9 - i}" for i in range(4)})
    renamed = dataclasses.replace(data, frame=data.frame.assign(patient_id=others))
    assert (codes == renamed.patient_codes).all()


def test_unknown_site_names_the_known_ones(tmp_path, config):
    data = load_dataset(
        config, tmp_path / "c", tmp_path / "s", False, make_frame(make_files(tmp_path / "in", 4))
    )
    with pytest.raises(EmptySiteError, match="'nowhere'.*a, b"):
        data.site("nowhere")
    assert len(data.split("test")) == 0


# --- where rows come from


@pytest.fixture
def site_config(tmp_path, config) -> Config:
    root = tmp_path / "data"
    make_files(root, 12)
    files = sorted(root.glob("*.png"))
    rows = [f"{f.name},p{i},{'abc'[i % 3]},{i % 2}" for i, f in enumerate(files)]
    (root / "index.csv").write_text("\n".join(["path,patient_id,site,mass", *rows]) + "\n")
    data = compose(["data=csv", f"data.root={root}"]).data
    return dataclasses.replace(config, data=dataclasses.replace(data, image_size=SIZE))


@pytest.fixture
def builds(monkeypatch) -> list[int]:
    calls, build = [], index.build_index

    def counted(*args, **kwargs):
        calls.append(1)
        return build(*args, **kwargs)

    monkeypatch.setattr(index, "build_index", counted)
    return calls


def test_built_index_is_kept_until_anything_it_came_from_changes(tmp_path, site_config, builds):
    arguments = (tmp_path / "cache", tmp_path / "state", False)
    first = load_dataset(site_config, *arguments)
    again = load_dataset(site_config, *arguments)
    assert len(builds) == 1 and len(first) == 12
    pd.testing.assert_frame_equal(first.frame, again.frame)
    table = tmp_path / "data" / "index.csv"
    table.write_text("\n".join(table.read_text().splitlines()[:-2]) + "\n")
    assert len(load_dataset(site_config, *arguments)) == 10 and len(builds) == 2
    salted = dataclasses.replace(site_config, data=dataclasses.replace(site_config.data, salt="other"))
    load_dataset(salted, *arguments)
    assert len(builds) == 3
    assert len(list((tmp_path / "state").glob("index-*"))) == 1
    smaller = dataclasses.replace(salted, data=dataclasses.replace(salted.data, image_size=16))
    assert load_dataset(smaller, *arguments).images.shape == (10, 16, 16) and len(builds) == 3


def test_tampered_built_index_is_not_trusted(tmp_path, site_config, builds):
    arguments = (tmp_path / "cache", tmp_path / "state", False)
    first = load_dataset(site_config, *arguments)
    table = next((tmp_path / "state").glob("index-*")) / "index.csv"
    table.write_text(table.read_text().replace(",1.0,", ",0.0,"))
    pd.testing.assert_frame_equal(load_dataset(site_config, *arguments).frame, first.frame)
    assert len(builds) == 2


def test_another_site_on_the_same_machine_has_its_own_pseudonyms(tmp_path, site_config, builds):
    one, two = (
        load_dataset(site_config, tmp_path / "cache", tmp_path / name, False) for name in ("one", "two")
    )
    assert len(builds) == 2 and set(one.frame["patient_id"]).isdisjoint(two.frame["patient_id"])
    assert one.frame["path"].tolist() == two.frame["path"].tolist()
    assert (one.images == two.images).all() and len(stores(tmp_path / "cache")) == 1


def test_what_the_index_left_out_stays_listed(tmp_path, site_config):
    (tmp_path / "data" / "image003.png").unlink()
    data = load_dataset(site_config, tmp_path / "cache", tmp_path / "state", False)
    again = load_dataset(site_config, tmp_path / "cache", tmp_path / "state", False)
    for found in (data, again):
        assert len(found) == 11 and found.quarantine["path"].tolist() == [
            str((tmp_path / "data" / "image003.png").resolve())
        ]
        assert found.quarantine["stage"].tolist() == ["index"]


def test_written_index_is_used_as_it_is_with_its_quarantine(tmp_path, config):
    files = make_files(tmp_path / "in", 6)
    frame = make_frame(files, study_id="s", view="PA").assign(split="train")
    index.write_index(frame, tmp_path / "made" / "index.csv")
    left = pd.DataFrame({"path": ["x", "y"], "reason": ["r", "r"], "stage": ["index", "decode"]})
    index.write_table(left, tmp_path / "made" / "quarantine.csv")
    named = dataclasses.replace(config.data, index=str(tmp_path / "made" / "index.csv"), merge_sites_to=1)
    data = load_dataset(dataclasses.replace(config, data=named), tmp_path / "c", tmp_path / "s", False)
    assert sorted(data.frame["path"]) == [str(f) for f in files]
    assert set(data.frame["site"]) == {"a+b"}
    assert data.quarantine["path"].tolist() == ["x"]


def test_phantoms_need_no_file(tmp_path, config):
    phantom = PhantomConfig(sites=2, patients_per_site=3, images_per_patient=1)
    small = dataclasses.replace(config, data=dataclasses.replace(config.data, phantom=phantom))
    data = load_dataset(small, tmp_path / "cache", tmp_path / "state", False)
    assert data.frame["site"].nunique() == 2 and len(data) == 6
    frame, left_out = cache.load_rows(small.data, tmp_path / "state")
    assert sorted(frame["path"]) == sorted(data.frame["path"]) and left_out.empty
