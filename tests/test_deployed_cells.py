"""Labs that train one classifier over a real deployment: SuperLink, a SuperNode at each lab, TLS, keys."""

import shutil

import pandas as pd
import pytest
import yaml

from simulation.deploy import Deployment
from sparsecontrast import checkpoint
from sparsecontrast.egress import EgressLog
from sparsecontrast.overrides import assign
from tests.federations import rows
from tests.labs import MODEL

pytestmark = pytest.mark.e2e
LABS = ("grey", "yellow")


def only(pictures, lab, folder):
    """A copy of the pictures of one lab, with no trace of the other."""
    table = pd.read_csv(pictures / "index.csv")
    table = table[table["site"] == lab]
    (folder / "images").mkdir(parents=True)
    for path in table["path"]:
        shutil.copy(pictures / path, folder / path)
    table.to_csv(folder / "index.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def deployed(pictures, tmp_path_factory):
    """A finished run of two labs, each with pictures of its own, and how Flower says that it ended."""
    folder = tmp_path_factory.mktemp("deployed")
    with Deployment(folder, LABS) as federation:
        federation.provision()
        for lab in LABS:
            file = federation.kits.site(lab) / "site.yaml"
            written = yaml.safe_load(file.read_text())
            written["overrides"] = [assign("cells.root", only(pictures, lab, folder / "pictures" / lab))]
            file.write_text(yaml.safe_dump(written))
        federation.start()
        status = federation.run(MODEL, base=())
    assert not federation.processes()
    return federation, status


def released(state):
    """Every answer of a lab with its round, and the digest of the weights that left with it."""
    kept = [(r.kind, r.content["status"], r.content) for r in EgressLog(state).rows()]
    return [(kind, status, told.get("round"), told.get("sha256")) for kind, status, told in kept]


def test_a_deployed_run_completes_and_ends_with_the_bytes_of_the_simulation(deployed, two_labs):
    """The simulation reads both labs from one table; here each lab has a folder and a process of its own."""
    federation, status = deployed
    assert status == "finished:completed"
    out = federation.folder / "run"
    assert [r["contributors"] for r in rows(out) if r["site"] is None] == [list(LABS)] * 2
    for number in range(3):
        one, two = (checkpoint.round_file(f, number).read_bytes() for f in (out, two_labs[0]))
        assert one == two, f"round {number}"


@pytest.mark.parametrize("lab", LABS)
def test_each_lab_has_logged_its_releases_and_no_others(deployed, two_labs, lab):
    federation, _ = deployed
    found = released(federation.folder / "states" / lab)
    assert [one[:2] for one in found] == [("hello", "ok"), ("train", "ok"), ("train", "ok")]
    trained = [one for one in found if one[0] == "train"]
    assert [number for _, _, number, _ in trained] == [1, 2] and len({one[3] for one in trained}) == 2
    assert trained == [one for one in released(two_labs[0] / "sites" / lab) if one[0] == "train"]


def test_the_servers_files_name_no_picture_of_a_lab_and_no_folder(deployed):
    federation, _ = deployed
    written = [path.read_bytes() for path in (federation.folder / "run").rglob("*") if path.is_file()]
    assert any(b"grey" in data for data in written)  # the name of a lab is no secret
    for word in (str(federation.folder / "pictures"), "grey_", ".png"):
        assert not any(word.encode() in data for data in written)
