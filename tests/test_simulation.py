"""Whole federations on tiny images: what is written, who is left out and by what name, what ends a run."""

import os
from contextlib import nullcontext

import pytest
import torch
import yaml

from simulation import partition
from simulation import run as simulation
from simulation.grid import LocalGrid
from sparsecontrast import checkpoint, overrides
from sparsecontrast.config import compose
from sparsecontrast.errors import ConfigError, FederationError, PatientLeakError, QuorumError, StorageError
from tests import apps
from tests.federations import DirectGrid, partitions, rows, serve, words, write_images


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr("server.conversation.SETTLE_SECONDS", 0.0)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), {"a": 8, "b": 5, "c": 6})


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


# ---- who is left out


def test_small_and_unreadable_sites_are_named_and_the_run_goes_on(tmp_path):
    sites = {"empty": 4, "fine": 6, "good": 5, "tiny": 1}
    index = write_images(tmp_path / "images", sites, broken=("empty",))
    told = words(index, tmp_path / "out", "federation.sites=4", "federation.rounds=1")
    serve(partitions(4), told)
    found = rows(tmp_path / "out")
    assert found[-1]["contributors"] == ["fine", "good"]
    assert found[-1]["refused"] == {"empty": "site_empty", "tiny": "site_too_small"}
    assert {r["site"]: r["status"] for r in found[:-1]} == {
        "empty": "refused",
        "fine": "ok",
        "good": "ok",
        "tiny": "refused",
    }
    log = (tmp_path / "out" / "sites" / "tiny" / "client.log").read_text()
    assert "TooFewImagesError" in log
    assert "data.min_images=2" in log


def test_a_run_below_its_quorum_fails_and_says_why(images, tmp_path):
    told = words(images, tmp_path / "out", "data.min_images=7")
    with pytest.raises(QuorumError, match=r"round 1: 1 valid .*'b': 'site_too_small', 'c': 'site_too_small'"):
        serve(partitions(3), told)
    assert checkpoint.latest(tmp_path / "out") == 0


def test_a_silent_site_is_named(images, tmp_path):
    told = words(images, tmp_path / "out", "federation.round_timeout=1", "federation.rounds=1")
    serve(partitions(3), told, mute=(1,))
    found = rows(tmp_path / "out")
    assert found[-1]["silent"] == ["b"]
    assert found[-1]["contributors"] == ["a", "c"]
    assert [r["status"] for r in found[:-1]] == ["ok", "silent", "ok"]


def test_liars_are_named_and_do_not_touch_the_weights(tmp_path, monkeypatch):
    import pandas as pd

    lies = ["", "", "nan", "short", "torn", "weight", "raise", "names"]
    monkeypatch.setenv("SPARSECONTRAST_TEST_LIES", ",".join(lies))
    n = len(lies)
    index = write_images(tmp_path / "images", {f"s{i}": 4 for i in range(n)})
    told = words(index, tmp_path / "out", f"federation.sites={n}", "federation.rounds=1")
    serve(partitions(n), told, apps.liars)
    found = rows(tmp_path / "out")
    assert found[-1]["contributors"] == ["s0", "s1", "s7"]
    assert [r["site"] for r in found[:-1]] == [f"s{i}" for i in range(n)]  # whatever s7 says of itself
    assert (found[7]["round"], found[7]["status"]) == (1, "ok")
    assert found[-1]["refused"] == {
        "s2": "payload_nonfinite",
        "s3": "payload_size",
        "s4": "payload_size",
        "s5": "payload_weight",
        "s6": "flower_1",
    }
    assert "DOE" not in (tmp_path / "out" / "metrics.jsonl").read_text()
    # the honest sites alone give the same weights
    honest = index.with_name("honest.csv")
    frame = pd.read_csv(index)
    frame[frame["site"].isin(found[-1]["contributors"])].to_csv(honest, index=False)
    serve(partitions(3), words(honest, tmp_path / "alone", "federation.rounds=1"))
    one, two = (checkpoint.round_file(tmp_path / name, 1).read_bytes() for name in ("out", "alone"))
    assert one == two


