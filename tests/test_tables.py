"""Recipes that do not fit: refused by name, before anything is read of the images."""

import pytest

from sparsecontrast.data.recipe import parse_recipe
from sparsecontrast.errors import MissingDataError, RecipeError
from tests.test_recipes import CHEXPERT_TABLES, index, put


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"surprise": 1}, r"recipe: unknown \['surprise'\]"),
        ({"labels": [{"kind": "guess"}]}, "kind='guess'"),
        ({"labels": [{"kind": "separated"}]}, "'column' goes with"),
        ({"labels": [{"kind": "long", "column": "a"}]}, "'file' and 'on' go with"),
        ({"labels": [{"kind": "columns", "names": ["A b", {"a_b": "c"}]}]}, "stand there twice"),
        ({"boxes": [{"xywh": ["a"], "label": "l"}]}, "four columns"),
        ({"boxes": [{"xywh": list("abcd"), "xyxy": list("abcd"), "label": "l"}]}, "either 'xywh' or 'xyxy'"),
        ({"join": [{"file": "a.csv"}]}, "'on' is missing"),
        ({"uncertain": "maybe"}, "ignore, positive, negative"),
        ({"patient": {"pattern": "x"}}, "needs 'column' or 'value'"),
    ],
)
def test_a_recipe_outside_the_vocabulary_is_refused_by_name(change, reason):
    with pytest.raises(RecipeError, match=reason):
        parse_recipe({"images": "a.csv", "path": "{p}", **change})


@pytest.mark.parametrize(
    ("table", "error", "reason"),
    [
        (
            "path,group_id\na.png,1\n",
            RecipeError,
            r"no column \['no_finding'\]; there are \['path', 'group_id'\]",
        ),
        (None, MissingDataError, "index.csv"),
        ("", RecipeError, "index.csv: not a table"),
    ],
)
def test_a_table_that_does_not_fit_is_named(tmp_path, table, error, reason):
    if table is not None:
        put(tmp_path, {"index.csv": table, "boxes.csv": "path,label,x,y,w,h\n"})
    with pytest.raises(error, match=reason):
        index(tmp_path, "cxr_multisite")


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ("path,Mass,mass\na.png,1,0\n", "contradict each other"),
        ("path\na.png\na.png\n", "1 rows name a file that another row names"),
    ],
)
def test_rows_that_contradict_are_refused(tmp_path, table, reason):
    put(tmp_path, {"index.csv": table}, ["a.png"])
    with pytest.raises(RecipeError, match=reason):
        index(tmp_path, "csv")


def test_a_cell_that_is_no_label_is_refused(tmp_path):
    put(tmp_path, CHEXPERT_TABLES | {"valid.csv": CHEXPERT_TABLES["valid.csv"].replace("AP,0.0", "AP,maybe")})
    with pytest.raises(RecipeError, match="'No Finding'.*maybe"):
        index(tmp_path, "chexpert")


def test_a_join_that_matches_nothing_is_refused(tmp_path):
    tables = {
        "mimic-cxr-2.0.0-metadata.csv": "dicom_id,subject_id,study_id\nd,1,2\n",
        "mimic-cxr-2.0.0-split.csv": "dicom_id,study_id,subject_id,split\nd,2.0,1.0,train\n",
    }
    put(tmp_path, tables)
    with pytest.raises(RecipeError, match="no row joins the images"):
        index(tmp_path, "mimic_cxr_jpg")
