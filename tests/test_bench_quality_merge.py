"""Arms that were measured again take their place in a committed result, and no others."""

import copy
import json

import pytest

from benchmarks import quality_merge


def result(arms, auroc, date):
    rows = [
        {"data": "phantoms", "task": "t", "label": label, "arm": arm, "auroc": auroc, "patients": 9,
         "positives": 3, **({"mean_steps": 300.0} if arm != "pixels_16x16" else {})}
        for label in ("a", "macro") for arm in arms
    ]  # fmt: skip
    return {"name": "quality", "command": "c", "machine": {}, "versions": {}, "date": date, "rows": rows}


OLD = result(["dense", "ours", "ours, asked dense", "evit", "tome", "pixels_16x16"], 0.6, "old")
NEW = result(["dense", "ours", "ours, asked dense", "evit", "pixels_16x16"], 0.75, "new")


def test_only_the_arms_that_are_asked_for_are_replaced_in_place(tmp_path):
    files = [tmp_path / "new.json", tmp_path / "into.json"]
    for file, content in zip(files, (NEW, OLD), strict=True):
        file.write_text(json.dumps(content))
    quality_merge.main([*map(str, files), "--arms", "evit"])
    found = json.loads(files[1].read_text())
    assert [r["arm"] for r in found["rows"]] == [r["arm"] for r in OLD["rows"]]
    assert all((r["auroc"] == 0.75) == (r["arm"] == "evit") for r in found["rows"])
    told = found["merged"][0]
    assert (told["arms"], told["date"], found["date"]) == (["evit"], "new", "old")
    assert told["largest_auroc_shift_of_other_arms"] == 0.15
    assert len(list(tmp_path.iterdir())) == 2


def test_an_arm_that_had_been_withdrawn_comes_back_to_its_place():
    without = {**OLD, "rows": [r for r in OLD["rows"] if r["arm"] != "evit"]}
    found = quality_merge.merged(without, NEW, ["evit"])
    assert [r["arm"] for r in found["rows"]] == [r["arm"] for r in OLD["rows"]]


def test_results_that_do_not_compare_are_refused():
    with pytest.raises(SystemExit, match="no arm tome"):
        quality_merge.merged(OLD, NEW, ["tome"])
    for key, value in (("mean_steps", 20.0), ("patients", 8)):
        other = copy.deepcopy(NEW)
        other["rows"][0][key] = value
        with pytest.raises(SystemExit, match="same films"):
            quality_merge.merged(OLD, other, ["evit"])
    alone = {**NEW, "rows": [r for r in NEW["rows"] if r["arm"] in ("evit", "pixels_16x16")]}
    with pytest.raises(SystemExit, match="same films"):
        quality_merge.merged(OLD, alone, ["evit"])
    strange = copy.deepcopy(NEW)
    strange["rows"][3]["label"] = "b"
    with pytest.raises(SystemExit, match="does not ask"):
        quality_merge.merged(OLD, strange, ["evit"])