def test_a_worker_that_dies_in_training_costs_its_site_the_round(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSECONTRAST_TEST_LIES", ",die,")
    index = write_images(tmp_path / "images", {"a": 4, "b": 4, "c": 4})
    told = words(index, tmp_path / "out")
    with LocalGrid(partitions(3), 2, "tests.apps:liars") as grid:
        simulation._serve(grid, nullcontext, told)
    found = [r for r in rows(tmp_path / "out") if r["site"] is None]
    assert [r["contributors"] for r in found] == [["a", "c"]] * 2
    assert [r["refused"] for r in found] == [{"b": "flower_1"}] * 2


def site_file(folder, name, index, *more):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "site.yaml"
    told = {"name": name, "state_dir": str(folder / "state"), "overrides": [f"data.index={index}", *more]}
    path.write_text(yaml.safe_dump({**told, "overrides": [*told["overrides"], "data.min_images=2"]}))
    return {"site-config": str(path)}


def test_real_sites_own_their_data_and_a_foreign_backbone_is_excluded_by_name(tmp_path):
    """Two fit, one has another backbone; what the server says about data is not heard."""
    nodes = [
        site_file(tmp_path / name, name, write_images(tmp_path / name / "images", {"x": 4, "y": 3}), *more)
        for name, more in {"north": [], "south": [], "odd": ["backbone.depth=2"]}.items()
    ]
    told = words(tmp_path / "not-there.csv", tmp_path / "out", "federation.rounds=1", "data.root=/etc")
    serve(nodes, told)
    found = rows(tmp_path / "out")
    assert found[-1]["contributors"] == ["north", "south"]
    assert [r["num_examples"] for r in found[:-1]] == [7, 7]
    assert list((tmp_path / "north" / "state" / "state").glob("*/round_0001.safetensors"))
    assert not (tmp_path / "out" / "sites").exists()


def test_nobody_with_the_servers_backbone_is_a_clear_error(tmp_path):
    index = write_images(tmp_path / "images", {"x": 4})
    nodes = [site_file(tmp_path / n, n, index, "backbone.depth=2") for n in ("a", "b", "c")]
    with pytest.raises(FederationError, match="3 x backbone_mismatch"):
        serve(nodes, words(index, tmp_path / "out"))


def test_a_late_site_is_waited_for_beside_a_useless_node(tmp_path, monkeypatch):
    """Three nodes have answered, one cannot be used: the third hospital connects a moment later."""
    monkeypatch.setattr("server.conversation.SETTLE_SECONDS", 30.0)
    index = write_images(tmp_path / "images", {"x": 4})
    names = {"a": [], "b": [], "odd": ["backbone.depth=2"], "late": []}
    nodes = [site_file(tmp_path / name, name, index, *more) for name, more in names.items()]
    calls = iter(range(100))

    class Growing(DirectGrid):
        def get_node_ids(self):
            return list(self.nodes)[: 3 if next(calls) < 2 else 4]

    serve(nodes, words(index, tmp_path / "out", "federation.rounds=1"), kind=Growing)
    assert rows(tmp_path / "out")[-1]["contributors"] == ["a", "b", "late"]


def test_simulated_sites_keep_apart_in_one_state_folder(images, tmp_path):
    serve(partitions(3), words(images, tmp_path / "out", f"site.state_dir={tmp_path / 'states'}"))
    assert sorted(p.name for p in (tmp_path / "states").iterdir()) == ["a", "b", "c"]


def test_two_nodes_of_one_name_are_both_left_out(tmp_path):
    index = write_images(tmp_path / "images", {"x": 4})
    nodes = [site_file(tmp_path / str(i), name, index) for i, name in enumerate(["one", "one", "two"])]
    told = words(index, tmp_path / "out", "federation.connect_timeout=2")
    with pytest.raises(FederationError, match="1 usable .*duplicate_name"):
        serve(nodes, told)


def test_fewer_sites_in_the_data_than_wanted_names_both(images, tmp_path):
    told = words(images, tmp_path / "out", "federation.sites=5")
    with pytest.raises(FederationError, match="2 x config") as caught:
        serve(partitions(5), [*told, "federation.min_sites=4"])
    assert "3 usable site" in str(caught.value)
    log = "".join(p.read_text() for p in (tmp_path / "out" / "sites").glob("*/client.log"))
    assert "the data hold 3 site(s): a, b, c" in log
    assert "federation.sites=5" in log


def test_the_command_refuses_it_before_anyone_starts(images, tmp_path):
    told = words(images, tmp_path / "out", "federation.sites=5")
    with pytest.raises(ConfigError, match=r"federation.sites=5, but the data hold 3 site\(s\): a, b, c"):
        simulation.run(told, evaluation=False)


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


def test_a_cut_that_is_missing_is_asked_for(images, tmp_path):
    told = [*words(images, tmp_path / "out"), "federation.partition=dirichlet"]
    told = overrides.without(told, ["data.index"])
    with pytest.raises(ConfigError, match=r"simulation.partition .* data.index=FILE"):
        serve(partitions(3), told)


def test_an_index_that_is_not_cut_as_told_is_refused_by_the_sites(images, tmp_path):
    told = words(images, tmp_path / "out", "federation.partition=iid", "federation.connect_timeout=1")
    with pytest.raises(FederationError, match="3 x config"):
        serve(partitions(3), told)
    assert "not cut so" in next((tmp_path / "out" / "sites").glob("*/client.log")).read_text()
    other = tmp_path / "quantity.csv"
    assert partition.main([*told, "federation.partition=quantity", "--out", str(other)]) == 0
    with pytest.raises(ConfigError, match="was cut by quantity"):
        simulation.run([*told, f"data.index={other}"], evaluation=False)


def test_a_full_disk_ends_the_run_with_a_storage_error(images, tmp_path, monkeypatch):
    real = os.replace

    def full(source, target):
        if str(target).endswith("rounds/round_0001.safetensors"):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="No space left"):
        serve(partitions(3), words(images, tmp_path / "out"))
    assert checkpoint.latest(tmp_path / "out") == 0
    assert rows(tmp_path / "out") == []


def test_a_full_disk_at_one_site_costs_that_site_the_round(images, tmp_path, monkeypatch):
    real = os.replace

    def full(source, target):
        if "sites/b/state" in str(target):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    serve(partitions(3), words(images, tmp_path / "out", "federation.rounds=1"))
    assert rows(tmp_path / "out")[-1]["refused"] == {"b": "storage"}
    assert "No space left" in (tmp_path / "out" / "sites" / "b" / "client.log").read_text()


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
