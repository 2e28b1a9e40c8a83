"""The server's kit: what its proxy lets through, and what its script registers."""

import re
import shutil
import subprocess
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


FAKE_FLWR = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$2" in register) printf '%s' "$ANSWER";; esac
exit "${STATUS:-0}"
"""


@pytest.fixture
def server(made, tmp_path):
    """The server's kit, with a ``flwr`` that notes what it is asked, and servers that are always healthy."""
    out = Path(shutil.copytree(made, tmp_path / "federation"))
    commands = tmp_path / "bin"
    commands.mkdir()
    told = {"flwr": FAKE_FLWR, "python3": "#!/bin/sh\nexit 0\n", "flower-superlink": "#!/bin/sh\n"}
    for name, text in told.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    calls = tmp_path / "calls"

    def register(answer='{"success": true, "node-id": 17701455668394613840}', status=0):
        calls.write_text("")
        environment = {
            "PATH": f"{commands}:/usr/bin:/bin",
            "CALLS": str(calls),
            "ANSWER": answer,
            "STATUS": str(status),
        }
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
    code, calls, _ = register('{"node-id": "42"}')
    assert code == 0 and calls[0] == "supernode unregister 17701455668394613840 chest"
    assert calls[1].startswith("supernode register keys/st-elsewhere.") and len(calls) == 2
    change.revoke(out, "st-elsewhere")
    assert register()[:2] == (0, ["supernode unregister 42 chest"])
    assert register()[:2] == (0, [])
    assert (
        'root-certificates = "' + str(out / "server" / "ca.crt")
        in (out / "server/flower/config.toml").read_text()
    )


@pytest.mark.parametrize(("answer", "status"), [("", 1), ("{}", 0), ("key in use", 1)])
def test_a_registration_that_failed_is_told_and_tried_again(server, answer, status):
    out, register = server
    code, calls, said = register(answer, status)
    assert code == 1 and len(calls) == 1 and "county-general" in said
    assert not list((out / "server" / "registered").iterdir())
    assert len(register()[1]) == 2
