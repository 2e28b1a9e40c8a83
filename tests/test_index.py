import json
import os

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pydicom.dataset import Dataset

from sparsecontrast.config import compose
from sparsecontrast.data.index import build_index, label_names, read_index, write_index, write_table
from sparsecontrast.errors import (
    ConfigError,
    EmptySiteError,
    IndexSchemaError,
    MissingDataError,
    PatientLeakError,
    StorageError,
)
from tests.dicom_files import write_dicom

PIXELS = np.arange(600, dtype=np.uint16).reshape(20, 30)


def index(root, *overrides, state, name="dicom"):
    return build_index(compose([f"data={name}", f"data.root={root}", *overrides]).data, state, progress=False)


@pytest.fixture
def hospital(tmp_path):
    """A folder as an archive exports it: nested, names without extension, some files broken or foreign."""
    root = tmp_path / "export"
    for folder in ("a/1", "b", ".hidden"):
        (root / folder).mkdir(parents=True)
    write_dicom(root / "a/1/IM0001", PIXELS, PatientID="p1", StudyInstanceUID="1.1")
    write_dicom(root / "a/1/1.2.840.99", PIXELS, PatientID="p1", StudyInstanceUID="1.2", ViewPosition="AP")
    write_dicom(root / "b/side.dcm", PIXELS, PatientID="p2", StudyInstanceUID="1.3", ViewPosition="LL")
    write_dicom(root / "b/foot.dcm", PIXELS, PatientID="p2", StudyInstanceUID="1.4", BodyPartExamined="FOOT")
    write_dicom(root / "b/ct.dcm", PIXELS, PatientID="p2", StudyInstanceUID="1.5", Modality="CT")
    write_dicom(root / "b/nobody.dcm", PIXELS, PatientID="", StudyInstanceUID="1.6", ViewPosition=None)
    write_dicom(root / "b/empty.dcm", PIXELS, PixelData=None)
    (root / "b/page.dcm").write_text("<html>502</html>")
    (root / "b/listing.csv").write_text("not, an, image")
    (root / "b/DICOMDIR").write_bytes(b"x")
    write_dicom(root / ".hidden/IM0001", PIXELS)
    return root


def test_a_folder_of_dicom(hospital, tmp_path):
    built = index(hospital, state=tmp_path / "state")
    frame = built.frame
    assert [os.path.relpath(p, hospital) for p in frame["path"]] == [
        "a/1/1.2.840.99",
        "a/1/IM0001",
        "b/nobody.dcm",
    ]
    assert frame["view"].tolist() == ["AP", "PA", ""]
    assert (frame["height"] == 20).all() and (frame["width"] == 30).all()
    assert (frame["site"] == "dicom").all() and frame["study_id"].nunique() == 3
    assert frame["patient_id"].nunique() == 2 and frame["patient_id"][0] == frame["patient_id"][1]
    assert frame["patient_id"].str.startswith("unnamed-").tolist() == [False, False, True]
    assert built.counts == {
        "files": 8, "unreadable": 2, "not_chest": 2, "not_frontal": 1, "kept": 3,
        "without_a_patient": 1, "moved": 0,
    }  # fmt: skip
    assert dict(zip(built.quarantine["path"], built.quarantine["reason"], strict=True)) == {
        str(hospital / "b/empty.dcm"): "no pixel data: the file never had any, or is cut short",
        str(hospital / "b/page.dcm"): "neither DICOM (no DICM marker), PNG nor JPEG",
    }
    assert (built.quarantine["stage"] == "index").all()


def test_filters_can_be_switched_off_and_sites_read_off_the_path(hospital, tmp_path):
    site = "data.recipe.site={column: file, pattern: '^([^/]+)/'}"
    open_ = ["data.frontal_only=false", "data.chest_only=false", "~data.recipe.site", f"+{site}"]
    built = index(hospital, *open_, state=tmp_path / "state")
    assert built.counts["kept"] == 6 and built.counts["not_chest"] == built.counts["not_frontal"] == 0
    assert built.frame["site"].tolist() == ["a", "a", "b", "b", "b", "b"]


