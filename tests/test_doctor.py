"""The doctor: each fault, injected for real, has its line; and no line tells of a patient."""

import re
import shutil
import stat
from collections import namedtuple
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from PIL import Image

from sparsecontrast.cli import main
from sparsecontrast.doctor import images, machine, pictures, server, state
from sparsecontrast.doctor.examine import examine
from sparsecontrast.doctor.finding import Finding, guarded
from sparsecontrast.egress import EgressLog
from sparsecontrast.provision.authority import new_authority
from sparsecontrast.provision.health import _date, ask_date
from sparsecontrast.provision.kits import provision
from sparsecontrast.provision.plan import read_plan
from sparsecontrast.site_file import Limits
from tests.fronts import answering, write_pem

GIB = 2**30


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """Kits of one site on phantoms; no test changes them."""
    folder = tmp_path_factory.mktemp("doctor")
    told = {
        "federation": "ward",
        "server": {"address": "127.0.0.1:9092", "bind": "127.0.0.1:9092"},
        "sites": [
            {
                "name": "north", "state_dir": str(folder / "state"),
                "overrides": ["data=phantom", "data.phantom.sites=1", "data.phantom.patients_per_site=12",
                              "data.min_images=2"],
                "limits": {"memory_gib": 8},
            }
        ],
    }  # fmt: skip
    (folder / "sites.yaml").write_text(yaml.safe_dump(told))
    return provision(read_plan(folder / "sites.yaml"), b"", folder / "federation")


@pytest.fixture
def kit(federation, tmp_path, monkeypatch):
    """A copy of the site's kit with a state folder of its own, on a machine with room."""
    copy = shutil.copytree(federation.site("north"), tmp_path / "kit")
    text = (copy / "site.yaml").read_text()
    (copy / "site.yaml").write_text(re.sub(r"state_dir: /.*", f"state_dir: {tmp_path / 'state'}", text))
    (tmp_path / "meminfo").write_text("MemAvailable:   16000000 kB\n")
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    give(monkeypatch, free=50 * GIB)
    return copy


