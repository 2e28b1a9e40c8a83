"""Each public data set in miniature: its true headers, its true folders, and what the index must say."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sparsecontrast.config import compose
from sparsecontrast.data.index import build_index, label_names
from sparsecontrast.errors import EmptySiteError, PatientLeakError
from tests.dicom_files import write_dicom

CHEXPERT = (
    "No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,Consolidation,"
    "Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
)


def index(root, name, *overrides, state=None):
    config = compose([f"data={name}", f"data.root={root}", *overrides])
    return build_index(config.data, state or root / ".state", progress=False)


def put(root, tables, images=(), size=(20, 30)):
    for name, text in tables.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for number, name in enumerate(images):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.arange(size[0] * size[1], dtype=np.uint16).reshape(size) + np.uint16(number)
        if name.endswith((".dicom", ".dcm")):
            write_dicom(root / name, pixels, PatientID=name, ViewPosition="AP")
        else:
            Image.fromarray((pixels % 251).astype(np.uint8)).save(root / name)


def labels(row, *names):
    return [row[f"label_{name}"] for name in names]


def by_file(frame):
    return {
        path.rsplit("/", 1)[1]: row for path, row in zip(frame["path"], frame.to_dict("records"), strict=True)
    }


# the real header ends in a comma, and two of its names hold one
NIH = {
    "Data_Entry_2017_v2020.csv": (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\n"
        "00000001_000.png,Cardiomegaly|Emphysema,0,1,57,M,PA,2682,2749,0.143,0.143,\n"
        "00000001_001.png,No Finding,1,1,58,M,AP,2894,2729,0.143,0.143,\n"
        "00000002_000.png,Pleural_Thickening,0,2,80,M,PA,2500,2048,0.168,0.168,\n"
        "00000003_000.png,Infiltration,0,3,74,F,PA,2500,2048,0.168,0.168,\n"
    ),
    "train_val_list.txt": "00000001_000.png\n00000001_001.png\n00000003_000.png\n",
    "test_list.txt": "00000002_000.png\n",
    "BBox_List_2017.csv": (
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
        "00000003_000.png,Infiltrate,225.084745762712,547.019216763771,86.7796610169491,79.1864406779661,,,\n"
    ),
}
NIH_IMAGES = [
    "images_001/images/00000001_000.png", "images_001/images/00000001_001.png",
    "images_002/images/00000002_000.png", "images_012/images/00000003_000.png",
]  # fmt: skip


def test_nih(tmp_path):
    put(tmp_path, NIH, NIH_IMAGES)
    built = index(tmp_path, "nih_cxr14")
    frame, rows = built.frame, by_file(built.frame)
    assert len(frame) == 4 and built.quarantine.empty
    assert frame["path"].tolist() == [str(tmp_path / name) for name in NIH_IMAGES]
    assert len(label_names(frame)) == 15
    assert labels(rows["00000001_000.png"], "cardiomegaly", "emphysema", "no_finding", "mass") == [1, 1, 0, 0]
    assert labels(rows["00000001_001.png"], "no_finding", "cardiomegaly") == [1, 0]
    assert labels(rows["00000002_000.png"], "pleural_thickening") == [1]
    assert (frame["height"] == 20).all() and (frame["width"] == 30).all()  # of the file, not of the film
    assert frame["view"].tolist() == ["PA", "AP", "PA", "PA"]
    assert frame["patient_id"].nunique() == 3 and frame["study_id"].nunique() == 4
    assert rows["00000002_000.png"]["split"] == "test"
    assert set(frame["split"][frame["path"] != rows["00000002_000.png"]["path"]]) <= {"train", "val"}
    (box,) = json.loads(rows["00000003_000.png"]["boxes"])
    assert box["label"] == "infiltration" and (box["x"], box["h"]) == (225.084745762712, 79.1864406779661)


def test_nih_of_kaggle_without_lists_and_boxes_splits_by_hash(tmp_path):
    text = NIH["Data_Entry_2017_v2020.csv"].replace(",\n", "\n")
    put(tmp_path, {"Data_Entry_2017.csv": text}, [name.replace("images_", "images-") for name in NIH_IMAGES])
    with pytest.raises(EmptySiteError, match="4 unreadable.*no such file"):
        index(tmp_path, "nih_cxr14")
    for name in NIH_IMAGES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name.replace("images_", "images-")).rename(tmp_path / name)
    frame = index(tmp_path, "nih_cxr14").frame
    assert len(frame) == 4 and (frame["boxes"] == "[]").all()
    assert frame.groupby("patient_id")["split"].nunique().max() == 1


def test_a_published_split_that_divides_a_patient_is_refused(tmp_path):
    lists = {"train_val_list.txt": "00000001_000.png\n", "test_list.txt": "00000001_001.png\n"}
    put(tmp_path, NIH | lists, NIH_IMAGES)
    with pytest.raises(PatientLeakError, match=r"1 patients.*recipe\.split=null"):
        index(tmp_path, "nih_cxr14")
    assert len(index(tmp_path, "nih_cxr14", "data.recipe.split=null").frame) == 4


CHEXPERT_TABLES = {
    "train.csv": (
        f"Path,Sex,Age,Frontal/Lateral,AP/PA,{CHEXPERT}\n"
        "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg,Female,68,Frontal,AP,1.0,,,,,,,,,0.0,,,,1.0\n"
        "CheXpert-v1.0-small/train/patient00001/study1/view2_lateral.jpg,Female,68,Lateral,,1.0,,,,,,,,,0.0,,,,1.0\n"
        "CheXpert-v1.0-small/train/patient00002/study1/view1_frontal.jpg,Male,40,Frontal,PA,,,-1.0,1.0,,,,,,,-1.0,,,\n"
    ),
    "valid.csv": (
        f"Path,Sex,Age,Frontal/Lateral,AP/PA,{CHEXPERT}\n"
        "CheXpert-v1.0-small/valid/patient64541/study1/view1_frontal.jpg,Male,73,Frontal,AP,"
        "0.0,1.0,1.0,1.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0\n"
    ),
}


@pytest.mark.parametrize("layout", ["small", "batches"])
def test_chexpert(tmp_path, layout):
    files = [
        "train/patient00001/study1/view1_frontal.jpg", "train/patient00001/study1/view2_lateral.jpg",
        "train/patient00002/study1/view1_frontal.jpg", "valid/patient64541/study1/view1_frontal.jpg",
    ]  # fmt: skip
    tables = CHEXPERT_TABLES
    if layout == "batches":  # the full set, as it is unpacked
        first = "CheXpert-v1.0 batch 1 (validate & csv)/"
        tables = {first + name: text for name, text in tables.items()}
        files = [
            first + f if f.startswith("valid") else f.replace("train/", "CheXpert-v1.0 batch 2 (train 1)/")
            for f in files
        ]
    put(tmp_path, tables, files)
    built = index(tmp_path, "chexpert")
    frame = built.frame
    assert built.counts["not_frontal"] == 1 and len(frame) == 3
    assert frame["path"].tolist() == [str(tmp_path / files[i]) for i in (0, 2, 3)]
    assert frame["view"].tolist() == ["AP", "PA", "AP"]
    assert frame["split"].tolist()[2] == "test" and "test" not in frame["split"].tolist()[:2]
    uncertain = labels(frame.iloc[1], "cardiomegaly", "effusion", "lung_opacity", "edema")
    np.testing.assert_array_equal(uncertain, [math.nan, math.nan, 1, math.nan])
    assert labels(frame.iloc[2], "enlarged_cardiomediastinum", "support_devices") == [1, 0]
    assert frame["patient_id"].nunique() == 3 == frame["study_id"].nunique()


@pytest.mark.parametrize(("policy", "expected"), [("ignore", math.nan), ("positive", 1.0), ("negative", 0.0)])
def test_uncertain_and_blank_labels(tmp_path, policy, expected):
    put(tmp_path, CHEXPERT_TABLES, ["train/patient00002/study1/view1_frontal.jpg"])
    frame = index(tmp_path, "chexpert", f"data.recipe.uncertain={policy}").frame
    np.testing.assert_array_equal(labels(frame.iloc[0], "cardiomegaly", "edema"), [expected, math.nan])
    frame = index(tmp_path, "chexpert", f"data.recipe.uncertain={policy}", "data.recipe.blank=negative").frame
    np.testing.assert_array_equal(labels(frame.iloc[0], "cardiomegaly", "edema"), [expected, 0.0])


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_mimic(tmp_path, suffix):
    files = [
        "files/p10/p10000032/s50414267/02aa804e-bde0afdd.jpg",
        "files/p10/p10000032/s53189527/2a2277a9-b0ded155.jpg",
        "files/p11/p11000011/s51029426/6ad819bb-bae74eb9.jpg",
        "files/p19/p19999999/s59999999/ffffffff-00000000.jpg",
    ]
    put(tmp_path, {}, files)
    metadata = (
        "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate,"
        "StudyTime,ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,"
        "PatientOrientationCodeSequence_CodeMeaning\n"
        "02aa804e-bde0afdd,10000032,50414267,CHEST,PA,3056,2544,21800506,213014,CHEST,postero-anterior,\n"
        "2a2277a9-b0ded155,10000032,53189527,CHEST,,3056,2544,21800626,165500.312,CHEST,lateral,\n"
        "6ad819bb-bae74eb9,11000011,51029426,CHEST,AP,2705,2539,21800723,80556.875,CHEST,antero-posterior,\n"
        "ffffffff-00000000,19999999,59999999,CHEST,,2705,2539,21800723,80556.875,CHEST,,\n"
    )
    names = (
        "Atelectasis,Cardiomegaly,Consolidation,Edema,Enlarged Cardiomediastinum,Fracture,Lung Lesion,"
        "Lung Opacity,No Finding,Pleural Effusion,Pleural Other,Pneumonia,Pneumothorax,Support Devices"
    )
    chexpert = f"subject_id,study_id,{names}\n10000032,50414267,,,,,,,,,1.0,,,,,\n"
    chexpert += "11000011,51029426,,-1.0,,0.0,,,,1.0,,1.0,,,,\n"
    split = (
        "dicom_id,study_id,subject_id,split\n02aa804e-bde0afdd,50414267,10000032,validate\n"
        "2a2277a9-b0ded155,53189527,10000032,validate\n6ad819bb-bae74eb9,51029426,11000011,test\n"
        "ffffffff-00000000,59999999,19999999,train\n"
    )
    for name, text in {"metadata": metadata, "chexpert": chexpert, "split": split}.items():
        rows = pd.DataFrame(
            [line.split(",") for line in text.splitlines()[1:]], columns=text.splitlines()[0].split(",")
        )
        rows.to_csv(tmp_path / f"mimic-cxr-2.0.0-{name}{suffix}", index=False)
    built = index(tmp_path, "mimic_cxr_jpg")
    frame = built.frame
    assert built.counts["not_frontal"] == 1
    assert frame["path"].tolist() == [str(tmp_path / files[i]) for i in (0, 2, 3)]
    assert frame["split"].tolist() == ["val", "test", "train"]
    assert frame["view"].tolist() == ["PA", "AP", ""]
    assert frame["height"].tolist() == [3056, 2705, 2705] and frame["width"].tolist() == [2544, 2539, 2539]
    found = [labels(row, "no_finding", "cardiomegaly", "edema", "effusion") for _, row in frame.iterrows()]
    nan = math.nan
    np.testing.assert_array_equal(found, [[1, nan, nan, nan], [nan, nan, 0, 1], [nan] * 4])
    # a study that the labeller never saw stays unlabelled, whatever empty cells mean
    frame = index(tmp_path, "mimic_cxr_jpg", "data.recipe.blank=negative").frame
    assert labels(frame.iloc[0], "no_finding", "edema") == [1, 0]
    assert math.isnan(frame["label_edema"][2])


def test_padchest(tmp_path):
    columns = (
        ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,"
        "ViewPosition_DICOM,Projection,MethodProjection,Pediatric,Modality_DICOM,Rows_DICOM,Columns_DICOM,"
        "ReportID,Report,MethodLabel,Labels,"
        "Localizations,LabelsLocalizationsBySentence,labelCUIS,LocalizationsCUIS"
    )
    cells = [
        ("a.png", "0", "PA", "\"['normal']\""),
        (
            "b.png",
            "1",
            "AP_horizontal",
            "\"['pulmonary fibrosis', ' cardiomegaly', 'loculated pleural effusion', nan]\"",
        ),
        ("c.png", "1", "L", "\"['normal']\""),
        ("d.png", "2", "PA", "\"['exclude', 'nodule']\""),
        ("e.png", "2", "UNK", ""),
        ("f.png", "2", "COSTAL", "\"['rib fracture']\""),
        ("g.png", "2", "PA", "\"['']\""),
    ]
    big = 136688350012022394123000000000000000000
    rows = [
        f"{i},{name},{folder},20140915,{big + i},{big},1930.0,M,POSTEROANTERIOR,{view},Manual review,"
        f"No,CR,2539,3056,47,texto,Physician,{found},,,,"
        for i, (name, folder, view, found) in enumerate(cells)
    ]
    tables = {"PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv": "\n".join([columns, *rows]) + "\n"}
    put(tmp_path, tables, [f"{folder}/{name}" for name, folder, _, _ in cells])
    built = index(tmp_path, "padchest")
    rows = by_file(built.frame)
    assert sorted(rows) == ["a.png", "b.png", "d.png", "e.png", "g.png"] and built.counts["not_frontal"] == 2
    assert labels(rows["a.png"], "no_finding", "fibrosis") == [1, 0]
    assert labels(rows["b.png"], "fibrosis", "cardiomegaly", "effusion", "no_finding", "nodule") == [
        1,
        1,
        1,
        0,
        0,
    ]
    assert rows["b.png"]["view"] == "AP"
    for unlabelled in ("d.png", "e.png", "g.png"):
        assert all(map(math.isnan, labels(rows[unlabelled], "no_finding", "nodule", "fracture")))
    assert len({row["patient_id"] for row in rows.values()}) == 1 and built.frame["study_id"].nunique() == 5


VINDR_NAMES = (
    "Aortic enlargement,Atelectasis,Calcification,Cardiomegaly,Clavicle fracture,Consolidation,Edema,"
    "Emphysema,Enlarged PA,ILD,Infiltration,Lung Opacity,Lung cavity,Lung cyst,Mediastinal shift,Nodule/Mass,"
    "Pleural effusion,Pleural thickening,Pneumothorax,Pulmonary fibrosis,Rib fracture,Other lesion,COPD,"
    "Lung tumor,Pneumonia,Tuberculosis,Other diseases,No finding"
)
VINDR = VINDR_NAMES.split(",")


def vindr_row(start, *present):
    return ",".join([*start, *("1" if name in present else "0" for name in VINDR)]) + "\n"


def test_vindr(tmp_path):
    train = f"image_id,rad_id,{','.join(VINDR)}\n" + "".join(
        [
            vindr_row(["aa", "R1"], "Nodule/Mass", "Pleural effusion"),
            vindr_row(["aa", "R2"], "Nodule/Mass"),
            vindr_row(["bb", "R1"], "No finding"),
            vindr_row(["aa", "R3"], "Other diseases"),
            vindr_row(["bb", "R2"], "No finding"),
            vindr_row(["bb", "R3"], "No finding"),
        ]
    )
    test = f"image_id,{','.join(VINDR)}\n".replace("Other diseases", "Other disease") + vindr_row(
        ["cc"], "Other diseases"
    )
    boxes = (
        "image_id,rad_id,class_name,x_min,y_min,x_max,y_max\naa,R1,Pleural effusion,1,2,11.5,22\n"
        "aa,R2,Nodule/Mass,3,4,5,6\nbb,R1,No finding,,,,\n"
    )
    tables = {
        "annotations/image_labels_train.csv": train, "annotations/image_labels_test.csv": test,
        "annotations/annotations_train.csv": boxes,
        "annotations/annotations_test.csv": "image_id,class_name,x_min,y_min,x_max,y_max\ncc,ILD,0,0,9,9\n",
    }  # fmt: skip
    put(tmp_path, tables, ["train/aa.dicom", "train/bb.dicom", "test/cc.dicom"])
    rows = by_file(index(tmp_path, "vindr_cxr").frame)
    # two of three readers saw the nodule, one the effusion, one another disease
    assert labels(rows["aa.dicom"], "nodule_mass", "effusion", "other_disease") == [1, 0, 0]
    assert labels(rows["bb.dicom"], "no_finding", "nodule_mass") == [1, 0]
    assert labels(rows["cc.dicom"], "other_disease") == [1]
    assert json.loads(rows["aa.dicom"]["boxes"]) == [
        {"label": "effusion", "x": 1.0, "y": 2.0, "w": 10.5, "h": 20.0},
        {"label": "nodule_mass", "x": 3.0, "y": 4.0, "w": 2.0, "h": 2.0},
    ]
    assert rows["bb.dicom"]["boxes"] == "[]" and json.loads(rows["cc.dicom"]["boxes"])[0]["label"] == "ild"
    assert rows["cc.dicom"]["split"] == "test" and rows["aa.dicom"]["split"] in ("train", "val")
    assert {(row["height"], row["width"], row["view"]) for row in rows.values()} == {(20, 30, "PA")}
    either = by_file(index(tmp_path, "vindr_cxr", "data.recipe.reduce=any").frame)
    assert labels(either["aa.dicom"], "nodule_mass", "effusion", "other_disease") == [1, 1, 1]


@pytest.mark.parametrize("mapped", [False, True])
def test_rsna(tmp_path, mapped):
    tables = {
        "stage_2_train_labels.csv": (
            "patientId,x,y,width,height,Target\np0,,,,,0\np1,264.0,152.0,213.0,379.0,1\n"
            "p1,562.0,152.0,256.0,453.0,1\np2,,,,,0\n"
        ),
        "stage_2_detailed_class_info.csv": (
            "patientId,class\np0,No Lung Opacity / Not Normal\np1,Lung Opacity\np1,Lung Opacity\np2,Normal\n"
        ),
    }
    if mapped:
        entries = [("p0", "00000013_005.png"), ("p1", "00000013_019.png"), ("p2", "00000029_001.png")]
        tables["pneumonia-challenge-dataset-mappings_2018.json"] = json.dumps(
            [
                {"subset_img_id": a, "img_id": b, "orig_labels": ["x"], "StudyInstanceUID": "1.2"}
                for a, b in entries
            ]
        )
    put(tmp_path, tables, [f"stage_2_train_images/p{i}.dcm" for i in range(3)])
    frame = index(tmp_path, "rsna_pneumonia").frame
    rows = by_file(frame)
    assert len(frame) == 3
    assert labels(rows["p0.dcm"], "lung_opacity", "no_finding", "other_finding") == [0, 0, 1]
    assert labels(rows["p1.dcm"], "lung_opacity", "no_finding", "other_finding") == [1, 0, 0]
    assert labels(rows["p2.dcm"], "lung_opacity", "no_finding", "other_finding") == [0, 1, 0]
    assert [b["w"] for b in json.loads(rows["p1.dcm"]["boxes"])] == [213.0, 256.0]
    assert set(frame["view"]) == {"AP"}  # out of the DICOM header
    assert (rows["p0.dcm"]["patient_id"] == rows["p1.dcm"]["patient_id"]) is mapped
    assert rows["p2.dcm"]["patient_id"] != rows["p1.dcm"]["patient_id"]