def test_the_real_folder(shared_data, tmp_path):
    built = index(shared_data / "dicom", state=tmp_path)
    kept = sorted(os.path.basename(p) for p in built.frame["path"])
    assert kept == [
        "RG1_J2KI.dcm", "RG1_JLSN.dcm", "RG1_uncompressed.dcm",
        "rsna_cxr_fake_mono1.dcm", "rsna_cxr_mono2_jpeg.dcm",
    ]  # fmt: skip
    assert built.frame["patient_id"].nunique() == 2 and built.counts["unreadable"] == 5


@pytest.mark.parametrize("kind", ["dicom", "csv"])
def test_no_identifier_is_kept(tmp_path, kind):
    root, secrets = (
        tmp_path / "r",
        ["MUSTERMANN", "MRN-4711", "19510223", "ACC-0815", "1.2.276.99", "Station-9"],
    )
    root.mkdir()
    request = Dataset()
    request.RequestedProcedureDescription = "MUSTERMANN thorax"
    tags = {
        "PatientName": "MUSTERMANN^Erika", "PatientID": "MRN-4711", "PatientBirthDate": "19510223",
        "AccessionNumber": "ACC-0815", "StudyInstanceUID": "1.2.276.99.1", "SOPInstanceUID": "1.2.276.99.2",
        "SeriesDescription": "Thorax MUSTERMANN", "StationName": "Station-9",
        "RequestAttributesSequence": [request],
    }  # fmt: skip
    write_dicom(root / "one.dcm", PIXELS, **tags)
    write_dicom(root / "two.dcm", PIXELS, PixelData=None, **tags)
    write_dicom(root / "odd.dcm", PIXELS, **tags | {"Rows": None})
    table = "path,patient_id,study_id\n" + "".join(
        f"{n}.dcm,MRN-4711,1.2.276.99.1\n" for n in ("one", "two", "odd")
    )
    (root / "index.csv").write_text(table)
    built = index(root, state=tmp_path / "state", name=kind)
    write_index(built.frame, tmp_path / "index.csv")
    write_table(built.quarantine, tmp_path / "quarantine.csv")
    assert len(built.frame) == 1 and len(built.quarantine) == 2
    for file in (tmp_path / "index.csv", tmp_path / "quarantine.csv"):
        assert not [secret for secret in secrets if secret in file.read_text()]


def test_pseudonyms_follow_the_key_but_splits_do_not(shared_data, tmp_path):
    root = shared_data / "nih64"
    first = index(root, state=tmp_path / "a", name="csv").frame
    again = index(root, state=tmp_path / "a", name="csv").frame
    other = index(root, state=tmp_path / "b", name="csv").frame
    pd.testing.assert_frame_equal(first, again)
    ids = ["image_id", "patient_id", "study_id"]
    assert not np.isin(first[ids], other[ids]).any()
    pd.testing.assert_frame_equal(first.drop(columns=ids), other.drop(columns=ids))
    assert (pd.factorize(first["patient_id"])[0] == pd.factorize(other["patient_id"])[0]).all()


def test_splits_stay_when_patients_and_images_are_added(tmp_path):
    root = tmp_path / "r"
    root.mkdir()
    names = [f"{i:03d}.png" for i in range(300)]
    for name in names:
        (root / name).touch()

    def splits(rows):
        (root / "index.csv").write_text("path,patient_id,height,width\n" + "".join(rows))
        frame = index(root, state=tmp_path / "s", name="csv").frame
        return dict(zip(frame["path"], frame["split"], strict=True)), frame

    rows = [f"{name},p{i % 100},9,9\n" for i, name in enumerate(names)]
    before, frame = splits(rows[:150])
    after, grown = splits(rows[::-1])
    assert before == {path: after[path] for path in before}
    assert grown.groupby("patient_id")["split"].nunique().max() == 1
    assert set(before.values()) == {"train", "val", "test"}


