"""The server's kit: what its proxy lets through, and what its script registers."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparsecontrast.provision import change, kits
from sparsecontrast.provision.plan import read_plan

EXAMPLE = Path(__file__).parents[1] / "docs" / "sites.example.yaml"
SITES = ("st-elsewhere", "county-general")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One federation that no test changes."""
    out = tmp_path_factory.mktemp("provision") / "federation"
    kits.provision(read_plan(EXAMPLE), EXAMPLE.read_bytes(), out)
    return out


def passed_on(text, path):
    """What nginx asks of the SuperLink for a path, decoded and normalised; None where it answers 404."""
    for rule in re.finditer(r"location (=|~|/)(.*?) \{(.*?)\n    \}", text, re.S):
        kind, pattern, body = rule[1], rule[2].strip(), rule[3]
        upstream = re.search(r"proxy_pass https://127\.0\.0\.1:9092(\S+);", body)
        if kind == "/":
            assert "return 404;" in body and upstream is None
        elif kind == "=" and path == pattern:
            return upstream[1]
        elif kind == "~" and (found := re.search(pattern.replace("(?<", "(?P<"), path)):
            assert "limit_except POST { deny all; }" in body
            return upstream[1].replace("$call", found["call"])
    return None


def test_the_proxy_lets_the_fleet_api_through_and_nothing_that_submits_or_executes(made):
    """Against every route of the SuperLink that is installed."""
    from fastapi.routing import iter_route_contexts
    from flwr.superlink.main import create_app

    text = (made / "server" / "nginx.conf").read_text()
    assert text.count("location ") == 3
    paths = {str(c.route.path) for c in iter_route_contexts(create_app().routes)}
    fleet = {p for p in paths if p.startswith("/v1/fleet/")}
    told = {path: passed_on(text, path) for path in paths}
    assert len(fleet) >= 10 and {p for p in paths if told[p]} == fleet | {"/health"}
    assert all(told[path] == path for path in fleet | {"/health"})
    submits = {"/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/push-task-output", "/docs"}
    assert submits <= paths
    for odd in (
        "/v1/fleet/../control/start-run",
        "/v1/fleet/",
        "/v1/fleet/a/b",
        "/x/v1/fleet/get-run",
        "/V1/fleet/a",
    ):
        assert passed_on(text, odd) is None
    # a line break, which an expression's end overlooks, would split the request to the SuperLink
    assert passed_on(text, "/v1/fleet/get-run\n") == "/v1/fleet/get-run"
    assert passed_on(text, "/v1/fleet/get-run\nX: y") is None


# A SuperLink in a file: key -> [id, status]. Like Flower it takes no key, and unregisters no node, twice.
FAKE_FLWR = f"""#!{sys.executable}
import json, os, sys
from pathlib import Path
state, told = Path(os.environ["NODES"]), sys.argv[1:]
nodes = json.loads(state.read_text())
with open(os.environ["CALLS"], "a") as calls:
    calls.write(" ".join(told) + chr(10))
if "ANSWER" in os.environ:
    print(os.environ["ANSWER"])
    sys.exit(int(os.environ["STATUS"]))
if told[1] == "register":
    key = Path(told[2]).read_text().split()[1]
    if key in nodes:
        sys.exit("Public key already in use.")
    nodes[key] = [str(17701455668394613840 + len(nodes)), "registered"]
    print(json.dumps({{"success": True, "node-id": int(nodes[key][0])}}))
else:
    found = [key for key, node in nodes.items() if node == [told[2], "registered"]]
    if not found:
        sys.exit("already deleted, not found")
    nodes[found[0]][1] = "unregistered"
state.write_text(json.dumps(nodes))
"""
# asked for the servers' health: always well; for server.nodes: what that file holds
FAKE_PYTHON = f"""#!{sys.executable}
import json, os, sys
from pathlib import Path
if "server.nodes" in sys.argv:
    if os.environ.get("SILENT"):
        sys.exit(1)
    nodes = json.loads(Path(os.environ["NODES"]).read_text())
    files = [p for p in map(Path, sys.argv[sys.argv.index("server.nodes") + 2:]) if p.exists()]
    for path in files:
        key = (path.read_text().split() + ["", ""])[1]
        if not key:
            print(path, "-", "unreadable")
        elif key in nodes:
            print(path, *nodes[key])
    known = {{path.read_text().split()[1] for path in files if len(path.read_text().split()) > 1}}
    for key, (number, status) in nodes.items():
        if key not in known and status != "unregistered":
            print("-", number, status)
"""
FIRST, SECOND = "17701455668394613840", "17701455668394613841"


