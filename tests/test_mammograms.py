"""Mammograms: every film of mini-MIAS is kept, and CBIS-DDSM is read in the shape of its publication."""

import numpy as np
import pandas as pd
import pytest

from sparsecontrast.data.images import read_image
from sparsecontrast.errors import PatientLeakError
from tests.dicom_files import write_dicom
from tests.test_recipes import index, labels, put


def test_mias_keeps_every_mammogram(shared_data, tmp_path):
    built = index(shared_data / "mias", "mias", state=tmp_path)
    frame, table = built.frame, pd.read_csv(shared_data / "mias" / "index.csv")
    assert len(frame) == len(table) and built.quarantine.empty
    assert built.counts["not_frontal"] == built.counts["not_chest"] == 0
    assert set(frame["view"]) == {"OTHER"} and set(frame["site"]) == {"mias_uk"}
    assert frame["patient_id"].nunique() == table["patient_id"].nunique()
    for name in ("normal", "benign", "malignant"):
        assert frame[f"label_{name}"].sum() == (table["label"] == name).sum()
    assert (frame["label_abnormal"] == 1 - frame["label_normal"]).all()
    assert (frame["boxes"] != "[]").sum() == pd.read_csv(shared_data / "mias" / "boxes.csv")["path"].nunique()


CBIS = (
    "patient_id,{density},left or right breast,image view,abnormality id,abnormality type,{a},{b},assessment,"
    "pathology,subtlety,image file path,cropped image file path,ROI mask file path\n"
)
CBIS_UID = "1.3.6.1.4.1.9590.100.1.2"


def cbis_row(kind, part, patient, side, view, number, pathology):
    case = f"{kind}-{part}_P_{patient:05}_{side}_{view}"
    file = f"{case}/{CBIS_UID}.{patient}/{CBIS_UID}.{patient}.1/000000.dcm"
    word = {"Calc": "calcification", "Mass": "mass"}[kind]
    # the published tables end two of their paths in a line break
    return (f"P_{patient:05},3,{side},{view},{number},{word},X,Y,4,{pathology},3,{file},"
            f'"{case}_{number}/a/b/000001.dcm\n","{case}_{number}/a/b/000000.dcm\n"\n'), file  # fmt: skip


@pytest.mark.parametrize("layout", ["published", "archive"])
def test_cbis_ddsm(tmp_path, layout):
    cases = {
        "calc_case_description_train_set.csv": [
            ("Calc", "Training", 5, "RIGHT", "CC", 1, "MALIGNANT"),
            ("Calc", "Training", 5, "RIGHT", "MLO", 1, "BENIGN"),
            ("Calc", "Training", 5, "RIGHT", "MLO", 2, "MALIGNANT"),
            ("Calc", "Training", 7, "LEFT", "CC", 1, "BENIGN_WITHOUT_CALLBACK"),
        ],
        "calc_case_description_test_set.csv": [("Calc", "Test", 38, "LEFT", "CC", 1, "BENIGN")],
        "mass_case_description_train_set.csv": [("Mass", "Training", 1, "LEFT", "MLO", 1, "MALIGNANT")],
        "mass_case_description_test_set.csv": [("Mass", "Test", 7, "LEFT", "CC", 1, "BENIGN")],
    }
    tables, files = {}, []
    for name, rows in cases.items():
        calc = name.startswith("calc")
        words = {"density": "breast density" if calc else "breast_density",
                 "a": "calc type" if calc else "mass shape",
                 "b": "calc distribution" if calc else "mass margins"}  # fmt: skip
        told = [cbis_row(*row) for row in rows]
        tables[name] = CBIS.format(**words) + "".join(text for text, _ in told)
        files += [file for _, file in told]
    if layout == "archive":
        files = ["CBIS-DDSM/" + file.replace("000000.dcm", "1-1.dcm") for file in files]
    put(tmp_path, tables)
    for number, file in enumerate(dict.fromkeys(files)):
        (tmp_path / file).parent.mkdir(parents=True)
        pixels = np.arange(600, dtype=np.uint16).reshape(20, 30) + np.uint16(number)
        write_dicom(tmp_path / file, pixels, Modality="MG", BodyPartExamined="BREAST", ViewPosition=None)
    built = index(tmp_path, "cbis_ddsm")
    frame = built.frame
    assert built.quarantine.empty and frame["path"].tolist() == [
        str(tmp_path / f) for f in dict.fromkeys(files)
    ]
    found = [labels(row, "malignant", "benign", "calcification", "mass") for _, row in frame.iterrows()]
    assert found == [[1, 0, 1, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1], [0, 1, 0, 1]]
    assert frame["patient_id"].nunique() == 4  # one in both tables
    assert set(frame["site"]) == {"cbis_ddsm"} and set(frame["view"]) == {"OTHER"}
    with pytest.raises(PatientLeakError, match="1 patients stand in two splits"):
        index(tmp_path, "cbis_ddsm", "data.recipe.split=part")
    read = read_image(frame["path"][0])
    assert read.shape == (20, 30)