def give(monkeypatch, free):
    usage = namedtuple("usage", "total used free")(100 * GIB, 0, free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def at(kit, address, **site):
    """Point a kit at a server, and change its site.yaml."""
    text = (kit / "settings.env").read_text()
    (kit / "settings.env").write_text(re.sub(r"(?m)^SUPERLINK=.*$", f"SUPERLINK={address}", text))
    if site:
        told = yaml.safe_load((kit / "site.yaml").read_text()) | site
        (kit / "site.yaml").write_text(yaml.safe_dump(told))
    return kit / "site.yaml"


def lines(findings):
    return {(f.name, f.level) for f in findings}


def of(findings, name):
    (found,) = [f for f in findings if f.name == name]
    return found


def test_a_site_in_order_has_no_fault_and_tells_of_no_patient(federation, kit, tmp_path, capsys):
    with answering(federation.server / "server.pem") as address:
        code = main(["doctor", "--site", str(at(kit, address))])
    told = capsys.readouterr().out
    assert code == 0, told
    assert [line.split()[0] for line in told.splitlines()] == ["ok"] * len(told.splitlines()), told
    names = [line.split()[1] for line in told.splitlines()]
    first = ["python", "packages", "memory", "gpu", "key", "tls", "server", "tls", "clock"]
    assert names == [*first, "site", "limits", "disk", "data", "quarantine", "pixels", "ledger", "egress"]
    assert "phantom:" not in told and not re.search(r"[0-9a-f]{16}", told)
    sheet = tmp_path / "state" / images.SHEET
    assert stat.S_IMODE(sheet.stat().st_mode) == 0o600
    with Image.open(sheet) as picture:
        assert picture.size[0] == images.COLUMNS * images.SIDE and np.asarray(picture).std() > 20


@pytest.mark.parametrize(
    ("fault", "name", "says"),
    [
        ("down", "server", "is the server up"),
        ("answers 503", "server", "answered 503"),
        ("plain HTTP", "tls", "does not speak TLS"),
        ("expired", "tls", "has expired.*rotate server"),
        ("not yet valid", "tls", "not yet valid"),
        ("wrong name", "tls", "other names.*server.names"),
        ("wrong authority", "tls", "another authority.*SHA-256"),
    ],
)
def test_each_fault_of_the_server_is_told_apart(federation, kit, tmp_path, fault, name, says):
    authority, now = federation.authority(), datetime.now(UTC)
    pem = tmp_path / "server.pem"
    if fault == "expired":
        write_pem(pem, authority, days=10, now=now - timedelta(days=11))
    elif fault == "not yet valid":
        write_pem(pem, authority, now=now + timedelta(days=2))
    elif fault == "wrong name":
        write_pem(pem, authority, names=("localhost", "127.0.0.2"))
    elif fault == "wrong authority":
        write_pem(pem, new_authority("ward", 30))
    else:
        write_pem(pem, authority)
    with answering(None if fault == "plain HTTP" else pem, 503 if "503" in fault else 200) as address:
        at(kit, "127.0.0.1:1" if fault == "down" else address)
        found = list(server.server(kit))
    wrong = [f for f in found if f.level != "ok"]
    assert [(f.level, f.name) for f in wrong] == [("FAIL", name)]
    assert re.search(says, str(wrong[0])), wrong[0]


DAY = 86400


@pytest.mark.parametrize(("days", "what"), [(-60, "has expired"), (60, "not yet valid")])
def test_a_site_whose_clock_is_wrong_is_not_told_to_change_the_certificate(
    federation, kit, tmp_path, days, what
):
    """The server's certificate and clock are ``days`` away, as they look to a site whose clock is."""
    server_now = datetime.now(UTC) + timedelta(days=days)
    write_pem(tmp_path / "server.pem", federation.authority(), now=server_now)
    with answering(tmp_path / "server.pem", seconds=days * DAY) as address:
        at(kit, address)
        found = list(server.server(kit))
    tls, clock = [f for f in found if f.level == "FAIL"]
    assert (tls.name, clock.name) == ("tls", "clock") and what in tls.what
    assert re.search(r"^this clock is wrong, it says \d{4}-.* UTC: set it by NTP", tls.remedy)
    assert f"{'ahead of' if days < 0 else 'behind'} the server" in clock.what and "NTP" in clock.remedy


def test_where_the_servers_clock_cannot_be_had_both_are_named(federation, kit, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "ask_date", lambda address: None)
    write_pem(
        tmp_path / "old.pem", federation.authority(), days=10, now=datetime.now(UTC) - timedelta(days=11)
    )
    with answering(tmp_path / "old.pem") as address:
        at(kit, address)
        tls, clock = [f for f in server.server(kit) if f.level != "ok"]
    assert "clock may be wrong" in tls.remedy and "rotate server" in tls.remedy
    assert (clock.name, clock.level) == ("clock", "warn")


def test_a_date_that_is_none_is_no_crash():
    assert _date("not a date") is None and _date(None) is None
    assert _date("Mon, 02 Jan 2023 00:00:00 -0000") == _date("Mon, 02 Jan 2023 00:00:00 GMT")
    assert ask_date("127.0.0.1:1") is None


def test_a_certificate_that_ends_soon_is_a_warning(federation, kit, tmp_path):
    with answering(write_pem(tmp_path / "soon.pem", federation.authority(), days=20)) as address:
        at(kit, address)
        found = list(server.server(kit))
    assert [f.name for f in found if f.level == "warn"] == ["tls"]
    assert not [f for f in found if f.level == "FAIL"]


@pytest.mark.parametrize(
    ("seconds", "level", "says"),
    [
        (0, "ok", ""),
        (-60, "FAIL", "ahead of"),
        (60, "warn", "behind"),
        (400, "FAIL", "behind"),
        (-4, "warn", "ahead"),
    ],
)
def test_a_clock_that_the_server_would_not_believe_is_a_fault(federation, kit, seconds, level, says):
    with answering(federation.server / "server.pem", seconds=seconds) as address:
        at(kit, address)
        found = of(list(server.server(kit)), "clock")
    assert found.level == level and says in found.what


@pytest.mark.parametrize("fault", ["missing", "readable", "torn", "rsa"])
def test_a_node_key_that_would_not_do_is_a_fault(kit, fault):
    key = kit / "node.key"
    if fault == "missing":
        key.unlink()
    elif fault == "readable":
        key.chmod(0o640)
    elif fault == "torn":
        key.write_bytes(key.read_bytes()[:100])
    else:
        other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        key.write_bytes(
            other.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
            )
        )
    at(kit, "127.0.0.1:1")
    found = of(list(server.server(kit)), "key")
    assert found.level == "FAIL" and found.remedy


@pytest.mark.parametrize("name", ["settings.env", "ca.crt"])
def test_a_kit_that_lacks_a_file_is_a_fault_and_not_a_crash(kit, name):
    (kit / name).unlink()
    found = guarded("server", lambda: server.server(kit))
    assert any(f.level == "FAIL" and name in str(f) for f in found)
    assert "ended with" not in "".join(map(str, found))


@pytest.mark.parametrize(("free", "level"), [(50, "ok"), (5, "warn"), (1, "FAIL")])
def test_a_disk_without_room_is_told(tmp_path, monkeypatch, free, level):
    give(monkeypatch, free * GIB)
    (found,) = machine.disk(tmp_path / "not" / "there" / "yet")
    assert found.level == level and f"{free}.0 GiB" in found.what


def test_a_site_without_a_limit_of_memory_is_told_one_that_suits_its_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    (bare,) = machine.limits(Limits())
    (tmp_path / "meminfo").write_text("MemTotal:   16777216 kB\n")
    (found,) = machine.limits(Limits())
    (own,) = machine.limits(Limits(7200, 8))
    assert (bare.level, found.level, own.level) == ("warn", "warn", "ok")
    assert "at most 6 h" in found.what and "memory_gib in site.yaml, such as 12.0, 75%" in found.remedy
    assert "such as 75%" in bare.remedy and "2 h and 8 GiB" in own.what


