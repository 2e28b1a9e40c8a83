"""The real thing: ``flwr run . --stream`` on Flower's own SuperLink and Ray, from a copy of the tree."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from simulation import flower_home
from simulation.processes import free_ports
from sparsecontrast import checkpoint, overrides
from sparsecontrast.egress import FILE, HEAD
from tests.federations import MODEL, rows

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[1]
SHIPPED = ("server", "client", "sparsecontrast", "configs", "pyproject.toml")
PHANTOMS = (
    *MODEL,
    "data.phantom.sites=3",
    "data.phantom.patients_per_site=8",
    "federation.sites=3",
    "federation.rounds=2",
)


class Flower:
    """A clone with Flower's home, its port, and every process that it started."""

    def __init__(self, folder):
        self.app = folder / "clone"
        self.app.mkdir()
        for name in SHIPPED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, self.app / name)
        packages = folder / "packages"
        packages.mkdir()
        flower_home.write(self.app, packages)
        http, control = free_ports(2)
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("FLWR_", "RAY_"))},
            **flower_home.VARIABLES,
            "FLWR_HOME": str(self.app / flower_home.HOME),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(http),
            "FLWR_LOCAL_CONTROL_API_PORT": str(control),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def __call__(self, *arguments):
        command = [str(Path(sys.executable).parent / "flwr"), *arguments]
        return subprocess.run(
            command, cwd=self.app, env=self.environment, capture_output=True, text=True, timeout=240
        )

    def status(self):
        """Statuses of all runs, newest first: the exit code of ``flwr run`` says nothing."""
        return [run["status"] for run in json.loads(self("list", "local", "--format", "json").stdout)["runs"]]

    def processes(self):
        """Everything that runs with this home in its environment."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                told = (folder / "environ").read_bytes()
            except OSError:
                continue
            if self.environment["FLWR_HOME"].encode() in told:
                found.append(int(folder.name))
        return found

    def stop(self):
        for sent, wait in ((signal.SIGTERM, 20), (signal.SIGKILL, 10)):
            for pid in self.processes():
                try:
                    os.kill(pid, sent)
                except ProcessLookupError:
                    continue
            deadline = time.monotonic() + wait
            while self.processes() and time.monotonic() < deadline:
                time.sleep(0.2)


@pytest.fixture(scope="module")
def flower(tmp_path_factory):
    running = Flower(tmp_path_factory.mktemp("flower"))
    yield running
    running.stop()
    assert not running.processes()


def test_flwr_run_and_the_local_grid_give_the_same_bits(flower, tmp_path):
    """Ten SuperNodes by default, three hospitals, two rounds: Ray against our worker processes."""
    told = overrides.join([*PHANTOMS, f"output_dir={tmp_path / 'ray'}"])
    result = flower("run", ".", "--stream", "--run-config", f'overrides="{told}"')
    assert flower.status() == ["finished:completed"], result.stdout + result.stderr
    assert "10 simulated SuperNodes" in result.stdout + result.stderr
    command = [sys.executable, "-m", "simulation", *PHANTOMS, f"output_dir={tmp_path / 'local'}"]
    subprocess.run(
        [*command, "--no-evaluation"], cwd=ROOT, env=flower.environment, check=True, timeout=200,
        capture_output=True,
    )  # fmt: skip
    for number in range(3):
        one, two = (checkpoint.round_file(tmp_path / f, number).read_bytes() for f in ("ray", "local"))
        assert one == two, f"round {number}"
    assert [r["contributors"] for r in rows(tmp_path / "ray") if r["site"] is None] == [
        ["hospital_00", "hospital_01", "hospital_02"]
    ] * 2


def test_a_run_without_a_quorum_is_marked_as_failed(flower):
    told = overrides.merge(PHANTOMS, ["data.min_images=1000", "output_dir=outputs/small"])
    before = len(flower.status())
    result = flower("run", ".", "--stream", "--run-config", f'overrides="{overrides.join(told)}"')
    status = flower.status()
    assert len(status) == before + 1
    assert status[0] == "finished:failed"
    assert "site_too_small" in result.stdout + result.stderr
    # a relative output_dir starts where the SuperLink was started, the clone; for the sites too
    out = flower.app / "outputs" / "small"
    assert checkpoint.latest(out) == 0
    folders = sorted(p.name for p in (out / "sites").iterdir())
    assert folders[:3] == [f"hospital_0{i}" for i in range(3)]
    # the seven nodes without a site log that they said so, and keep nothing else
    idle = {p.name for name in folders[3:] for p in (out / "sites" / name).iterdir()}
    assert folders[3:] == [f"node_{i}" for i in range(3, 10)] and idle == {FILE, HEAD}


def test_the_environment_takes_the_clones_home_unless_told_otherwise(tmp_path):
    (tmp_path / "packages").mkdir()
    flower_home.write(tmp_path, tmp_path / "packages")
    code = "import os, site, sys; site.addsitedir(sys.argv[1]); print(os.environ['FLWR_HOME'])"
    command = [sys.executable, "-c", code, str(tmp_path / "packages")]
    bare = {k: v for k, v in os.environ.items() if not k.startswith("FLWR_")}

    def home(**more):
        result = subprocess.run(command, env={**bare, **more}, capture_output=True, text=True, check=True)
        return result.stdout.strip()

    assert home(FLWR_HOME="/elsewhere") == "/elsewhere"
    # -I and -S: without what a set-up environment has already put there
    command[1:1] = ["-I", "-S"]
    assert home() == str(tmp_path / flower_home.HOME)
    mine = tmp_path / flower_home.HOME / "config.toml"
    mine.write_text("edited")
    flower_home.write(tmp_path, tmp_path / "packages")
    assert mine.read_text() == "edited"
