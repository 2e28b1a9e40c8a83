"""Whole federations on tiny images: what is written, how sites are cut, who takes part."""

import pytest
import torch
import yaml

from simulation import run as simulation
from sparsecontrast import checkpoint
from sparsecontrast.config import compose
from sparsecontrast.errors import ConfigError, PatientLeakError, StorageError
from tests.federations import partitions, rows, serve, words


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr("server.roll.SETTLE_SECONDS", 0.0)


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """One undisturbed run of two rounds."""
    return simulation.run(words(images, tmp_path_factory.mktemp("run") / "out"), evaluation=False)


# ---- what a run leaves behind


def test_rounds_form_a_chain_and_hold_only_shared_weights(finished):
    parent, before = None, None
    for number in range(3):
        read = checkpoint.read_round(finished, number)
        assert read.meta["parent"] == parent
        assert all(name.startswith(("backbone.", "saliency.")) for name in read.tensors)
        assert all(t.dtype == torch.float32 for t in read.tensors.values())
        if before:
            assert any(not torch.equal(before[n], t) for n, t in read.tensors.items())
        parent, before = checkpoint.weights_sha256(read.meta), read.tensors
    assert checkpoint.latest(finished) == 2
    meta = checkpoint.read_meta(finished, 2)
    assert meta["contributors"] == ["a", "b", "c"]
    assert meta["seed"] == 0
    assert meta["config"]["federation"]["rounds"] == 2


def test_round_zero_is_the_seeded_model(finished):
    from sparsecontrast.methods import build_method

    state = build_method(
        compose(yaml.safe_load((finished / "config.yaml").read_text())["overrides"])
    ).state_dict()
    assert all(torch.equal(state[n], t) for n, t in checkpoint.read_round(finished, 0).tensors.items())


def test_metrics_have_a_row_for_each_round_and_site_and_one_for_the_round(finished):
    found = rows(finished)
    keys = [(r["round"], r["site"]) for r in found]
    assert keys == [(n, site) for n in (1, 2) for site in ("a", "b", "c", None)]
    assert [r["num_examples"] for r in found if r["site"]] == [8, 5, 6] * 2  # the train split alone
    assert [r["state_round"] for r in found if r["site"]] == [0] * 3 + [1] * 3
    for row in found:
        assert row["loss"] > 0
        assert row["bytes_up"] > 0
        assert row["seconds"] > 0
    last = found[-1]
    assert last["contributors"] == ["a", "b", "c"]
    assert (last["refused"], last["silent"]) == ({}, [])
    assert last["bytes_up"] == sum(r["bytes_up"] for r in found[-4:-1])
    weights = [r["weight"] for r in found[-4:-1]]
    assert last["loss"] == pytest.approx(
        sum(w * r["loss"] for w, r in zip(weights, found[-4:-1], strict=True))
    )


def test_a_folder_with_rounds_is_not_overwritten(finished, images):
    with pytest.raises(ConfigError, match="resume="):
        simulation.run(words(images, finished), evaluation=False)