@pytest.mark.parametrize(("kib", "level"), [(16_000_000, "ok"), (3_000_000, "warn"), (900_000, "FAIL")])
def test_little_memory_is_told(tmp_path, monkeypatch, kib, level):
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {kib} kB\n")
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    assert [f.level for f in machine.memory()] == [level]


def test_packages_and_python_that_do_not_fit_are_named(monkeypatch):
    needs = ["numpy>=1", "torch>=999", "no-such-package-at-all", "neither; extra == 'x'", "flower"]
    monkeypatch.setattr(machine.metadata, "requires", lambda _: needs[:-1])
    monkeypatch.setattr(machine, "PROGRAMS", ("flower-supernode", "flower-nothing"))
    (found,) = machine.packages()
    assert found.level == "FAIL" and "torch is " in found.what and ">=999" in found.what
    assert "no-such-package-at-all is missing" in found.what and "flower-nothing is missing" in found.what
    assert "numpy" not in found.what and "neither" not in found.what and "supernode" not in found.what
    monkeypatch.setattr(machine, "PYTHON", (99, 0))
    assert [f.level for f in machine.python()] == ["FAIL"]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["cells.root=/p"], {"cells"}),
        (["cells.root=/p", "data.min_images=2"], {"cells", "data"}),
        ([], {"data"}),
    ],
)
def test_a_lab_of_cells_alone_is_not_asked_for_films(kit, monkeypatch, words, names):
    monkeypatch.setattr(images, "images", lambda *_: [Finding("ok", "data", "")])
    monkeypatch.setattr(pictures, "pictures", lambda _: [Finding("ok", "cells", "")])
    found = {f.name for f in examine(at(kit, "127.0.0.1:1", overrides=words))}
    assert found & {"cells", "data"} == names


def site_config(privacy="none"):
    from sparsecontrast.config import compose

    return compose(
        ["data=phantom", f"privacy={privacy}"] + (["method=patch_contrast"] if privacy != "none" else [])
    )


def test_a_ledger_is_proved_whole_and_a_torn_one_is_a_fault(tmp_path):
    from tests.ledgers import CHARGE, COHORT, budget, charged

    config = site_config()
    assert of(list(state.ledger(config, tmp_path / "none")), "ledger").level == "ok"
    assert of(list(state.ledger(site_config("dp_sgd"), tmp_path / "none")), "ledger").level == "ok"
    ledger = charged(tmp_path / "site")
    found = of(list(state.ledger(config, tmp_path / "site")), "ledger")
    assert found.level == "ok" and "7 rows" in found.what
    ledger.reserve("first", 6, COHORT, budget(6), CHARGE)
    found = of(list(state.ledger(config, tmp_path / "site")), "ledger")
    assert found.level == "warn" and "no further round fits" in found.what
    data = bytearray(ledger.path.read_bytes())
    at = data.rindex(b'"round":3')
    data[at : at + 9] = b'"round":9'
    ledger.path.write_bytes(data)
    assert of(list(state.ledger(config, tmp_path / "site")), "ledger").level == "FAIL"
    ledger.path.unlink()
    assert of(list(state.ledger(config, tmp_path / "site")), "ledger").level == "FAIL"


@pytest.mark.parametrize("fault", ["", "cut", "changed", "gone"])
def test_an_egress_log_is_proved_whole(tmp_path, fault):
    log = EgressLog(tmp_path)
    for number in range(3):
        log.append("train", {"status": "ok", "round": number})
    lines = log.path.read_text().splitlines(keepends=True)
    if fault == "cut":
        log.path.write_text("".join(lines[:2]))
    elif fault == "changed":
        log.path.write_text("".join(lines).replace('\\"round\\":1', '\\"round\\":7'))
    elif fault == "gone":
        log.path.unlink()
    found = of(list(state.egress(tmp_path, manual=False)), "egress")
    assert found.level == ("FAIL" if fault else "ok") and (fault or "3 answers have left" in found.what)


def test_a_release_that_waits_for_a_person_is_told(tmp_path):
    assert [f.level for f in state.egress(tmp_path, manual=True)] == ["ok", "ok"]
    (tmp_path / "pending").mkdir()
    (tmp_path / "pending" / "ab-0001.json").write_text("{}")
    assert lines(state.egress(tmp_path, manual=True)) == {("egress", "ok"), ("approval", "warn")}


def test_a_site_file_that_is_not_in_order_is_told_and_the_rest_is_checked(kit, capsys):
    site = at(kit, "127.0.0.1:1", overrides=["seed=1"])
    assert main(["doctor", "--site", str(site)]) == 1
    told = capsys.readouterr().out
    assert re.search(r"(?m)^FAIL  site .*a site sets data, cells, privacy, backbone only", told)
    assert re.search(r"(?m)^FAIL  server .*no answer", told) and re.search(r"(?m)^ok +packages", told)


def test_a_check_that_breaks_says_only_how(capsys):
    def broken():
        raise ValueError("/pacs/DOE^JANE.dcm")

    (found,) = guarded("data", broken)
    assert found.level == "FAIL" and "ValueError" in found.what and "JANE" not in str(found)
