import json
import os
import platform
import sys
from datetime import datetime

import numpy as np
import pytest
import torch

from benchmarks import record

ROWS = [{"size_px": 128, "ratio": 0.0123456, "what": "fp32"}, {"size_px": 224, "rate": 12345.6}]


def test_what_is_written_is_what_was_measured_and_where(tmp_path):
    file = tmp_path / "results" / "toy-cpu.json"
    record.write_result("toy", "python -m benchmarks.toy", ROWS, file)
    found = json.loads(file.read_text())
    assert set(found) == {"name", "command", "machine", "versions", "date", "rows"}
    assert found["command"] == "python -m benchmarks.toy" and found["rows"] == ROWS
    assert found["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert found["machine"]["cpu"] and found["machine"]["memory_gib"] > 0 and found["machine"]["os"]
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert abs((datetime.now().astimezone() - datetime.fromisoformat(found["date"])).total_seconds()) < 60
    assert [p.name for p in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32(1), torch.tensor(1.0)])
def test_a_figure_that_is_none_is_refused_and_the_old_file_stays(tmp_path, value):
    file = tmp_path / "toy.json"
    record.write_result("toy", "x", ROWS, file)
    before = file.read_bytes()
    with pytest.raises(ValueError):
        record.write_result("toy", "x", [{"ratio": value}], file)
    with pytest.raises(ValueError, match="no row"):
        record.write_result("toy", "x", [], file)
    assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_gpu_is_named_when_one_is_usable(monkeypatch):
    assert ("gpu" in record.machine()) == torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Toy 9000")
    assert record.machine()["gpu"] == "Toy 9000"


def test_table_shows_every_column_and_blanks_what_a_row_lacks(capsys):
    record.print_table("Toy", ROWS)
    out = capsys.readouterr().out
    for text in ("Toy", "size_px", "ratio", "what", "rate", "128", "0.0123", "fp32", "12346"):
        assert text in out
    assert "0.01234" not in out and "None" not in out


def test_without_rich_the_table_is_plain_text(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    record.print_table("Toy", ROWS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["Toy", "size_px\tratio\twhat\trate"] and lines[3] == "224\t\t\t12346"
