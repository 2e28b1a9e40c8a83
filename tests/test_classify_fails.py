"""What ``classify`` does when its table is no table, or when training runs away."""

import json
import math

import pytest

from sparsecontrast.classify import fit as fitting
from sparsecontrast.classify.cells import load_cells, split_cells
from sparsecontrast.classify.fit import fit
from sparsecontrast.classify.listing import find_pictures
from sparsecontrast.classify.run import build
from sparsecontrast.classify.settings import compose_classify
from sparsecontrast.cli import main
from sparsecontrast.errors import IndexSchemaError, MethodError
from tests.cell_files import WORDS, write_cells


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_cells(tmp_path_factory.mktemp("cells") / "drawn")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty; its first line"),
        (b'\xff\xfe\x00garbage\x00,"\n', "not a table in UTF-8"),
        (
            b"path,label,site,group_id\na,b,c,d\n1,2,3,4,5\n",
            "row 2 below the header has 5 fields, the header 4",
        ),
        (b"path,label,site,group_id\na,b,c,d,e\n", "row 1 below the header has 5 fields"),
        (b"path,label,site,group_id\na,b,c,\na,b\n", "row 2 below the header has 2 fields"),
        (b'path,label,site,group_id\na,b,c,d\n"open,1,2,3\n', "not a table in UTF-8"),
        (b"path;label;site;group_id\na;b;c;d\n", r"no column for cells\.path=path"),
    ],
)
def test_a_table_that_is_none_is_refused_in_words(tmp_path, capsys, content, says):
    (tmp_path / "index.csv").write_bytes(content)
    with pytest.raises(IndexSchemaError, match=says):
        find_pictures(compose_classify([f"cells.root={tmp_path}"]).cells)
    out = tmp_path / "run"
    assert main(["classify", "train", f"cells.root={tmp_path}", f"output_dir={out}"]) == 2
    told = capsys.readouterr().err
    assert "index.csv" in told and "Traceback" not in told and not out.exists()


def test_training_that_runs_away_says_so_and_leaves_no_run(folder, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["classify", "train", *WORDS, f"cells.root={folder}", f"output_dir={out}"]
    assert main([*words, "train.lr=1e30"]) == 2
    assert "lower train.lr" in capsys.readouterr().err and not out.exists()
    assert main(words) == 0  # the folder is free for a better try
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_what_lay_in_the_folder_stays_when_training_fails(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    words = ["classify", "train", *WORDS, f"cells.root={folder}", f"output_dir={tmp_path}"]
    assert main([*words, "train.lr=1e30"]) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_held_out_loss_that_is_no_number_ends_training(folder, monkeypatch):
    config = compose_classify([*WORDS, f"cells.root={folder}"])
    cells = load_cells(config.cells, 32)
    split = split_cells(cells, config.cells, 0)
    monkeypatch.setattr(fitting, "held_out", lambda *_: {"held_out_loss": math.inf, "held_out_accuracy": 0.0})
    with pytest.raises(MethodError, match=r"held-out loss is inf in epoch 1; lower train\.lr"):
        fit(build(config, cells, split.train), cells, split, config.train, 0)
