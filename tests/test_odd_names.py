"""Files whose names are no UTF-8, or hold what a table is made of, as hospital exports have them."""

import hmac
import io
import os

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from client.log import note
from simulation import partition
from sparsecontrast.classify.cells import load_cells, split_cells, training_rows
from sparsecontrast.classify.federation import CellsRun
from sparsecontrast.classify.pictures import _choose
from sparsecontrast.cli import main
from sparsecontrast.config import compose
from sparsecontrast.data.cache import load_dataset
from sparsecontrast.data.csv_files import read_table, write_table
from sparsecontrast.data.images import read_header, read_image
from sparsecontrast.data.index import read_index, write_index
from sparsecontrast.data.pseudonyms import pseudonym
from sparsecontrast.data.splits import unit_hash
from sparsecontrast.doctor import images
from sparsecontrast.errors import ImageReadError, IndexSchemaError
from sparsecontrast.federated import Place, compose_run
from sparsecontrast.federated.cells import own_cells, training_set
from sparsecontrast.item_scores import item_names
from sparsecontrast.runs import read_table as read_run_table
from tests.cell_files import draw_cell
from tests.dicom_files import write_dicom
from tests.federations import partitions, rows, serve, words, write_images
from tests.labs import MODEL

SOUND = (
    b"M\xfcller.dcm", b"M\xfcller", b"\xff\xfe\x80", "Müller.dcm".encode(), b"-rf.dcm", b"new\nline.dcm",
    b"cr\rx.dcm", b"crlf\r\nx.dcm", b"quo\"t'e.dcm", b'",', b"a,b;c.dcm", b" blank ", b"tab\t",
    b"back\\slash", b"phantom:1", b"nan", "\u2028\x85".encode(), b"\xed\xb3\xbc",
)  # fmt: skip
JUNK = (b"J\xfcnk.dcm", b'ju\nnk",.dcm')
WORDS = ("data=dicom", "data.image_size=16", "data.min_images=1", "data.val_fraction=0.3")


@pytest.fixture
def export(tmp_path):
    """A folder of radiographs, told apart by a bright row; one is without a patient, so named by its file."""
    root = os.fsencode(tmp_path / "export")
    for number, name in enumerate(SOUND):
        folder = os.path.join(root, (b"St\xe4tion" if number % 2 else b"plain"))
        os.makedirs(folder, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 500, (40, 30)).astype(np.uint16)
        pixels[number] = 1000
        patient = "" if number < 2 else f"p{number}"
        write_dicom(os.fsdecode(os.path.join(folder, name)), pixels, PatientID=patient, StudyInstanceUID="")
    for name in JUNK:
        with open(os.path.join(root, name), "wb") as file:
            file.write(b"<html>502</html>")
    return tmp_path / "export"


def names(paths):
    return sorted(os.path.basename(os.fsencode(path)) for path in paths)


def rows_shown(paths):
    """Which row is bright in each file, by the name that a table gave for it."""
    return {os.fsencode(os.path.basename(p)): int(read_image(p).mean(axis=1).argmax()) for p in paths}


def load(folder, *words, workers=None):
    config = compose([*WORDS, *words])
    return load_dataset(config, folder / "cache", folder / "state", progress=False, workers=workers)


@pytest.mark.parametrize("workers", [None, 2])
def test_a_hospitals_folder_is_read_and_read_back_whatever_its_names(export, tmp_path, workers):
    words = [f"data.root={export}"]
    first = load(tmp_path, *words, workers=workers)
    again = load(tmp_path, *words, workers=workers)
    for data in (first, again):
        assert names(data.frame["path"]) == sorted(SOUND)
        assert names(data.quarantine["path"]) == sorted(JUNK)
        assert rows_shown(data.frame["path"]) == {name: n for n, name in enumerate(SOUND)}
        assert data.frame["image_id"].nunique() == data.frame["patient_id"].nunique() == len(SOUND)
    pd.testing.assert_frame_equal(first.frame, again.frame)
    assert (first.images == again.images).all()
    kept = read_run_table(tmp_path / "state", "quarantine.csv")
    assert kept is not None and all(os.path.isfile(path) for path in kept["path"])
    items, patients = item_names(first.frame, compose([*WORDS, *words]).data)
    assert len(set(items)) == len(set(patients)) == len(SOUND)


def test_an_index_that_was_written_opens_the_same_files(export, tmp_path, capsys):
    words = [*WORDS, f"data.root={export}", f"output_dir={tmp_path / 'run'}"]
    assert main(["index", "--out", str(tmp_path / "out"), *words]) == 0
    assert f"{len(SOUND)} images, {len(JUNK)} files left out" in capsys.readouterr().out
    data = load(tmp_path, f"data.index={tmp_path / 'out' / 'index.csv'}")
    assert rows_shown(data.frame["path"]) == {name: n for n, name in enumerate(SOUND)}
    assert names(data.quarantine["path"]) == sorted(JUNK)
    cut = tmp_path / "cut" / "index.csv"
    partition.write([*words, "federation.partition=iid", "federation.sites=2"], cut)
    assert names(read_index(cut)["path"]) == sorted(SOUND)
    assert names(read_table(cut.parent / "quarantine.csv")["path"]) == sorted(JUNK)