def test_the_multisite_data(shared_data, tmp_path):
    root = shared_data / "cxr_multisite"
    built = index(root, state=tmp_path, name="cxr_multisite")
    frame, table, boxes = built.frame, pd.read_csv(root / "index.csv"), pd.read_csv(root / "boxes.csv")
    assert len(frame) == len(table) == 6241 and built.quarantine.empty
    assert [os.path.relpath(p, root) for p in frame["path"]] == table["path"].tolist()
    for name in label_names(frame):
        column = next(c for c in table.columns if c.lower() == name)
        np.testing.assert_array_equal(frame[f"label_{name}"], table[column], err_msg=name)
    assert len(label_names(frame)) == 18
    assert frame["height"].tolist() == table["height"].tolist()
    assert pd.factorize(frame["patient_id"])[0].tolist() == pd.factorize(table["group_id"])[0].tolist()
    found = [
        (path, b["x"], b["y"], b["w"], b["h"])
        for path, cell in zip(table["path"], frame["boxes"], strict=True)
        for b in json.loads(cell)
    ]
    assert sorted(found) == sorted(boxes[["path", "x", "y", "w", "h"]].itertuples(index=False, name=None))
    # fourteen origins, one patient at two of them, then four merges of the two smallest
    assert built.counts["moved"] == 1
    sizes = table["site"].value_counts() + pd.Series({"covid_italy": -1, "covid_iberia": 1}).reindex(
        table["site"].unique(), fill_value=0
    )
    groups = {site: [site] for site in sizes.index}
    for _ in range(4):
        a, b = sorted(groups, key=lambda g: (sum(sizes[s] for s in groups[g]), sorted(groups[g])))[:2]
        groups[a + b] = groups.pop(a) + groups.pop(b)
    expected = {"+".join(sorted(parts)): int(sum(sizes[s] for s in parts)) for parts in groups.values()}
    assert frame["site"].value_counts().to_dict() == expected and len(expected) == 10
    assert frame.groupby("patient_id")[["site", "split"]].nunique().max().tolist() == [1, 1]
    shares = frame.drop_duplicates("patient_id")["split"].value_counts(normalize=True)
    assert abs(shares["val"] - 0.15) < 0.03 and abs(shares["test"] - 0.15) < 0.03


def test_bad_roots_and_empty_sites_are_named(tmp_path):
    with pytest.raises(MissingDataError, match="no such folder"):
        index(tmp_path / "none", state=tmp_path)
    with pytest.raises(ConfigError, match=r"data\.root: say where"):
        build_index(compose(["data=dicom"]).data, tmp_path, progress=False)
    with pytest.raises(ConfigError, match="kind=phantom"):
        build_index(compose(["data=phantom"]).data, tmp_path, progress=False)
    root = tmp_path / "r"
    root.mkdir()
    with pytest.raises(EmptySiteError, match="0 files"):
        index(root, state=tmp_path)
    (root / "a.dcm").touch()
    (root / "b.dcm").touch()
    with pytest.raises(EmptySiteError, match="2 files, 2 unreadable.*most often: empty file"):
        index(root, state=tmp_path)


def test_a_missing_image_is_quarantined_and_the_run_goes_on(tmp_path):
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "here.png")
    (tmp_path / "index.csv").write_text("path,height,width\nhere.png,4,5\ngone.png,4,5\n")
    built = index(tmp_path, state=tmp_path / "s", name="csv")
    assert len(built.frame) == 1
    assert built.quarantine.to_dict("records") == [
        {"path": str(tmp_path / "gone.png"), "reason": "no such file", "stage": "index"}
    ]


def test_progress_is_told_in_plain_lines_off_a_terminal(hospital, tmp_path, capsys):
    build_index(compose(["data=dicom", f"data.root={hospital}"]).data, tmp_path / "s", progress=True)
    said = capsys.readouterr()
    assert said.out == "" and "reading headers: 8/8" in said.err


@pytest.fixture
def frame():
    return pd.DataFrame(
        {
            "image_id": ["0000000000000001", "12e4567890123456"], "path": ["/a", "/b"],
            "patient_id": ["00", "1e5"], "study_id": ["s", "007"],
            "site": ["x", "NA"], "view": ["", "PA"], "split": ["train", "test"],
            "height": [0, 7], "width": [0, 8], "label_mass": [1.0, np.nan], "label_none": [np.nan, np.nan],
            "boxes": ["[]", '[{"label": "mass", "x": 1.5, "y": 2, "w": 3, "h": 4}]'],
        }
    )  # fmt: skip


