"""From sites.yaml to kits: whole or not at all, no key made twice."""

import re
import shutil
import socket
import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from sparsecontrast.cli import main
from sparsecontrast.errors import ConfigError, StorageError
from sparsecontrast.provision import change, kits
from sparsecontrast.provision.authority import fingerprint, new_authority, server_pem, site_key
from sparsecontrast.provision.plan import read_plan
from sparsecontrast.site_file import Limits, read_site_file

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs" / "sites.example.yaml"
SITES = ("st-elsewhere", "county-general")
P256 = (
    ec.generate_private_key(ec.SECP256R1())
    .public_key()
    .public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    .decode()
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One federation that no test changes."""
    out = tmp_path_factory.mktemp("provision") / "federation"
    kits.provision(read_plan(EXAMPLE), EXAMPLE.read_bytes(), out)
    return out


def copied(made, folder):
    return Path(shutil.copytree(made, folder / "federation"))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def keys(out):
    return [
        sorted(p.name.split(".")[0] for p in (out / "server" / d).glob("*.pub")) for d in ("keys", "revoked")
    ]


def test_a_hospitals_kit_asks_no_model_hub_and_the_server_may(made):
    told = [
        (folder / "environment.sh").read_text() for folder in (made / "server", made / "sites" / SITES[0])
    ]
    assert ["\nexport HF_HUB_OFFLINE=1" in text for text in told] == [False, True]


def test_each_gets_what_is_meant_for_it_and_no_other_secret(made):
    for name in SITES:
        kit = made / "sites" / name
        private = load_ssh_private_key((kit / "node.key").read_bytes(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.name == "secp384r1"
        public = (kit / "node.pub").read_bytes()
        assert private.public_key() == load_ssh_public_key(public)
        assert (made / "server" / "keys" / f"{name}.{fingerprint(public)}.pub").read_bytes() == public
        assert read_site_file(kit / "site.yaml").name == name
    policy = read_site_file(made / "sites" / "st-elsewhere" / "site.yaml")
    assert (policy.egress.approve, policy.state_dir) == ("manual", "/var/lib/sparsecontrast")
    assert (policy.limits, policy.app) == (Limits(7200.0, 24.0), "installed")
    assert policy.overrides == [
        "data=dicom",
        "data.root=/pacs/export",
        "privacy=dp_sgd",
        "privacy.target_epsilon=4",
    ]
    secret = [name for name, data in contents(made).items() if b"PRIVATE KEY" in data]
    assert secret == ["ca/ca.key", "server/server.pem", *sorted(f"sites/{n}/node.key" for n in SITES)]
    for name in secret:
        assert stat.S_IMODE((made / name).stat().st_mode) == 0o600
    for folder in (made, made / "server", *(made / "sites" / name for name in SITES)):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_servers_certificate_names_it_and_is_signed_for_that_alone(made):
    certificate = x509.load_pem_x509_certificate((made / "server" / "server.pem").read_bytes())
    authority = x509.load_pem_x509_certificate((made / "ca" / "ca.crt").read_bytes())
    certificate.verify_directly_issued_by(authority)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org", "localhost"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    for cert, ca in ((certificate, False), (authority, True)):
        assert cert.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is ca
        assert cert.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign is ca
    assert certificate.not_valid_after_utc - datetime.now(UTC) < timedelta(days=397)


def test_a_certificate_does_not_outlive_its_authority():
    authority = new_authority("short", 10)
    certificate = x509.load_pem_x509_certificate(server_pem(authority, ["a"], 400))
    assert certificate.not_valid_after_utc == authority.certificate.not_valid_after_utc


def test_a_strict_client_accepts_the_chain_and_refuses_another_authority(made, tmp_path):
    from tests.fronts import answering

    other = tmp_path / "other.crt"
    other.write_bytes(new_authority("chest", 10).certificate_pem)
    with answering(made / "server" / "server.pem") as address:
        host, port = address.split(":")
        for ca, accepted in ((made / "ca" / "ca.crt", True), (other, False)):
            context = ssl.create_default_context(cafile=str(ca))
            context.verify_flags |= ssl.VERIFY_X509_STRICT
            with socket.create_connection((host, int(port)), 5) as raw:
                try:
                    context.wrap_socket(raw, server_hostname="fl.example.org").close()
                    assert accepted
                except ssl.SSLCertVerificationError:
                    assert not accepted


def test_provisioning_twice_changes_no_byte(made, tmp_path, capsys):
    out = copied(made, tmp_path)
    before = contents(out)
    assert main(["provision", str(EXAMPLE), "--out", str(out)]) == 2
    assert "is there already, and its keys are not made anew" in capsys.readouterr().err
    assert contents(out) == before


def test_a_crash_while_provisioning_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise StorageError("disk full")

    monkeypatch.setattr(kits, "write_runbook", full)
    with pytest.raises(StorageError, match="disk full"):
        kits.provision(read_plan(EXAMPLE), b"", tmp_path / "federation")
    assert not list(tmp_path.iterdir())


def test_a_new_key_replaces_the_old_one_at_that_site_alone(made, tmp_path):
    out = copied(made, tmp_path)
    before = contents(out)
    assert main(["provision", "rotate", "st-elsewhere", "--out", str(out)]) == 0
    after = contents(out)
    own = "sites/st-elsewhere/node."
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert {n for n in changed if not n.startswith("server/")} == {f"{own}key", f"{own}pub"}
    assert all(
        n.startswith(("server/keys/st-elsewhere.", "server/revoked/st-elsewhere.", own)) for n in changed
    )
    (known,) = (out / "server" / "keys").glob("st-elsewhere.*.pub")
    assert known.read_bytes() == after[f"{own}pub"] != before[f"{own}pub"]
    (old,) = (out / "server" / "revoked").glob("*.pub")
    assert old.read_bytes() == before[f"{own}pub"]
    assert stat.S_IMODE((out / "sites" / "st-elsewhere" / "node.key").stat().st_mode) == 0o600


def test_a_rotation_that_was_cut_off_is_finished_by_the_next(made, tmp_path, monkeypatch):
    out = copied(made, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(change, "_move", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            change.rotate_site(out, "st-elsewhere")
    assert keys(out) == [["county-general", "st-elsewhere", "st-elsewhere"], []]
    change.rotate_site(out, "st-elsewhere")
    assert keys(out) == [["county-general", "st-elsewhere"], ["st-elsewhere", "st-elsewhere"]]
    (known,) = (out / "server" / "keys").glob("st-elsewhere.*.pub")
    assert known.read_bytes() == (out / "sites" / "st-elsewhere" / "node.pub").read_bytes()


def test_the_server_gets_a_new_certificate_of_the_same_authority(made, tmp_path):
    out = copied(made, tmp_path)
    before = contents(out)
    assert main(["provision", "rotate", "server", "--out", str(out)]) == 0
    after = contents(out)
    assert {n for n in after if before[n] != after[n]} == {"server/server.pem"}
    certificate = x509.load_pem_x509_certificate(after["server/server.pem"])
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(before["ca/ca.crt"]))


def test_a_site_leaves_and_another_joins(made, tmp_path, capsys):
    out = copied(made, tmp_path)
    assert main(["provision", "revoke", "county-general", "--out", str(out)]) == 0
    assert keys(out) == [["st-elsewhere"], ["county-general"]]
    assert not (out / "sites" / "county-general").exists()
    assert main(["provision", "revoke", "county-general", "--out", str(out)]) == 2
    assert main(["provision", "rotate", "county-general", "--out", str(out)]) == 2
    told = yaml.safe_load((out / "sites.yaml").read_text())
    told["sites"].append({"name": "mercy", "state_dir": "/srv/sc"})
    (out / "sites.yaml").write_text(yaml.safe_dump(told))
    assert main(["provision", "add", "nobody", "--out", str(out)]) == 2
    before = contents(out / "sites" / "st-elsewhere")
    assert main(["provision", "add", "mercy", "--out", str(out)]) == 0
    assert main(["provision", "add", "mercy", "--out", str(out)]) == 2
    assert "provision rotate mercy" in capsys.readouterr().err
    assert keys(out)[0] == ["mercy", "st-elsewhere"]
    assert contents(out / "sites" / "st-elsewhere") == before
    assert "sites/mercy/" in (out / "RUNBOOK.md").read_text()
    (known,) = (out / "server" / "keys").glob("mercy.*.pub")
    assert known.read_bytes() == (out / "sites" / "mercy" / "node.pub").read_bytes()


def plan_with(change):
    told = yaml.safe_load(EXAMPLE.read_text())
    change(told)
    return told


def test_digests_of_bundles_reach_the_hospital(tmp_path):
    digests = ["6f" * 32, "03" * 32]
    path = tmp_path / "sites.yaml"
    path.write_text(yaml.safe_dump(plan_with(lambda t: t["sites"][0].update(app=digests))))
    assert main(["provision", str(path), "--out", str(tmp_path / "out")]) == 0
    kit = tmp_path / "out" / "sites" / "st-elsewhere"
    assert read_site_file(kit / "site.yaml").app == tuple(digests)


def test_a_lab_of_cells_can_be_planned(tmp_path):
    change = {"overrides": ["cells=bccd", "cells.root=/pictures"]}
    path = tmp_path / "sites.yaml"
    path.write_text(yaml.safe_dump(plan_with(lambda t: t["sites"][0].update(change))))
    assert main(["provision", str(path), "--out", str(tmp_path / "out")]) == 0
    kit = tmp_path / "out" / "sites" / "st-elsewhere"
    assert read_site_file(kit / "site.yaml").overrides == change["overrides"]
    (service,) = yaml.safe_load((kit / "compose.yaml").read_text())["services"].values()
    assert "/pictures:/pictures:ro" in service["volumes"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("server"), "missing.*server"),
        (lambda t: t.update(colour="red"), "unknown.*colour"),
        (lambda t: t.update(federation="../up"), "federation='../up'"),
        (lambda t: t.update(sites=[]), "sites: none"),
        (lambda t: t["server"].update(bind="0.0.0.0:9092"), "server.bind.*loopback"),
        (lambda t: t["server"].update(bind="127.0.0.1"), "server.bind.*host:port"),
        (lambda t: t["server"].update(address="fl.example.org:70000"), "server.address.*host:port"),
        (lambda t: t["server"].update(names=["a b"]), "server.names"),
        (lambda t: t["sites"][0].update(name="../../etc"), "sites: name"),
        (lambda t: t["sites"][0].update(name="St-Elsewhere"), "lower-case"),
        (lambda t: t["sites"][0].update(name="server"), "taken"),
        (lambda t: t["sites"][0].update(name=7), "expected str"),
        (lambda t: t["sites"].append(dict(t["sites"][0])), "2 times"),
        (lambda t: t["sites"][0].update(state_dir="state"), "state_dir.*absolute"),
        (lambda t: t["sites"][0].update(state_dir="/a/../b"), "state_dir.*absolute"),
        (lambda t: t["sites"][0].update(state_dir="/a; rm -r b"), "state_dir.*absolute"),
        (lambda t: t["sites"][0].update(overrides=["seed=1"]), "a site sets data, cells, privacy"),
        (lambda t: t["sites"][0].update(overrides=["data.rot=/x"]), "rot"),
        (lambda t: t["sites"][0].update(overrides=["cells.rot=/x"]), "rot"),
        (lambda t: t["sites"][0].update(overrides=["cells.classes=[a,b]"]), "of the run, not of a site"),
        (lambda t: t["sites"][0].update(overrides=["privacy=dp_sgd", "privacy.target_epsilon=0"]), "epsilon"),
        (lambda t: t["sites"][0].update(egress={"approve": "never"}), "egress.approve"),
        (lambda t: t["sites"][0].update(egress={"wait_seconds": -1}), "wait_seconds"),
        (lambda t: t["sites"][0].update(limits={"seconds": 0}), "limits.seconds"),
        (lambda t: t["sites"][0].update(limits={"memory": 4}), "limits.*unknown"),
        (lambda t: t["sites"][0].update(app="latest"), "app must be installed, or a list"),
        (lambda t: t["sites"][0].update(app=["6f1c"]), "app must be installed, or a list"),
        (lambda t: t["sites"][0].update(bind="10.0.0.1:9095"), "bind.*loopback"),
        (lambda t: t["sites"][0].update(public_key="ssh-rsa AAAA"), "public_key.*OpenSSH"),
        (lambda t: t["sites"][0].update(public_key=P256), "public_key.*P-384"),
        (lambda t: t["days"].update(server=0), "days.server"),
        (lambda t: t["install"].update(kit="kit"), "install.kit"),
        (lambda t: t["install"].update(user="a b"), "install.user"),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_is_refused_before_a_key_is_made(tmp_path, capsys, change, says):
    path = tmp_path / "sites.yaml"
    path.write_text(yaml.safe_dump(plan_with(change)))
    assert main(["provision", str(path), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert re.search(says, told) and str(path) in told
    assert not (tmp_path / "out").exists()


def test_a_plan_that_is_no_yaml_is_refused(tmp_path):
    path = tmp_path / "sites.yaml"
    path.write_text("a: [")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_plan(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_plan(tmp_path / "missing.yaml")


def test_a_hospital_may_make_its_key_itself_and_nobody_else_ever_holds_it(tmp_path):
    private, public = site_key("mine")
    told = plan_with(lambda t: t["sites"][0].update(public_key=public.decode()))
    source = tmp_path / "sites.yaml"
    source.write_text(yaml.safe_dump(told))
    out = tmp_path / "federation"
    kits.provision(read_plan(source), source.read_bytes(), out)
    kit = out / "sites" / "st-elsewhere"
    assert not (kit / "node.key").exists() and (out / "sites" / "county-general" / "node.key").exists()
    (known,) = (out / "server" / "keys").glob("st-elsewhere.*.pub")
    assert known.read_bytes().split()[:2] == public.split()[:2]
    with pytest.raises(ConfigError, match="new public_key"):
        change.rotate_site(out, "st-elsewhere")
    told["sites"][0]["public_key"] = site_key("mine")[1].decode()
    (out / "sites.yaml").write_text(yaml.safe_dump(told))
    change.rotate_site(out, "st-elsewhere")
    (known,) = (out / "server" / "keys").glob("st-elsewhere.*.pub")
    assert known.read_text().split()[1] == told["sites"][0]["public_key"].split()[1]
    assert not (kit / "node.key").exists()


def test_a_key_that_was_revoked_comes_back_under_no_name_and_an_attempt_that_was_cut_off_revokes_none(
    made, tmp_path, monkeypatch
):
    out, (_, public) = copied(made, tmp_path), site_key("mine")
    told = plan_with(lambda t: t["sites"].append(
        {"name": "mercy", "state_dir": "/srv/sc", "public_key": public.decode()}
    ))  # fmt: skip
    (out / "sites.yaml").write_text(yaml.safe_dump(told))
    with monkeypatch.context() as patch:
        patch.setattr(change, "new_folder", lambda kit: (_ for _ in ()).throw(KeyboardInterrupt))
        kits.write_site_key(read_plan(out / "sites.yaml").site("mercy"), out, out / "server" / "keys")
        with pytest.raises(KeyboardInterrupt):
            change.add(out, "mercy")
    change.add(out, "mercy")
    assert keys(out) == [["county-general", "mercy", "st-elsewhere"], []]
    change.revoke(out, "mercy")
    told["sites"][2]["name"] = "mercy-again"
    (out / "sites.yaml").write_text(yaml.safe_dump(told))
    before = contents(out)
    with pytest.raises(ConfigError, match="was revoked; it has to make a new one"):
        change.add(out, "mercy-again")
    assert contents(out) == before