def test_the_doctor_finds_nothing_to_report(export, tmp_path):
    config = compose([*WORDS, f"data.root={export}"])
    found = {finding.name: finding for finding in images.images(config, tmp_path / "state")}
    assert [found[name].level for name in ("data", "quarantine", "pixels")] == ["ok", "warn", "ok"]
    assert "2 of 20 files left out" in found["quarantine"].what


@pytest.mark.usefixtures("impatient")
def test_hospitals_with_such_files_train(tmp_path):
    csv = write_images(tmp_path / "films", {"a": 4, "b": 4}, broken=("b",))
    frame = read_index(csv)
    odd = [os.fsdecode(os.fsencode(path) + b"-M\xfcller,\n\r") for path in frame["path"]]
    for plain, path in zip(frame["path"], odd, strict=True):
        os.rename(plain, path)
    write_index(frame.assign(path=odd), csv)
    told = words(csv, tmp_path / "out", "federation.sites=2", "federation.min_sites=1", "federation.rounds=1")
    serve(partitions(2), told)
    last = rows(tmp_path / "out")[-1]
    assert (last["contributors"], last["refused"]) == (["a"], {"b": "site_empty"})


def test_the_table_holds_the_names_own_bytes_and_no_other_column_may(tmp_path):
    path = tmp_path / "t.csv"
    write_table(pd.DataFrame({"path": [os.fsdecode(b"/M\xfcller")], "reason": ["bad"]}), path)
    assert b"/M\xfcller" in path.read_bytes()
    path.write_bytes(b"path,site\n/a,M\xfcller\n")
    with pytest.raises(ValueError, match="utf-8"):
        read_table(path)
    with pytest.raises(IndexSchemaError, match="not a table"):
        read_index(path)


def test_an_index_keeps_its_names_through_many_writings(export, tmp_path):
    frame = load(tmp_path, f"data.root={export}").frame
    for number in range(3):
        write_index(frame, tmp_path / f"{number}.csv")
        frame = read_index(tmp_path / f"{number}.csv")
    assert (tmp_path / "0.csv").read_bytes() == (tmp_path / "2.csv").read_bytes()


def test_pseudonyms_and_splits_of_such_names_differ_and_stay():
    odd = [os.fsdecode(name) for name in SOUND]
    assert len({pseudonym(b"k" * 32, "image", name) for name in odd}) == len(odd)
    assert len({unit_hash("salt", name) for name in odd}) == len(odd)
    plain = hmac.new(b"k" * 32, "patient:Müller".encode(), "sha256").hexdigest()
    assert pseudonym(b"k" * 32, "patient", "Müller") == plain[:16]  # plain ones keep theirs


def test_a_reason_holds_no_name_however_it_is_quoted(tmp_path):
    for name in (*SOUND, b'it\'s "DOE".png'):
        path = os.path.join(os.fsencode(tmp_path), name)
        with open(path, "wb") as file:
            file.write(b"\x89PNG\r\n\x1a\n" + b"junk" * 40)
        for read in (read_image, read_header):
            with pytest.raises(ImageReadError) as caught:
                read(os.fsdecode(path))
            assert tmp_path.name not in str(caught.value) and "DOE" not in str(caught.value)


def test_the_log_takes_any_text_and_any_folder(tmp_path):
    note(tmp_path, "lost " + os.fsdecode(b"M\xfcller") + " \ud800 \0 é")
    assert r"lost M\udcfcller \ud800" in (tmp_path / "client.log").read_text(encoding="utf-8")
    note(tmp_path / "no\0folder", "text")
    note(tmp_path / "client.log", "text")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "client.log").mkdir()
    note(tmp_path / "other", "text")


def test_a_labs_pictures_and_folders_too(tmp_path):
    root = tmp_path / "cells"
    for label in (b"disc", b"r\xefng"):
        folder = os.path.join(os.fsencode(root), label)
        os.makedirs(folder)
        for number in range(6):
            picture = io.BytesIO()
            Image.fromarray(draw_cell("disc", "grey", number)).save(picture, "PNG")
            with open(os.path.join(folder, b"M\xfcller\n%d.png" % number), "wb") as file:
                file.write(picture.getvalue() if number else b"junk")
    words = ["cells.layout=folders", f"cells.root={root}", "cells.min_images=2"]
    config = own_cells(words)
    cells = load_cells(config, 16)
    assert cells.classes == ("disc", r"r\udcefng") and len(cells) == 10
    assert len(_choose(cells, split_cells(cells, config, 0).train, 3, 0)) == 3
    run = compose_run([*MODEL, *words, f"cells.classes={list(cells.classes)}".replace("\\\\", "\\")])
    assert isinstance(run, CellsRun)
    place = Place("cells", False, tmp_path, tmp_path, "")
    assert len(training_set(run, place)) == len(training_rows(cells, run.cells, run.seed))
    assert sorted(names(read_table(tmp_path / "quarantine.csv")["path"])) == [b"M\xfcller\n0.png"] * 2
