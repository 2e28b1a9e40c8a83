"""TLS servers of one's own making, with any certificate and any clock."""

import contextlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from benchmarks.fault_cases.fronts import context
from sparsecontrast.provision.authority import Authority, server_pem


def write_pem(path: Path, authority: Authority, names=("127.0.0.1",), days=30, now=None) -> Path:
    path.write_bytes(server_pem(authority, names, days, now))
    return path


@contextlib.contextmanager
def answering(pem: Path | None, status: int = 200, seconds: float = 0.0) -> Iterator[str]:
    """Answer everything with ``status``, by a clock that goes wrong by ``seconds``; yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def date_time_string(self, timestamp=None):
            return super().date_time_string((timestamp or time.time()) + seconds)

        def log_message(self, format, *args):
            return

    class Server(ThreadingHTTPServer):
        def handle_error(self, request, client_address):
            """Say nothing of a client that turns away in the handshake."""

    server = Server(("127.0.0.1", 0), Handler)
    if pem is not None:
        server.socket = context(pem).wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()
