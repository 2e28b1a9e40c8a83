"""A TCP relay that keeps what passes in clear text, and reads it: HTTP/1.1, protobuf, Flower's objects.

What cannot be read whole is an error: a wire that is compressed or framed otherwise in a later Flower must
not look like one without a word on it.
"""

import contextlib
import select
import socket
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

PULL = b"/v1/fleet/pull-messages"


@dataclass
class Line:
    """One connection: what the site said, and what it heard."""

    up: bytearray = field(default_factory=bytearray)
    down: bytearray = field(default_factory=bytearray)


@dataclass(frozen=True)
class Message:
    """A request or an answer: its first line and headers, and its body as it was before any coding."""

    head: bytes
    body: bytes

    @property
    def path(self) -> str:
        """Of a request."""
        return self.head.split(b" ", 2)[1].decode()


class Tap:
    """Relay to ``upstream`` and keep all lines; ``before_pull`` runs before the site may ask for more work.

    Args:
        upstream: ``host:port``.
    """

    def __init__(self, upstream: str):
        self.upstream, self.lines = upstream, list[Line]()
        self.before_pull: Callable[[], None] = lambda: None
        self.errors: list[Exception] = []
        self._stop, self._threads = threading.Event(), list[threading.Thread]()

    def __enter__(self) -> "Tap":
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.1)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._serve)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in list(self._threads):
            thread.join()
        self._listener.close()

    def _start(self, work: Callable[..., None], *args: object) -> None:
        self._threads.append(threading.Thread(target=work, args=args))
        self._threads[-1].start()

    def _serve(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                client, _ = self._listener.accept()
                self._start(self._carry, client)

    def _carry(self, near: socket.socket) -> None:
        host, port = self.upstream.split(":")
        line = Line()
        self.lines.append(line)
        with contextlib.suppress(OSError), near, socket.create_connection((host, int(port)), 30) as far:
            while not self._stop.is_set():
                for one in select.select([near, far], [], [], 0.1)[0]:
                    if not (data := one.recv(65536)):
                        return
                    (line.up if one is near else line.down).extend(data)
                    if one is near and PULL in data:
                        self._before()
                    (far if one is near else near).sendall(data)

    def _before(self) -> None:
        try:
            self.before_pull()
        except Exception as error:  # noqa: BLE001  in a thread: for the test to raise
            self.errors.append(error)


def messages(stream: bytes) -> list[Message]:
    """Read one direction of a connection.

    Raises:
        ValueError: a part of it is no HTTP/1.1, or coded in a way that is not known here.
    """
    found, rest = [], bytes(stream)
    while rest:
        head, end, rest = rest.partition(b"\r\n\r\n")
        if not end or b"HTTP/1.1" not in head.split(b"\r\n")[0]:
            raise ValueError(f"not HTTP/1.1: {head[:80]!r}")
        fields = dict(_fields(head))
        if fields.get(b"transfer-encoding") == b"chunked":
            body, rest = _dechunked(rest)
        else:
            size = int(fields.get(b"content-length", b"0"))
            if len(rest) < size:
                raise ValueError(f"cut off in the body of {head[:80]!r}")
            body, rest = rest[:size], rest[size:]
        found.append(Message(head, _decoded(body, fields.get(b"content-encoding", b""))))
    return found


def objects(pushed: Iterable[tuple[str, bytes]]) -> list[bytes]:
    """Join what Flower cuts: for each object with parts, the parts behind one another, less their heads.

    Args:
        pushed: (object id, content); the content's head is ``TYPE ID,ID,... LENGTH`` and a zero byte.
    """
    parts, heads = {}, []
    for name, content in pushed:
        head, _, body = content.partition(b"\0")
        parts[name] = body
        heads.append(head.split(b" ")[1].decode())
    return [b"".join(parts.get(one, b"") for one in head.split(",")) for head in heads if head]


def pushed(requests: Iterable[Message]) -> Iterator[tuple[str, bytes]]:
    """Yield id and content of the objects that a site sent."""
    from flwr.proto.message_pb2 import PushObjectRequest

    for request in requests:
        if request.path == "/v1/fleet/push-object":
            told = PushObjectRequest.FromString(request.body)
            yield told.object_id, told.object_content


def _fields(head: bytes) -> Iterator[tuple[bytes, bytes]]:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        yield name.strip().lower(), value.strip().lower()


def _dechunked(rest: bytes) -> tuple[bytes, bytes]:
    body = b""
    while True:
        size, end, rest = rest.partition(b"\r\n")
        count = int(size.split(b";")[0], 16) if end else 0
        if not end or len(rest) < count + 2:
            raise ValueError("cut off in a chunk")
        body, rest = body + rest[:count], rest[count + 2 :]
        if count == 0:
            return body, rest


def _decoded(body: bytes, coding: bytes) -> bytes:
    if coding in (b"", b"identity"):
        return body
    if coding not in (b"gzip", b"deflate"):
        raise ValueError(f"content-encoding {coding!r}: cannot be read here")
    return zlib.decompressobj(47).decompress(body)
