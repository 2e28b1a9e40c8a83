"""TLS servers of one's own making: with any certificate, any clock, before any server."""

import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

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
        server.socket = _context(pem).wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@contextlib.contextmanager
def passing_on(pem: Path, upstream: str, heard: bytearray | None = None) -> Iterator[str]:
    """Stand before a TLS server with another certificate; whoever accepts it gets through.

    ``heard`` is given every byte that clients send, in clear text.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.1)
    stop, threads = threading.Event(), []

    def serve():
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                client, _ = listener.accept()
                threads.append(threading.Thread(target=_carry, args=(client, pem, upstream, stop, heard)))
                threads[-1].start()

    threads.append(threading.Thread(target=serve))
    threads[0].start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    stop.set()
    for thread in list(threads):
        thread.join()
    listener.close()


def _carry(
    client: socket.socket, pem: Path, upstream: str, stop: threading.Event, heard: bytearray | None
) -> None:
    host, port = upstream.split(":")
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    client.settimeout(10)
    with contextlib.suppress(OSError), client:
        near = _context(pem).wrap_socket(client, server_side=True)
        with socket.create_connection((host, int(port)), 10) as raw, trusting.wrap_socket(raw) as far, near:
            ends = {near: far, far: near}
            while not stop.is_set():
                for one in [e for e in ends if e.pending()] or select.select(list(ends), [], [], 0.1)[0]:
                    data = one.recv(65536)
                    if not data:
                        return
                    if one is near and heard is not None:
                        heard += data
                    ends[one].sendall(data)


def _context(pem: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    return context
