"""TLS servers that stand before a real one with another certificate."""

import contextlib
import select
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def passing_on(pem: Path, upstream: str, heard: bytearray | None = None) -> Iterator[str]:
    """Stand before a TLS server with another certificate; whoever accepts it gets through.

    Args:
        pem: certificate and key.
        upstream: address of the real server.
        heard: is given every byte that clients send, in clear text.

    Yields:
        The address.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.1)
    stop, threads = threading.Event(), []

    def serve() -> None:
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                client, _ = listener.accept()
                threads.append(threading.Thread(target=_carry, args=(client, pem, upstream, stop, heard)))
                threads[-1].start()

    threads.append(threading.Thread(target=serve))
    threads[0].start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stop.set()
        for thread in list(threads):
            thread.join()
        listener.close()


def context(pem: Path) -> ssl.SSLContext:
    """A server's context with this certificate and key."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(pem)
    return made


def _carry(
    client: socket.socket, pem: Path, upstream: str, stop: threading.Event, heard: bytearray | None
) -> None:
    host, port = upstream.split(":")
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    client.settimeout(10)
    with contextlib.suppress(OSError), client:
        near = context(pem).wrap_socket(client, server_side=True)
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