@pytest.fixture
def server(made, tmp_path):
    """The server's kit, with a ``flwr`` that notes what it is asked, and servers that are always healthy."""
    out = Path(shutil.copytree(made, tmp_path / "federation"))
    commands = tmp_path / "bin"
    commands.mkdir()
    told = {"flwr": FAKE_FLWR, "python3": FAKE_PYTHON, "flower-superlink": "#!/bin/sh\n"}
    for name, text in told.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    calls, nodes = tmp_path / "calls", tmp_path / "nodes.json"
    nodes.write_text("{}")

    def register(**more):
        calls.write_text("")
        environment = {"PATH": f"{commands}:/usr/bin:/bin", "CALLS": str(calls), "NODES": str(nodes), **more}
        done = subprocess.run(
            ["sh", str(out / "server" / "register.sh")],
            env=environment,
            cwd="/",
            capture_output=True,
            text=True,
        )
        return done.returncode, calls.read_text().splitlines(), done.stdout + done.stderr

    return out, register


def test_registration_makes_flowers_list_what_the_folders_say_and_does_nothing_twice(server):
    out, register = server
    code, calls, _ = register()
    assert code == 0 and len(calls) == 2
    for call, name in zip(calls, sorted(SITES), strict=True):
        assert re.fullmatch(
            rf"supernode register keys/{name}\.\w+\.pub chest --name {name} --format json", call
        )
    assert register()[:2] == (0, [])
    change.rotate_site(out, "st-elsewhere")
    code, calls, _ = register()
    assert code == 0 and calls[0] == f"supernode unregister {SECOND} chest"
    assert calls[1].startswith("supernode register keys/st-elsewhere.") and len(calls) == 2
    change.revoke(out, "st-elsewhere")
    assert register()[:2] == (0, ["supernode unregister 17701455668394613842 chest"])
    assert register()[:2] == (0, [])
    assert (
        'root-certificates = "' + str(out / "server" / "ca.crt")
        in (out / "server/flower/config.toml").read_text()
    )


@pytest.mark.parametrize(("answer", "status"), [("", "1"), ("{}", "0"), ("key in use", "1")])
def test_a_registration_that_failed_is_told_and_tried_again(server, answer, status):
    out, register = server
    code, calls, said = register(ANSWER=answer, STATUS=status)
    assert code == 1 and len(calls) == 2 and all(name in said for name in SITES)
    assert not list((out / "server" / "registered").iterdir())
    assert len(register()[1]) == 2


def key_of(out, name, folder="keys"):
    (found,) = (out / "server" / folder).glob(f"{name}.*.pub")
    return found


def test_a_revoked_site_whose_id_was_lost_is_turned_away_all_the_same(server):
    out, register = server
    register()
    shutil.rmtree(out / "server" / "registered")
    change.revoke(out, "county-general")
    code, calls, said = register()
    assert (code, calls) == (0, [f"supernode unregister {FIRST} chest"])
    assert f"node {FIRST} is turned away" in said
    assert [path.name.split(".")[0] for path in (out / "server/registered").glob("*.id")] == ["st-elsewhere"]
    assert register()[:2] == (0, [])


