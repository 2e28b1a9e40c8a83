"""The proxy of the server's kit in a real nginx: what it lets through, and a federation behind it."""

import contextlib
import functools
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks.fault_cases.fronts import context
from simulation.deploy import Deployment
from simulation.processes import free_ports
from sparsecontrast.provision import kits
from sparsecontrast.provision.plan import read_plan
from tests.test_server_kit import EXAMPLE

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/opt/homebrew/bin")
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
HOST = "fl.example.org"
AROUND = """daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{}}
http {{
    access_log {folder}/access.log; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    include {folder}/site.conf;
}}
"""


@contextlib.contextmanager
def nginx(folder, text, kit, listen, bind):
    """Serve a generated configuration, its kit and ports elsewhere; yields once it listens."""
    folder.mkdir()
    text = text.replace("/opt/sparsecontrast/kit", str(kit))
    text = re.sub(r"listen \d+ ssl", f"listen 127.0.0.1:{listen} ssl", text)
    (folder / "site.conf").write_text(
        re.sub(r"https://127\.0\.0\.1:\d+/", f"https://127.0.0.1:{bind}/", text)
    )
    (folder / "nginx.conf").write_text(AROUND.format(folder=folder))
    command = [str(NGINX), "-p", str(folder), "-c", str(folder / "nginx.conf")]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            for _ in range(200):
                assert process.poll() is None, process.stderr.read() if process.stderr else ""
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", listen)):
                    break
                time.sleep(0.05)
            yield
        finally:
            process.terminate()


@contextlib.contextmanager
def echo(pem):
    """A SuperLink that answers with what it was asked for; yields its port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            told = f"{self.command} {self.path}".encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(told)))
            self.end_headers()
            self.wfile.write(told)

        do_POST = do_PUT = do_GET  # noqa: N815

        def log_message(self, format, *args):
            return

    class Server(ThreadingHTTPServer):
        def handle_error(self, request, client_address):
            """Say nothing of a proxy that turns away in the handshake."""

    server = Server(("127.0.0.1", 0), Handler)
    server.socket = context(pem).wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def ask(port, authority, method, path):
    """Ask in so many words, as no library would: (status, body)."""
    trust = ssl.create_default_context(cafile=str(authority))
    head = f"{method} {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    with (
        socket.create_connection(("127.0.0.1", port), timeout=20) as raw,
        trust.wrap_socket(raw, server_hostname=HOST) as told,
    ):
        told.sendall(head.encode())
        answer = b""
        while more := told.recv(65536):
            answer += more
    first, _, body = answer.partition(b"\r\n\r\n")
    return int(first.split()[1]), body.decode(errors="replace")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("proxy") / "federation"
    kits.provision(read_plan(EXAMPLE), EXAMPLE.read_bytes(), out)
    return out / "server"


@pytest.fixture(scope="module")
def front(made, tmp_path_factory):
    """Ask the proxy before a SuperLink that echoes."""
    (listen,) = free_ports(1)
    folder = tmp_path_factory.mktemp("nginx") / "run"
    with (
        echo(made / "server.pem") as bind,
        nginx(folder, (made / "nginx.conf").read_text(), made, listen, bind),
    ):
        yield functools.partial(ask, listen, made / "ca.crt")


def test_the_fleet_and_health_are_passed_on_as_they_were_asked_for(front):
    assert front("POST", "/v1/fleet/pull-messages") == (200, "POST /v1/fleet/pull-messages")
    assert front("GET", "/health") == (200, "GET /health")


@pytest.mark.parametrize("path", [
    "/v1/control/start-run", "/v1/runtime/push-task-output", "/docs", "/openapi.json", "/", "/v1/fleet/",
    "/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/start-run", "/v1/fleet/..%2fcontrol%2fx",
    "/v1/fleet/%2e%2e%2fcontrol%2fstart-run", "//v1//control//start-run", "/V1/FLEET/x", "/v1/fleet/a/b",
    "/v1/fleet/x;/../../control/start-run", "/v1/fleet/get-run%0d%0aX-Evil:%20y", "/v1/fleet/get-run%00",
    "/health/../v1/control/start-run", "/%76%31/control/start-run", "/health/x",
])  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_nothing_else_reaches_the_superlink(front, method, path):
    status, body = front(method, path)
    assert status in (400, 403, 404) and "/v1/" not in body


@pytest.mark.parametrize("path", ["/v1/fleet/x/../get-run", "/v1//fleet/%67et-run", "/v1/fleet/get-run%0a"])
def test_what_was_checked_is_asked_for_and_not_what_was_written(front, path):
    assert front("POST", path) == (200, "POST /v1/fleet/get-run")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "HEAD", "TRACE"])
def test_the_fleet_takes_posts_alone(front, method):
    assert front(method, "/v1/fleet/pull-messages")[0] in (403, 405)


def test_a_superlink_of_another_authority_is_not_spoken_to(made, tmp_path):
    kits.provision(read_plan(EXAMPLE), EXAMPLE.read_bytes(), tmp_path / "other")
    (listen,) = free_ports(1)
    text = (made / "nginx.conf").read_text()
    with (
        echo(tmp_path / "other" / "server" / "server.pem") as bind,
        nginx(tmp_path / "run", text, made, listen, bind),
    ):
        assert ask(listen, made / "ca.crt", "POST", "/v1/fleet/pull-messages")[0] == 502


@pytest.mark.e2e
def test_a_federation_runs_through_it(made, tmp_path):
    with Deployment(tmp_path / "d", ("north", "south"), 4) as running:
        running.provision()
        (listen,) = free_ports(1)
        for name in running.sites:
            settings = running.kits.site(name) / "settings.env"
            told = settings.read_text()
            assert running.plan.server.address in told
            settings.write_text(told.replace(running.plan.server.address, f"127.0.0.1:{listen}"))
        text, bind = (made / "nginx.conf").read_text(), int(running.plan.server.bind.split(":")[1])
        with nginx(tmp_path / "nginx", text, running.kits.server, listen, bind):
            running.start()
            assert running.run(["federation.rounds=1"]) == "finished:completed"
        asked = (tmp_path / "nginx" / "access.log").read_text()
        assert asked.count("POST /v1/fleet/") > 10 and "/v1/control" not in asked
