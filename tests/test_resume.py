"""A killed run, continued, ends with the very bytes of a run that nobody disturbed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparsecontrast import checkpoint
from sparsecontrast.errors import CheckpointError, ConfigError
from sparsecontrast.overrides import assign
from sparsecontrast.resume import resolve
from sparsecontrast.runs import read_config
from tests.federations import MODEL, DirectGrid, partitions, rows, serve, words, write_images

ROOT = Path(__file__).parents[1]
# times, and the length of a message that holds the path of the run
OTHERWISE = ("seconds", "setup_seconds", "answer_seconds", "bytes_down")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), {"a": 8, "b": 5, "c": 6})


def same(one, two, number):
    """Whether a round's weights, strategy state and metrics are equal, but for times and paths."""
    for suffix in (".safetensors", ".strategy.safetensors"):
        a, b = (checkpoint.round_file(folder, number, suffix) for folder in (one, two))
        assert a.exists() == b.exists()
        assert not a.exists() or a.read_bytes() == b.read_bytes()
    plain = [[{k: v for k, v in r.items() if k not in OTHERWISE} for r in rows(f)] for f in (one, two)]
    assert plain[0] == plain[1]
    return True


class Stopped(BaseException):
    """The power goes off."""


def stop_before(round_number, told):
    """Serve until the messages of a round are about to leave."""

    class Doomed(DirectGrid):
        def push_messages(self, messages):
            if messages[0].metadata.group_id == str(round_number):
                raise Stopped
            return super().push_messages(messages)

    with pytest.raises(Stopped):
        serve(partitions(3), told, kind=Doomed)


def strategy_words(strategy):
    options = {"fedavgm": "{server_momentum: 0.9}", "fedyogi": "{eta: 0.01}"}.get(strategy, "null")
    return [f"federation.strategy={strategy}", f"federation.options={options}"]


def simulate(told, wait_for=None):
    """Run ``python -m simulation``; kill it, as ``kill -9`` does, when a file appears."""
    command = [sys.executable, "-m", "simulation", *told, "--no-evaluation"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    workers = []
    if wait_for is not None:
        deadline = time.monotonic() + 120
        while not wait_for.exists():
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=180)
    return process.returncode, output, [Path(f"/proc/{pid}") for pid in workers]


def test_kill_nine_and_resume_is_bit_identical(images, tmp_path):
    more = ("federation.rounds=3", *strategy_words("fedadam"))
    serve(partitions(3), words(images, tmp_path / "whole", *more))
    killed = tmp_path / "killed"
    code, _, workers = simulate(words(images, killed, *more), checkpoint.round_file(killed, 1, ".json"))
    assert code == -signal.SIGKILL
    assert checkpoint.latest(killed) in (1, 2)
    assert len(workers) >= 2
    # the overrides of the killed run are remembered: resume= is all that is needed
    code, output, _ = simulate([f"resume={killed}"])
    assert code == 0, output
    assert "continuing" in output
    assert "round   1/3" not in output
    assert same(tmp_path / "whole", killed, 3)
    assert not [w for w in workers if w.exists() and "simulation" in (w / "cmdline").read_text()]


@pytest.mark.parametrize("strategy", ["fedavgm", "fedyogi", "fedprox"])
def test_every_kind_of_strategy_state_survives(images, tmp_path, strategy):
    """And the teacher of each site, which selection=attention has."""
    taught = ("selection=attention", *strategy_words(strategy))
    more = ("federation.rounds=3", "federation.fraction=0.6", *taught)
    serve(partitions(3), words(images, tmp_path / "whole", *more))
    stop_before(3, words(images, tmp_path / "cut", *more))
    assert checkpoint.latest(tmp_path / "cut") == 2
    serve(partitions(3), [f"resume={tmp_path / 'cut'}"])
    assert same(tmp_path / "whole", tmp_path / "cut", 3)