@pytest.mark.parametrize("lost", [True, False], ids=["id lost", "id kept"])
def test_without_an_answer_a_revoked_site_is_turned_away_by_its_id_or_it_is_told_that_it_is_not(server, lost):
    out, register = server
    register()
    key = key_of(out, "county-general")
    if lost:
        (out / "server" / "registered" / f"{key.stem}.id").unlink()
    change.revoke(out, "county-general")
    code, calls, said = register(SILENT="1")
    assert code == 1 and "did not say which nodes" in said
    assert calls == ([] if lost else [f"supernode unregister {FIRST} chest"])
    assert ("county-general" in said and "STILL LET IN" in said and "supernode list" in said) == lost


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("before", [True, False], ids=["registered before", "never registered"])
def test_a_key_that_both_folders_hold_is_revoked_and_keeps_no_other_out(server, before, renamed):
    """Copied to the SuperLink's machine without deletion, keys/ still holds what was revoked."""
    out, register = server
    if before:
        register()
    key = key_of(out, "county-general")
    kept = key.read_bytes()
    change.revoke(out, "county-general")
    (key.with_name("another.0123456789ab.pub") if renamed else key).write_bytes(kept[:-1] + b" comment\n")
    change.rotate_site(out, "st-elsewhere")
    code, calls, said = register()
    assert code == 0 and "in keys/ and in revoked/: not registered" in said
    registered = [call for call in calls if "supernode register" in call]
    assert len(registered) == 1 and "keys/st-elsewhere." in registered[0]
    assert [call for call in calls if f"unregister {FIRST}" in call] == (
        [f"supernode unregister {FIRST} chest"] if before else []
    )
    assert register()[:2] == (0, [])


def test_a_key_that_is_none_keeps_no_other_from_being_registered(server):
    out, register = server
    (out / "server" / "keys" / "a-site.0.pub").write_text("nonsense\n")
    code, calls, said = register()
    assert code == 1 and "a-site.0: keys/a-site.0.pub is no public key" in said
    assert [call.split()[2].split(".")[0] for call in calls] == ["keys/county-general", "keys/st-elsewhere"]


def test_a_node_whose_key_has_vanished_from_both_folders_is_told(server):
    """keys/ was copied with deletion, and revoked/ was forgotten."""
    out, register = server
    register()
    change.revoke(out, "county-general")
    shutil.rmtree(out / "server" / "revoked")
    code, calls, said = register()
    assert (code, calls) == (1, []) and f"unregister {FIRST} chest" in said


def test_a_superlink_that_lost_its_database_learns_all_keys_again(server, tmp_path):
    _, register = server
    register()
    (tmp_path / "nodes.json").write_text("{}")
    code, calls, _ = register()
    assert code == 0 and len(calls) == 2


def test_an_unregistering_that_failed_is_told(server):
    out, register = server
    register()
    change.revoke(out, "county-general")
    code, calls, said = register(ANSWER="no", STATUS="1")
    assert code == 1 and calls == [f"supernode unregister {FIRST} chest"] and "STILL LET IN" in said
    assert register()[:2] == (0, calls)


def test_nodes_are_told_by_their_keys(made, tmp_path, capsys, monkeypatch):
    """Against the bytes that Flower itself makes of a key file, as it does when one is registered."""
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.proto.node_pb2 import NodeInfo

    from server import nodes

    (known, gone), bad = sorted((made / "server" / "keys").glob("*.pub")), tmp_path / "bad.pub"
    bad.write_text("nonsense\n")
    told = [
        NodeInfo(node_id=int(FIRST), status="online", public_key=try_load_public_key(known)),
        NodeInfo(node_id=5, status="unregistered", public_key=try_load_public_key(gone)),
        NodeInfo(node_id=6, status="offline", public_key=b"of nobody"),
        NodeInfo(node_id=7, status="unregistered", public_key=b"of nobody else"),
    ]
    monkeypatch.setattr(nodes, "ask", lambda connection: print("Flower talks") or told)
    assert nodes.main(["chest", str(known), str(gone), str(bad), "missing/*.pub"]) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(
        [f"{bad} - unreadable", f"{known} {FIRST} online", f"{gone} 5 unregistered", "- 6 offline"]
    )
    monkeypatch.undo()
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    assert nodes.main(["no-such-connection", str(known)]) == 1
    assert "no-such-connection" in capsys.readouterr().err
