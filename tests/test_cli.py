"""The command line: every user's error is one line and status 2, and help is light."""

import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from sparsecontrast import checkpoint, cli
from sparsecontrast.config import compose
from sparsecontrast.errors import ConfigError, EvaluationError
from sparsecontrast.overrides import merge
from sparsecontrast.pretrain import pretrain
from sparsecontrast.progress import progress
from sparsecontrast.runs import read_config, read_metrics
from sparsecontrast.tensorboard import write_tensorboard
from tests.tiny import WORDS, make_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("cli") / "run")


def test_help_imports_nothing_heavy():
    code = """
import contextlib, io, sys
from sparsecontrast import cli
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    cli.main(["--help"])
print([m for m in ("torch", "pandas", "sklearn", "hydra", "matplotlib", "numpy") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("words", "said"), [
    (["evaluate", "nowhere"], "error [data_missing]"),
    (["report", "nowhere"], "error [data_missing]"),
    (["pretrain", "data=atlantis"], "error [config]"),
    (["pretrain", "federation.ruonds=3"], "error [config]"),
    (["index", "data=csv", "data.root=nowhere", "--out", "made"], "error [data_missing]"),
    (["phantom", "--out", "sheet.odd", "--sites", "1", "--patients", "1", "--size", "32"], "error [storage]"),
])  # fmt: skip
def test_an_error_is_one_line_and_status_2(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(said) and error.count("\n") == 1 and "Traceback" not in error


@pytest.mark.parametrize(("words", "said"), [
    (["--sites", "0"], "--sites=0: must be in [1, "),
    (["--sites", "9999999"], "9999999 films of 32 x 32 pixels"),
    (["--patients", "0"], "--patients=0"),
    (["--patients", "-1"], "--patients=-1"),
    (["--size", "0"], "--size=0"),
    (["--size", "99999"], "--size=99999"),
    (["--seed", "-1"], "--seed=-1: must be in [0, "),
    (["--seed", "9" * 23], "--seed="),
    (["--sites", "100", "--patients", "100", "--size", "1024"], "10000 films of 1024 x 1024 pixels"),
])  # fmt: skip
def test_an_impossible_sheet_is_refused_before_anything_is_drawn(words, said, capsys, tmp_path):
    small = ["--sites", "1", "--patients", "1", "--size", "32"]
    assert cli.main(["phantom", "--out", str(tmp_path / "a.png"), *small, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error [config]: ") and said in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_unknown_options_are_refused(capsys):
    for words in (["phantom", "--out", "x.png", "a=b"], ["report", "run", "--what"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(words)
        assert stopped.value.code == 2 and "unrecognized" in capsys.readouterr().err


def test_evaluate_then_report(trained, capsys):
    words = ["evaluation.baselines=[pixels]", "--against", str(trained), "evaluation.bootstrap=5"]
    assert cli.main(["evaluate", str(trained), *words]) == 0
    printed = capsys.readouterr().out
    assert (
        "two findings: AUROC" in printed
        and "trained at one place (this run)" in printed
        and "raw 16" in printed
    )
    assert cli.main(["report", str(trained), "evaluation.overlays=0"]) == 0
    page = (trained / "report.html").read_text()
    assert "Pretraining at one place" in page and "sparsecontrast pretrain data.phantom.sites=3" in page
    assert "Left out by evaluation.overlays=0" in page


def test_an_untrained_run_ends_as_one_line(tmp_path, capsys):
    run = make_run(tmp_path / "run", "federation.rounds=1")
    for path in (run / "rounds").glob("round_0001*"):
        path.unlink()
    assert cli.main(["evaluate", str(run)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error [untrained]")


def test_index_writes_the_tables_and_counts(tmp_path, capsys):
    assert cli.main(["index", *WORDS, f"output_dir={tmp_path}/run", "--out", str(tmp_path / "made")]) == 0
    frame = pd.read_csv(tmp_path / "made" / "index.csv")
    printed = capsys.readouterr().out
    assert f"{len(frame)} images, 0 files left out" in printed and "hospital_02" in printed
    assert list(pd.read_csv(tmp_path / "made" / "quarantine.csv").columns) == ["path", "reason", "stage"]


def test_index_of_a_real_dicom_folder_tells_what_it_left_out(tmp_path, capsys, shared_data):
    words = ["index", "data=dicom", f"data.root={shared_data / 'dicom'}", f"site.state_dir={tmp_path}/state"]
    assert cli.main([*words, "--out", str(tmp_path / "made")]) == 0
    printed = capsys.readouterr().out
    assert "26 files; 5 unreadable; 16 not chest; 0 not frontal; 5 kept" in printed
    assert len(pd.read_csv(tmp_path / "made" / "quarantine.csv")) == 5


def test_phantom_draws_a_sheet(tmp_path, capsys):
    words = ["phantom", "--sites", "2", "--patients", "3", "--size", "64", "--out"]
    sheets = []
    for name in ("a.png", "b.png"):
        assert cli.main([*words, str(tmp_path / name)]) == 0
        sheets.append(np.asarray(Image.open(tmp_path / name)))
    assert sheets[0].shape == (128, 192) and (sheets[0] == sheets[1]).all() and sheets[0].std() > 10


def tensors(folder, number):
    return checkpoint.read_round(folder, number).tensors


def test_pretraining_learns_in_every_round_and_chains_its_rounds(trained):
    rows = read_metrics(trained)
    assert [(r["round"], r["site"]) for r in rows] == [
        (1, "all_sites"),
        (1, None),
        (2, "all_sites"),
        (2, None),
    ]
    metas = [checkpoint.read_meta(trained, n) for n in range(3)]
    assert [m["parent"] for m in metas[1:]] == [checkpoint.weights_sha256(m) for m in metas[:2]]
    first, last = tensors(trained, 1), tensors(trained, 2)
    assert any(not (first[n] == last[n]).all() for n in first)
    assert all(n.startswith(("backbone.", "saliency.")) for n in last)
    assert read_config(trained).federation.rounds == 2


@pytest.mark.parametrize("function", ["write_round", "write_tensors"])
def test_a_killed_pretraining_continues_bit_for_bit(function, trained, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    module = checkpoint if function == "write_round" else __import__("sparsecontrast.local_state").local_state
    whole, calls = getattr(module, function), []

    def killed(*args, **kwargs):
        calls.append(args)
        if len(calls) == (3 if function == "write_round" else 2):  # in round 2
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(module, function, killed)
    with pytest.raises(KeyboardInterrupt):
        make_run(folder)
    monkeypatch.undo()
    assert checkpoint.latest(folder) == 1
    pretrain(compose([f"resume={folder}"]), show=False)
    assert all((tensors(folder, 2)[n] == t).all() for n, t in tensors(trained, 2).items())
    losses = [[r["loss"] for r in read_metrics(f)] for f in (folder, trained)]
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def one_round(tmp_path_factory):
    """A run of one round; tests copy it."""
    return make_run(tmp_path_factory.mktemp("one") / "run", "federation.rounds=1")


@pytest.mark.parametrize(("word", "said"), [
    ("seed=5", "seed was 0, is 5"),
    ("train.lr=0.5", "train.lr was 0.001, is 0.5"),
    ("site.name=hospital_01", "site.name was None, is 'hospital_01'"),
])  # fmt: skip
def test_pretraining_continued_as_another_run_is_refused(one_round, word, said, capsys):
    before = sorted((p, p.stat().st_mtime_ns) for p in one_round.rglob("*"))
    assert cli.main(["pretrain", f"resume={one_round}", word]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error [config]") and said in error and error.count("\n") == 1
    assert sorted((p, p.stat().st_mtime_ns) for p in one_round.rglob("*")) == before


def test_pretraining_of_nothing_is_not_continued(tmp_path, capsys):
    assert cli.main(["pretrain", f"resume={tmp_path / 'nothere'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error [config]") and "no run there" in error and error.count("\n") == 1


def test_pretraining_continues_for_more_rounds_where_its_folder_lies(one_round, tmp_path):
    folder = shutil.copytree(one_round, tmp_path / "moved")
    assert cli.main(["pretrain", f"resume={folder}", "federation.rounds=3"]) == 0
    whole = [r["round"] for r in read_metrics(folder) if r["site"] is None]
    assert whole == [1, 2, 3] and checkpoint.latest(one_round) == 1
    # the folder remembers: what reads it knows of three rounds, and the next resume does too
    config = read_config(folder)
    assert (config.federation.rounds, config.resume) == (3, None)
    assert pretrain(compose([f"resume={folder}"]), show=False) == folder
    assert checkpoint.latest(folder) == 3


def test_pretraining_continues_without_the_file_it_started_from(tmp_path):
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", depth=1).state_dict(), weights)
    folder = make_run(tmp_path / "run", f"backbone.pretrained={weights}", "federation.rounds=2")
    whole = tensors(folder, 2)
    for path in [*folder.glob("rounds/round_000[12]*"), *folder.rglob("state/round_0002*"), weights]:
        path.unlink()
    pretrain(compose([f"resume={folder}"]), show=False)
    assert all((tensors(folder, 2)[n] == t).all() for n, t in whole.items())


def test_one_site_trains_on_its_own_images(tmp_path):
    folder = make_run(tmp_path / "run", "site.name=hospital_01", "federation.rounds=1")
    row = read_metrics(folder)[0]
    assert row["site"] == "hospital_01" and row["num_examples"] < 30


def test_a_used_folder_is_not_overwritten(trained):
    before = (trained / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="already holds rounds"):
        make_run(trained)
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_tensorboard_holds_every_scalar(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # the second writes anew, not on top
        folder = write_tensorboard(trained)
    assert len(list(folder.glob("events.*"))) == 1
    events = EventAccumulator(str(folder))
    events.Reload()
    rows = [r for r in read_metrics(trained) if r["site"] is None]
    scalars = [(e.step, e.value) for e in events.Scalars("loss/all")]
    assert scalars == [(r["round"], pytest.approx(r["loss"])) for r in rows]
    assert "keep/all_sites" in events.Tags()["scalars"]


def test_tensorboard_that_is_not_installed_is_a_clear_error(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(ConfigError, match="not installed"):
        write_tensorboard(trained)


def test_a_torn_last_line_of_metrics_is_left_out_and_a_torn_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round": 1, "site": null}\n{"round": 1, "site": null, "loss": 2}\n{"round": 2, "si')
    assert read_metrics(tmp_path) == [{"round": 1, "site": None, "loss": 2}]
    path.write_text('{"round": 1, "si\n{"round": 2, "site": null}\n')
    with pytest.raises(EvaluationError, match="line 1"):
        read_metrics(tmp_path)


def test_later_overrides_win(trained):
    assert read_config(trained, ["evaluation.bootstrap=7"]).evaluation.bootstrap == 7
    assert merge(["a=1", "b=2"], ["a=3"]) == ["b=2", "a=3"]


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys):
    with progress("Work", 3) as tick:
        for i in range(3):
            tick(f"piece {i}")
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["Work: 1/3 piece 0", "Work: 3/3 piece 2"] and captured.out == ""
    with progress("Work", 3, show=False) as tick:
        tick("unheard")
    assert capsys.readouterr().err == ""
