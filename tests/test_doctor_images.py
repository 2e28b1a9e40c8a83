"""The doctor on a site's images: what is broken, strange or missing is counted, and tells of no patient."""

import dataclasses
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sparsecontrast.config import compose
from sparsecontrast.doctor import images, pictures
from sparsecontrast.overrides import assign
from tests.cell_files import write_cells
from tests.dicom_files import write_dicom
from tests.test_doctor import of


def dicom_site(folder, good, broken):
    """A DICOM folder whose files are named after a patient, some of them torn."""
    folder.mkdir()
    pixels = np.random.Generator(np.random.PCG64(0)).integers(0, 4096, (40, 40)).astype(np.uint16)
    for i in range(good + broken):
        path = folder / f"DOE^JANE-{i}.dcm"
        write_dicom(path, pixels, PatientID=f"JANE{i}", StudyInstanceUID=f"1.2.{i}", PatientName="DOE^JANE")
        if i >= good:
            path.write_bytes(path.read_bytes()[:200])
    words = [
        "data=dicom",
        assign("data.root", folder),
        "data.min_images=2",
        "data.val_fraction=0.01",
        "data.test_fraction=0.01",
    ]
    return compose(words)


@pytest.mark.parametrize(("good", "broken", "level"), [(6, 0, "ok"), (6, 2, "warn"), (3, 6, "FAIL")])
def test_a_folder_of_broken_files_is_told_by_its_share(tmp_path, good, broken, level):
    found = list(images.images(dicom_site(tmp_path / "in", good, broken), tmp_path / "state"))
    line = of(found, "quarantine")
    assert line.level == level and f"{broken} of {good + broken} " in line.what
    assert of(found, "data").what.startswith(f"{good} images of {good} patients")
    assert not re.search("DOE|JANE", "".join(map(str, found)))


def test_data_that_are_not_there_or_too_few_are_a_fault_without_a_path(tmp_path):
    config = dicom_site(tmp_path / "DOE^JANE", 3, 0)
    few = dataclasses.replace(config, data=dataclasses.replace(config.data, min_images=50))
    assert of(list(images.images(few, tmp_path / "state")), "data").level == "FAIL"
    shutil.rmtree(tmp_path / "DOE^JANE")
    found = list(images.images(config, tmp_path / "other"))
    assert [(f.level, f.name) for f in found] == [("FAIL", "data")]
    assert "data_missing" in found[0].what and "DOE" not in str(found[0])


@pytest.mark.parametrize(
    ("fault", "count", "level"),
    [
        ("uniform", 2, "warn"),
        ("uniform", 5, "FAIL"),
        ("clipped", 2, "warn"),
        ("broken", 5, "FAIL"),
        ("", 0, "ok"),
    ],
)
def test_strange_pixels_are_counted_and_shown(tmp_path, fault, count, level):
    generator = np.random.Generator(np.random.PCG64(1))
    paths = []
    for i in range(8):
        pixels = generator.integers(1, 255, (64, 64))
        if i < count and fault == "uniform":
            pixels = 100 + pixels % 2
        elif i < count and fault == "clipped":
            pixels = np.where(pixels > 100, 255, 0)
        path = tmp_path / f"{i}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        if i < count and fault == "broken":
            path.write_bytes(b"no image")
        paths.append(str(path))
    found = images._pixels(pd.DataFrame({"path": paths}), tmp_path / "sheet.png")
    assert found.level == level and f"8 looked at, {count} strange" in found.what
    with Image.open(tmp_path / "sheet.png") as sheet:
        framed = (np.asarray(sheet)[0, :: images.SIDE][:6] == (255, 60, 60)).all(axis=1)
    assert framed.sum() == min(count, 6)


def test_a_labs_pictures_are_counted_and_opened_without_a_path(tmp_path):
    root = write_cells(tmp_path / "DOE^JANE", each=4)
    words = [assign("cells.root", root)]
    found = list(pictures.pictures(words))
    assert [f.level for f in found] == ["ok", "ok"]
    assert found[0].what == "16 pictures of 2 classes, 2 lab(s)" and "0 unreadable" in found[1].what
    for i, path in enumerate(sorted((root / "images").iterdir())):
        if i < 3:
            path.write_bytes(b"no picture")
    assert [f.level for f in pictures.pictures(words)] == ["ok", "warn"]
    shutil.rmtree(root / "images")
    assert [f.level for f in pictures.pictures(words)] == ["ok", "FAIL"]
    shutil.rmtree(root)
    (found,) = pictures.pictures(words)
    assert found.level == "FAIL" and "data_missing" in found.what and "DOE" not in str(found)
