"""Whole federations on tiny images: who is left out and by what name, what ends a run."""

import os
from contextlib import nullcontext

import pytest
import yaml

from simulation import partition
from simulation import run as simulation
from simulation.grid import LocalGrid
from sparsecontrast import checkpoint, overrides
from sparsecontrast.errors import ConfigError, FederationError, QuorumError, StorageError
from tests import apps
from tests.federations import DirectGrid, partitions, rows, serve, words, write_images


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr("server.roll.SETTLE_SECONDS", 0.0)


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
    monkeypatch.setattr("server.roll.SETTLE_SECONDS", 30.0)
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
    folders = [p.name for p in (tmp_path / "states").iterdir() if p.is_dir()]
    assert sorted(folders) == ["a", "b", "c"]


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