def test_the_command_line_says_one_line_and_ends_with_two(finished, images, capfd):
    assert simulation.main([*words(images, finished), "--no-evaluation"]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error [config]: ")
    assert err.count("\n") == 1


def test_fresh_deletes_a_run_and_nothing_else(finished, images, tmp_path):
    stranger = tmp_path / "thesis"
    stranger.mkdir()
    (stranger / "chapter.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not a run folder"):
        simulation.clear(compose(words(images, stranger)))
    for name in ("cache", "sites"):
        (stranger / name).mkdir()
    (stranger / "config.yaml").write_text("fonts: serif")
    with pytest.raises(ConfigError, match="not a run folder"):
        simulation.clear(compose(words(images, stranger)))
    assert len(list(stranger.iterdir())) == 4
    with pytest.raises(ConfigError, match="not a run folder"):
        simulation.clear(compose(words(images, stranger / "chapter.txt")))
    with pytest.raises(ConfigError, match="strategy=nope"):
        simulation.run(words(images, finished, "federation.strategy=nope"), fresh=True)
    assert checkpoint.latest(finished) == 2
    run = tmp_path / "run"
    (run / "rounds").mkdir(parents=True)
    (run / "cache").mkdir()
    (run / "notes.txt").write_text("x")
    (run / "config.yaml").write_bytes((finished / "config.yaml").read_bytes())
    simulation.clear(compose(words(images, run)))
    assert sorted(p.name for p in run.iterdir()) == ["cache", "notes.txt"]


def test_half_precision_halves_the_bytes_and_the_server_keeps_fp32(finished, images, tmp_path):
    serve(partitions(3), words(images, tmp_path / "out", "federation.payload_dtype=fp16"))
    full, half = rows(finished)[-1], rows(tmp_path / "out")[-1]
    for key in ("bytes_up", "bytes_down"):
        assert 0.5 <= half[key] / full[key] < 0.52
    one, two = (checkpoint.read_round(f, 2).tensors for f in (finished, tmp_path / "out"))
    assert all(t.dtype == torch.float32 for t in two.values())
    gaps = [(one[n] - two[n]).abs().max() for n in one]
    assert 0 < max(gaps) < 0.02


def test_eight_bit_updates_quarter_the_bytes_up_and_resume_bit_for_bit(finished, images, tmp_path):
    """Round 1 run again, as after a crash, feeds back nothing; round 2 what round 1 left over."""
    told = ("federation.upload=delta_int8",)
    serve(partitions(3), words(images, tmp_path / "out", *told))
    full, small = rows(finished)[-1], rows(tmp_path / "out")[-1]
    assert 0.25 <= small["bytes_up"] / full["bytes_up"] < 0.26
    one, two = (checkpoint.read_round(f, 2).tensors for f in (finished, tmp_path / "out"))
    gaps = [(one[n] - two[n]).abs().max() for n in one]
    assert 0 < max(gaps) < 0.01
    last = checkpoint.round_file(tmp_path / "out", 2)
    before, folder = last.read_bytes(), tmp_path / "out"
    for path in (last, last.with_suffix(".json")):
        path.unlink()
    serve(partitions(3), [f"resume={folder}"])
    assert last.read_bytes() == before
    for path in folder.glob("sites/*/state/*/residual_0001.safetensors"):
        path.unlink()
    for path in (last, last.with_suffix(".json")):
        path.unlink()
    serve(partitions(3), [f"resume={folder}"])
    assert last.read_bytes() != before


def test_the_proximal_weight_reaches_the_sites(finished, images, tmp_path):
    """FedProx aggregates like FedAvg: only its term at the sites makes another result."""
    told = ("federation.strategy=fedprox", "federation.proximal_mu=0.5")
    serve(partitions(3), words(images, tmp_path / "out", *told))
    serve(partitions(3), words(images, tmp_path / "zero", told[0], "federation.proximal_mu=0.0"))
    files = [
        checkpoint.round_file(f, 1).read_bytes() for f in (finished, tmp_path / "out", tmp_path / "zero")
    ]
    assert files[0] == files[2] != files[1]


def test_tensorboard_is_written_round_by_round(images, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    serve(partitions(3), words(images, tmp_path / "out", "tensorboard=true"))
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss/all")] == [1, 2]
    assert [e.step for e in events.Scalars("loss/b")] == [1, 2]


def test_a_cut_by_labels_reaches_the_sites_through_partition_csv(images, tmp_path):
    import pandas as pd

    from sparsecontrast.overrides import without

    told = without(words(images, tmp_path / "out", "federation.partition=dirichlet"), ["data.index"])
    told += ["data.phantom.sites=2", "data.phantom.patients_per_site=30", "data.min_images=1"]
    folder = simulation.run([*told, "federation.rounds=1"], evaluation=False)
    table = pd.read_csv(folder / "partition.csv")
    trained = table[table["split"] == "train"].groupby("site").size().to_dict()
    assert sorted(trained) == ["site_00", "site_01", "site_02"]
    found = rows(folder)
    assert {r["site"]: r["num_examples"] for r in found if r["site"]} == trained
    # and a continued run finds its cut again
    serve(partitions(3), [f"resume={folder}", "federation.rounds=2"])
    assert {r["site"]: r["num_examples"] for r in rows(folder) if r["round"] == 2 and r["site"]} == trained


def test_what_a_failed_attempt_cut_is_not_the_next_runs_data(images, tmp_path):
    import pandas as pd

    told = words(images, tmp_path / "out", "federation.partition=iid", "federation.rounds=1")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        simulation.run([*told, f"data.cache_dir={tmp_path / 'file' / 'cache'}"], evaluation=False)
    stale = pd.read_csv(tmp_path / "out" / "partition.csv")
    stale[stale["site"] == "site_00"].to_csv(tmp_path / "out" / "partition.csv", index=False)
    folder = simulation.run([*told, "data.min_images=1"], evaluation=False)
    cut = pd.read_csv(folder / "partition.csv")
    assert len(cut) == len(pd.read_csv(images)) == 25
    assert sorted(cut["site"].unique()) == ["site_00", "site_01", "site_02"]
    assert [r["site"] for r in rows(folder)] == ["site_00", "site_01", "site_02", None]


def test_an_index_with_a_torn_patient_is_refused(images, tmp_path):
    import pandas as pd

    frame = pd.read_csv(images)
    frame.loc[frame["site"] == "b", "patient_id"] = frame.loc[0, "patient_id"]
    frame["split"] = "train"
    frame.to_csv(tmp_path / "torn.csv", index=False)
    with pytest.raises(PatientLeakError, match="1 patients lie at two sites"):
        simulation.run(words(tmp_path / "torn.csv", tmp_path / "out"), evaluation=False)


@pytest.mark.parametrize("strategy", ["krum", "multikrum", "bulyan"])
def test_robust_strategies_run_by_their_name_alone(images, tmp_path, strategy):
    serve(partitions(3), words(images, tmp_path, f"federation.strategy={strategy}", "federation.rounds=1"))
    assert rows(tmp_path)[-1]["contributors"] == ["a", "b", "c"]


def test_few_nodes_serve_all_sites_with_the_same_result(finished, images, tmp_path):
    """`flwr run` without a federation config has two SuperNodes: three hospitals still train."""
    serve(partitions(2), words(images, tmp_path / "out"))
    assert rows(tmp_path / "out")[-1]["contributors"] == ["a", "b", "c"]
    one, two = (checkpoint.round_file(f, 2).read_bytes() for f in (finished, tmp_path / "out"))
    assert one == two


def test_more_nodes_than_sites_idle(finished, images, tmp_path):
    serve(partitions(5), words(images, tmp_path / "out"))
    assert rows(tmp_path / "out")[-1]["contributors"] == ["a", "b", "c"]
    one, two = (checkpoint.round_file(f, 2).read_bytes() for f in (finished, tmp_path / "out"))
    assert one == two


# ---- who takes part


def test_participants_depend_on_seed_round_and_names_alone():
    from server.rounds import participants

    names = [f"s{i:02d}" for i in range(10)]
    config = compose(["federation.fraction=0.3", "federation.min_sites=2"]).federation
    drawn = [participants(names, config, 7, n) for n in range(1, 40)]
    assert all(len(d) == 3 and d == sorted(d) for d in drawn)
    assert drawn == [participants(names[::-1], config, 7, n) for n in range(1, 40)]
    assert drawn != [participants(names, config, 8, n) for n in range(1, 40)]
    assert {name for d in drawn for name in d} == set(names)
    assert len(participants(names[:3], config, 7, 1)) == 2  # never fewer than the quorum
    assert participants(names, compose().federation, 7, 1) == names


def test_partial_participation_trains_a_part_each_round(images, tmp_path):
    told = words(images, tmp_path / "out", "federation.fraction=0.4", "federation.rounds=4")
    serve(partitions(3), told)
    found = rows(tmp_path / "out")
    parts = [r["contributors"] for r in found if r["site"] is None]
    assert all(len(part) == 2 for part in parts)
    assert len(set(map(tuple, parts))) > 1
    # a site that pauses continues from the round it last trained in
    last: dict[str, int] = {}
    for row in (r for r in found if r["site"]):
        assert row["state_round"] == last.get(row["site"], 0)
        last[row["site"]] = row["round"]
