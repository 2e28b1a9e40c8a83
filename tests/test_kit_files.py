"""The files of a kit that start its process: scripts, unit, container."""

import os
import pwd
import shlex
import shutil
import stat
import subprocess

import pytest
import yaml

from sparsecontrast.provision import kits
from sparsecontrast.provision.plan import read_plan
from tests.test_provision import EXAMPLE, SITES, plan_with


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One federation that no test changes."""
    out = tmp_path_factory.mktemp("kit_files") / "federation"
    kits.provision(read_plan(EXAMPLE), EXAMPLE.read_bytes(), out)
    return out


def test_scripts_are_posix_and_unit_and_compose_files_name_the_kit(made):
    scripts = sorted(made.rglob("*.sh"))
    assert len(scripts) == 6 + 4 * len(SITES)
    for script in scripts:
        subprocess.run(["sh", "-n", str(script)], check=True)
        assert os.access(script, os.X_OK) is (script.name != "environment.sh")
    compose = yaml.safe_load((made / "sites" / "st-elsewhere" / "compose.yaml").read_text())
    (service,) = compose["services"].values()
    assert service["volumes"] == [
        ".:/opt/sparsecontrast/kit", "/var/lib/sparsecontrast:/var/lib/sparsecontrast",
        "/pacs/export:/pacs/export:ro",
    ]  # fmt: skip
    unit = (made / "sites" / "st-elsewhere" / "supernode.service").read_text()
    assert "ExecStart=/bin/sh /opt/sparsecontrast/kit/supernode.sh\n" in unit
    assert "ReadWritePaths=/opt/sparsecontrast/kit /var/lib/sparsecontrast\n" in unit
    assert "ExecStartPre" not in (made / "server" / "superlink.service").read_text()


def test_systemd_understands_the_units(made, tmp_path):
    if not (analyze := shutil.which("systemd-analyze")):
        pytest.skip("no systemd here")
    units = [made / "server" / "superlink.service", made / "sites" / "st-elsewhere" / "supernode.service"]
    done = subprocess.run([analyze, "verify", *map(str, units)], capture_output=True, text=True, check=False)
    own = [line for line in done.stderr.splitlines() if "superlink" in line or "supernode" in line]
    assert done.returncode == 0 and not own, done.stderr


@pytest.fixture
def own_kit(tmp_path):
    """A site's kit whose folders this user may make; returns it and its state_dir, which is not there."""
    state, me = tmp_path / "var" / "state", pwd.getpwuid(os.getuid()).pw_name
    change = {"state_dir": str(state), "overrides": ["data=phantom"]}
    told = plan_with(lambda t: t["sites"][0].update(change))
    told.setdefault("install", {})["user"] = me
    path = tmp_path / "sites.yaml"
    path.write_text(yaml.safe_dump(told))
    kits.provision(read_plan(path), path.read_bytes(), tmp_path / "out")
    return tmp_path / "out" / "sites" / "st-elsewhere", state


def test_the_unit_makes_the_folder_that_it_could_not_start_without(own_kit):
    kit, state = own_kit
    lines = (kit / "supernode.service").read_text().splitlines()
    (before,) = [line for line in lines if line.startswith("ExecStartPre=+")]
    command = shlex.split(before.removeprefix("ExecStartPre=+"))
    subprocess.run(command, check=True)
    assert stat.S_IMODE(state.stat().st_mode) == 0o700 and state.stat().st_uid == os.getuid()
    state.chmod(0o750)
    subprocess.run(command, check=True)
    assert stat.S_IMODE(state.stat().st_mode) == 0o750  # what is there stays as the site made it


def test_the_container_runs_as_the_owner_of_the_kit_and_by_the_script_alone(own_kit, tmp_path):
    kit, state = own_kit
    (service,) = yaml.safe_load((kit / "compose.yaml").read_text())["services"].values()
    assert service["user"] == "${SC_UID:?start it with ./compose.sh}:${SC_GID:?}"
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    docker.write_text('#!/bin/sh\necho "$PWD $SC_UID:$SC_GID $*"\n')
    docker.chmod(0o755)
    path = {"PATH": f"{docker.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [kit / "compose.sh", "up", "-d"], env=path, cwd="/", capture_output=True, text=True, check=True
    )
    owner = kit.stat()
    assert done.stdout == f"{kit} {owner.st_uid}:{owner.st_gid} compose up -d\n"
    assert stat.S_IMODE(state.stat().st_mode) == 0o700 and state.stat().st_uid == owner.st_uid