def test_an_index_survives_the_file(frame, tmp_path):
    write_index(frame, tmp_path / "deep" / "index.csv")
    read = read_index(tmp_path / "deep" / "index.csv")
    pd.testing.assert_frame_equal(read, frame, check_dtype=False)
    assert label_names(read) == ["mass", "none"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["index.csv"]


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"image_id": ["a", "a"]}, IndexSchemaError, "each once"),
        ({"patient_id": ["", "b"]}, IndexSchemaError, "in every row"),
        ({"split": ["train", "valid"]}, IndexSchemaError, "'valid'"),
        ({"height": ["tall", 7]}, IndexSchemaError, "tall"),
        ({"height": ["9" * 23, 7]}, IndexSchemaError, "i.csv: "),
        ({"label_mass": [2.0, 0.0]}, IndexSchemaError, "label_mass: only 1, 0"),
        ({"boxes": ["[]", "[1]"]}, IndexSchemaError, "boxes"),
        ({"boxes": ["[]", "{"]}, IndexSchemaError, "boxes"),
        ({"patient_id": ["p", "p"]}, PatientLeakError, "1 patients stand in two splits"),
    ],
)
def test_a_wrong_index_is_refused(frame, tmp_path, change, error, reason):
    frame.assign(**change).to_csv(tmp_path / "i.csv", index=False)
    with pytest.raises(error, match=reason):
        read_index(tmp_path / "i.csv")


def test_a_file_that_is_no_index_is_refused(frame, tmp_path):
    frame.drop(columns=["site", "boxes"]).to_csv(tmp_path / "i.csv", index=False)
    with pytest.raises(IndexSchemaError, match=r"no column \['site', 'boxes'\]"):
        read_index(tmp_path / "i.csv")
    (tmp_path / "i.csv").write_text("")
    with pytest.raises(IndexSchemaError, match="not a table"):
        read_index(tmp_path / "i.csv")
    with pytest.raises(MissingDataError, match="no such index"):
        read_index(tmp_path / "none.csv")


def make_folder(path):
    path.mkdir()


def make_latin_1(path):
    path.write_bytes("image_id,path\nä,ö\n".encode("latin-1"))


@pytest.mark.parametrize(
    ("make", "name", "error", "reason"),
    [
        (make_folder, "i.csv", MissingDataError, "cannot be read: Is a directory.*sparsecontrast index"),
        (lambda path: path.touch(0), "i.csv/j.csv", MissingDataError, "cannot be read: Not a directory"),
        (make_latin_1, "i.csv", IndexSchemaError, "not a table: 'utf-8'"),
        (lambda path: path.write_bytes(b"\0\1\2\0" * 99), "i.csv", IndexSchemaError, "i.csv|not an index"),
    ],
)
def test_a_path_that_is_no_readable_table_is_refused(tmp_path, make, name, error, reason):
    make(tmp_path / "i.csv")
    with pytest.raises(error, match=reason):
        read_index(tmp_path / name)


def test_an_index_that_may_not_be_read_is_refused(frame, tmp_path, monkeypatch):
    write_index(frame, tmp_path / "i.csv")

    def closed(*_, **__):  # a mode would not keep root out
        raise PermissionError(13, "Permission denied", str(tmp_path / "i.csv"))

    monkeypatch.setattr(pd, "read_csv", closed)
    with pytest.raises(MissingDataError, match=r"i\.csv: cannot be read: Permission denied"):
        read_index(tmp_path / "i.csv")


def test_a_full_disk_leaves_the_old_index(frame, tmp_path, monkeypatch):
    write_index(frame, tmp_path / "i.csv")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(StorageError, match="No space left"):
        write_index(frame.iloc[:1], tmp_path / "i.csv")
    monkeypatch.undo()
    assert len(read_index(tmp_path / "i.csv")) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["i.csv"]