@pytest.fixture(scope="module")
def cut(images, tmp_path_factory):
    """A run that stopped after two of three rounds; tests copy it."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    stop_before(3, words(images, folder, "federation.rounds=3"))
    return folder


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    serve(partitions(3), words(images, folder, "federation.rounds=3"))
    return folder


@pytest.fixture
def copy(cut, tmp_path):
    return Path(shutil.copytree(cut, tmp_path / "moved"))


def test_a_moved_folder_continues_where_it_lies(copy, whole, cut):
    before = sorted((p, p.stat().st_mtime_ns) for p in cut.rglob("*"))
    serve(partitions(3), [f"resume={copy}"])
    assert same(whole, copy, 3)
    assert sorted((p, p.stat().st_mtime_ns) for p in cut.rglob("*")) == before


@pytest.fixture(scope="module")
def cut_by_partition(tmp_path_factory):
    """A run of one round whose sites were cut into its own folder, with other paths into it."""
    from simulation import run as simulation

    folder = tmp_path_factory.mktemp("partition") / "m1"
    told = [*MODEL, "federation.sites=2", "federation.rounds=1", "federation.partition=iid",
            "data.phantom.sites=1", "data.phantom.patients_per_site=20", assign("output_dir", folder),
            assign("data.cache_dir", folder / "kept"), assign("site.state_dir", folder / "own")]  # fmt: skip
    return simulation.run(told, evaluation=False)


@pytest.fixture
def moved(cut_by_partition, tmp_path):
    """It lies elsewhere now, and where it was is nothing."""
    here = Path(shutil.copytree(cut_by_partition, tmp_path / "m10"))
    hidden = cut_by_partition.rename(cut_by_partition.with_name("hidden"))
    yield here
    hidden.rename(cut_by_partition)


def test_a_moved_run_that_was_cut_by_partition_continues(moved, cut_by_partition):
    serve(partitions(2), [f"resume={moved}", "federation.rounds=2"])
    assert checkpoint.latest(moved) == 2
    assert not cut_by_partition.exists()
    assert str(cut_by_partition) + "/" not in (moved / "config.yaml").read_text()


def test_paths_into_a_moved_run_folder_move_with_it(moved):
    config, told = resolve([f"resume={moved}"])
    assert config.data.index == str(moved / "partition.csv")
    assert config.data.cache_dir == str(moved / "kept") and config.site.state_dir == str(moved / "own")
    assert assign("data.index", moved / "partition.csv") in told
    read = read_config(moved)  # as evaluate and report read it
    assert (read.data, read.site) == (config.data, config.site)
    # another index, given now, is heard by one and refused by the other
    assert read_config(moved, ["data.index=/x/partition.csv"]).data.index == "/x/partition.csv"
    with pytest.raises(ConfigError, match=f"data.index was '{moved}/partition.csv', is '/x/partition.csv'"):
        resolve([f"resume={moved}", "data.index=/x/partition.csv"])


def test_a_path_beside_the_run_folder_stays(images, tmp_path):
    (tmp_path / "m10").mkdir()
    index = shutil.copy(images, tmp_path / "m10" / "partition.csv")
    stop_before(1, words(index, tmp_path / "m1"))
    (tmp_path / "m1").rename(tmp_path / "m2")
    assert read_config(tmp_path / "m2").data.index == str(index)
    assert resolve([f"resume={tmp_path / 'm2'}"])[0].data.index == str(index)


def test_a_run_of_other_defaults_is_never_read_as_what_it_was_not(cut_by_partition, tmp_path):
    folder = Path(shutil.copytree(cut_by_partition, tmp_path / "old"))
    text = (folder / "config.yaml").read_text()
    assert "centre_prior: 2.0" in text
    (folder / "config.yaml").write_text(text.replace("centre_prior: 2.0", "centre_prior: 1.0"))
    with pytest.raises(ConfigError, match="another version.*method.centre_prior was 1.0, is 2.0"):
        read_config(folder)
    with pytest.raises(ConfigError, match="method.centre_prior was 1.0, is 2.0.*another version"):
        resolve([f"resume={folder}"])
    assert read_config(folder, ["method.centre_prior=1.0"]).method.centre_prior == 1.0
    (folder / "config.yaml").write_text(text.replace("  centre_prior: 2.0\n", ""))
    with pytest.raises(ConfigError, match="method.centre_prior was not there, is 2.0"):
        read_config(folder)


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_torn_last_round_is_done_again(copy, whole, suffix):
    path = checkpoint.round_file(copy, 2, suffix)
    path.write_bytes(path.read_bytes()[:-20])
    serve(partitions(3), [f"resume={copy}"])
    assert same(whole, copy, 3)


def test_metrics_are_cut_to_whole_rounds(copy, whole):
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"round": 3, "site": "a", "loss": 9.9}\n{"round": 3, "si')
    serve(partitions(3), [f"resume={copy}"])
    assert same(whole, copy, 3)


def test_a_site_with_a_torn_local_state_goes_on_from_the_one_before(copy):
    (state,) = (copy / "sites" / "a" / "state").glob("*/round_0002.safetensors")
    state.write_bytes(state.read_bytes()[:100])
    serve(partitions(3), [f"resume={copy}"])
    last = {r["site"]: r for r in rows(copy) if r["round"] == 3}
    assert [last[s]["state_round"] for s in ("a", "b", "c")] == [1, 2, 2]
    assert "torn" in (copy / "sites" / "a" / "client.log").read_text()


def test_two_local_states_are_kept(cut, whole):
    for folder, numbers in ((cut, [1, 2]), (whole, [2, 3])):
        for site in "abc":
            found = sorted(p.name for p in (folder / "sites" / site / "state").glob("*/*"))
            assert found == [f"round_{n:04d}.safetensors" for n in numbers]


def test_a_run_that_ended_before_its_first_checkpoint_begins_when_continued(
    images, whole, tmp_path, monkeypatch
):
    """Killed between the initial weights and the JSON that vouches for them."""
    run, real = tmp_path / "run", checkpoint.write_bytes

    def killed(path, data):
        if path.suffix == ".json":
            raise Stopped
        real(path, data)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(checkpoint, "write_bytes", killed)
        serve(partitions(3), words(images, run, "federation.rounds=3"))
    assert [p.name for p in (run / "rounds").iterdir()] == ["round_0000.safetensors"]
    serve(partitions(3), [f"resume={run}"])
    assert same(whole, run, 3)


def test_a_run_that_is_done_has_nothing_to_do(whole):
    before = checkpoint.round_file(whole, 3).read_bytes()
    serve(partitions(3), [f"resume={whole}"])
    assert checkpoint.latest(whole) == 3
    assert checkpoint.round_file(whole, 3).read_bytes() == before


def test_more_rounds_may_be_asked_for(copy):
    serve(partitions(3), [f"resume={copy}", "federation.rounds=4"])
    assert checkpoint.latest(copy) == 4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("seed=2", "seed was 0, is 2"),
        ("backbone.depth=2", "backbone.depth was 1, is 2"),
        ("federation.strategy=median", "federation.strategy was 'fedavg'"),
        ("data.index=/elsewhere.csv", "data.index"),
        ("train.lr=0.5", "train.lr"),
    ],
)
def test_another_configuration_is_another_run(copy, change, named):
    with pytest.raises(ConfigError, match=named):
        resolve([f"resume={copy}", change])


def test_free_settings_may_change_and_overrides_add_up(copy):
    free = ["federation.workers=7", "evaluation.bootstrap=10", "federation.round_timeout=9"]
    config, told = resolve([f"resume={copy}", *free])
    assert config.federation.workers == 7
    assert config.resume == config.output_dir == str(copy)
    assert "backbone.depth=1" in told
    assert not [w for w in told if w.startswith("resume")]


def test_nothing_to_resume_is_said(tmp_path, copy):
    with pytest.raises(ConfigError, match="no run there"):
        serve(partitions(3), [f"resume={tmp_path / 'nowhere'}"])
    for torn, said in (
        (b"overrides: [", "not YAML"),
        (b"\xff\xfe\xff", "not YAML"),
        (b"- 1", "not the config"),
    ):
        (tmp_path / "config.yaml").write_bytes(torn)
        with pytest.raises(ConfigError, match=said):
            resolve([f"resume={tmp_path}"])
    for path in (copy / "rounds").glob("*.safetensors"):
        path.write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="no whole round"):
        serve(partitions(3), [f"resume={copy}"])
