"""A real federation of generated kits on loopback: a run, and who is turned away from it."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks.fault_cases.case import BrokenPromiseError
from benchmarks.fault_cases.fronts import passing_on
from benchmarks.fault_cases.transport import IN_ORDER, KINDS, UNREGISTERED, Strangers, copy_of, outcome
from simulation.deploy import LET_IN, ROOT, Deployment
from sparsecontrast import checkpoint
from sparsecontrast.egress import EgressLog
from sparsecontrast.provision import change
from tests.dicom_files import write_dicom
from tests.federations import MODEL, rows
from tests.fronts import write_pem

pytestmark = pytest.mark.e2e
RUNNING = ("north", "south", "west")


def until(true, seconds=180):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """Three running sites, and east, which is registered and not started."""
    folder = tmp_path_factory.mktemp("deployment")
    with Deployment(folder, (*RUNNING, "east"), patients=8) as running:
        running.provision()
        running.start(RUNNING)
        yield running
    assert not running.processes()


def said(federation, name):
    return federation.log(name).read_text(errors="replace")


def test_a_run_of_three_hospitals_completes_and_every_answer_is_logged(federation):
    words = (*MODEL, "federation.sites=3", "federation.rounds=1", "federation.min_sites=3")
    assert federation.run(words) == "finished:completed"
    run = federation.folder / "run"
    assert checkpoint.latest(run) == 1
    assert [r["contributors"] for r in rows(run) if r["site"] is None] == [sorted(RUNNING)]
    for name in RUNNING:
        log = EgressLog(federation.folder / "states" / name).rows()
        assert [(r.kind, r.content["status"]) for r in log] == [("hello", "ok"), ("train", "ok")]


def test_a_site_runs_the_bundles_that_it_names_and_no_other(federation):
    """By default the bundle is not even unpacked: see test_sentinel.py."""
    file = federation.kits.site("west") / "site.yaml"
    before, states = file.read_text(), federation.folder / "states"
    words = [*MODEL, "federation.sites=3", "federation.rounds=1", "federation.min_sites=2"]

    def contributors(name):
        assert federation.run([*words, f"output_dir='{federation.folder / name}'"]) == "finished:completed"
        return [r["contributors"] for r in rows(federation.folder / name) if r["site"] is None]

    file.write_text(f"{before}\napp: ['{64 * 'a'}']\n")
    assert contributors("refused") == [["north", "south"]]
    told = (states / "west" / "client.log").read_text()
    assert "refused: the server's app has the digest" in told
    digest = [sys.executable, "-m", "client.sentinel", "digest", str(ROOT)]
    found = subprocess.run(digest, capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() in told
    file.write_text(f"{before}\napp: ['{found.stdout.strip()}']\n")
    assert contributors("named") == [sorted(RUNNING)]
    file.write_text(before)


PATIENT = ("DOE^JANE", "PATIENT-9731", "19311224", "left lung of J. Doe", "case-of-doe")


def patient_site(folder, name, count):
    """A site whose every tag, folder and file name tells of a patient."""
    root = folder / "PATIENT-9731" / name
    root.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 4096, (48, 48)).astype(np.uint16)
        tags = {"PatientName": "DOE^JANE", "PatientID": f"PATIENT-9731-{number}",
                "PatientBirthDate": "19311224", "ImageComments": "left lung of J. Doe"}  # fmt: skip
        write_dicom(root / f"case-of-doe-{number}.dcm", pixels, **tags)
    return ["data=dicom", f"data.root='{root}'", "data.min_images=2"]


def test_the_captured_wire_holds_no_word_of_a_patient(federation):
    """A site full of names: every byte that it sends, in clear text, and all that the server writes."""
    folder, heard = federation.folder, bytearray()
    pem = write_pem(folder / "wire.pem", federation.kits.authority())
    words = [*MODEL, "federation.rounds=1", "federation.min_sites=4", f"output_dir='{folder / 'wired'}'"]
    with passing_on(pem, federation.plan.server.bind, heard) as front:
        kit = copy_of(federation, "east", "named", SUPERLINK=front)
        told = yaml.safe_load((kit / "site.yaml").read_text())
        told["overrides"] = patient_site(folder, "whole", 12)
        (kit / "site.yaml").write_text(yaml.safe_dump(told))
        process = federation.launch("named", kit / "supernode.sh")
        while LET_IN not in said(federation, "named"):
            assert process.poll() is None
            time.sleep(0.2)
        assert federation.run(words) == "finished:completed"
        federation.end_one("named")
    (row,) = (r for r in rows(folder / "wired") if r["site"] == "east")
    assert row["status"] == "ok" and row["num_examples"] > 2
    written = {path.name: path.read_bytes() for path in (folder / "wired").rglob("*") if path.is_file()}
    found = written | {"the wire": bytes(heard), "the log": federation.log("superlink").read_bytes()}
    assert len(heard) > 100_000 and b"east" in heard and b"backbone." in heard  # it can be read
    for where, data in found.items():
        assert not [word for word in PATIENT if word.encode() in data], where
    assert str(folder).encode() not in heard


def test_strangers_are_refused_each_for_its_own_reason(federation):
    """The node that all of them copy gets in, by the same way, with a certificate as it should be."""
    with contextlib.ExitStack() as stack:
        strangers = Strangers(federation, stack)
        told = {kind: strangers.refused(kind) for kind in KINDS}
    assert [kind for kind, why in told.items() if why == LET_IN] == [IN_ORDER]
    assert len(told) == len(set(told.values())) == 7


@pytest.mark.parametrize(("kind", "missing"), [("expired", "ca.crt"), (UNREGISTERED, "node.key")])
def test_a_node_with_a_torn_kit_is_not_counted_as_turned_away(federation, kind, missing):
    class Torn(Strangers):
        def kit(self, kind):
            shutil.rmtree(federation.folder / "strangers" / kind, ignore_errors=True)
            kit = super().kit(kind)
            (kit / missing).unlink()
            return kit

    with contextlib.ExitStack() as stack, pytest.raises(BrokenPromiseError, match="for another reason"):
        Torn(federation, stack).refused(kind)


def below(federation, pid):
    """Process ids of a process and of all that it started."""
    found = [pid]
    for one in found:
        for child in federation.processes():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1] == str(one):
                    found.append(child)
    return found


def pause(pids):
    """Pause processes; whether there were any."""
    paused = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            paused.append(pid)
    return paused


def names(pids):
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            found.append(Path(f"/proc/{pid}/comm").read_text().strip())
    return found


def test_a_node_forks_its_clients_and_leaves_no_process_when_it_is_killed(federation):
    """It is killed with a client at work, which is paused meanwhile: there is one to be left behind."""
    node = federation.let_in("east")  # a stranger with its key may not have said goodbye
    until(lambda: len(below(federation, node.pid)) == 3)
    _, executor, template = below(federation, node.pid)
    words = [*MODEL, "federation.sites=4", "federation.min_sites=2", "federation.rounds=1"]
    asking = threading.Thread(
        target=federation.run, args=([*words, f"output_dir='{federation.folder / 'killed'}'"],)
    )
    asking.start()
    until(lambda: pause(p for p in below(federation, template) if names([p]) == ["flwr-clientapp"]))
    family = below(federation, node.pid)
    assert {executor, template} < set(family) and names(family)[-1] == "flwr-clientapp"
    node.kill()
    node.wait()
    for pid in family[3:]:
        os.kill(pid, signal.SIGCONT)
    until(lambda: not set(family) & set(federation.processes()))
    del federation.started["east"]
    asking.join()
    for name in RUNNING:
        assert "started in the cold" not in said(federation, name)


def test_a_revoked_site_is_turned_away_at_once_and_for_good(federation):
    west = federation.started["west"]
    assert LET_IN in said(federation, "west") and west.poll() is None
    (key,) = federation.kits.keys.glob("west.*.pub")
    kept = key.read_bytes()
    (federation.kits.server / "registered" / f"{key.stem}.id").unlink()  # the SuperLink knows it all the same
    change.revoke(federation.kits.root, "west")
    key.write_bytes(kept)  # as after a copy without deletion
    assert "in keys/ and in revoked/: not registered" in federation.tell("register.sh")
    key.unlink()
    west.wait(90)
    shutil.copytree(
        federation.kits.root / "sites" / ".revoked-west", federation.folder / "strangers" / "west"
    )
    assert outcome(federation, "again", federation.folder / "strangers" / "west") not in (0, LET_IN, None)
    # a new key lets the hospital in again
    change.rotate_site(federation.kits.root, "east")
    federation.tell("register.sh")
    assert outcome(federation, "rotated", federation.kits.site("east")) == LET_IN


def test_a_deployment_that_is_interrupted_leaves_no_process(tmp_path):
    code = (
        "import sys, pathlib; from simulation.deploy import Deployment, main\n"
        "def tell(self, *a, **k):\n"
        "    pathlib.Path(sys.argv[1], 'mark').write_text(self.mark)\n"
        "    raise KeyboardInterrupt\n"
        "Deployment.tell = tell\n"
        "sys.exit(main(['--out', sys.argv[1] + '/out']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 130, done.stderr
    left = Deployment(tmp_path)
    left.mark = (tmp_path / "mark").read_text()
    assert "Uvicorn running" in (tmp_path / "out" / "superlink.log").read_text()
    assert not left.processes()
