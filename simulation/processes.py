"""Processes and ports of this machine: finding, signalling, waiting."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def marked(process: Path, word: str) -> bool:
    """Whether the environment of a process, a folder of ``/proc``, holds a word; no where it is hidden."""
    try:
        return word.encode() in (process / "environ").read_bytes()
    except OSError:
        return False


def free_ports(count: int) -> list[int]:
    """Return ports on which nobody listens at this moment."""
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def send(pid: int, sent: signal.Signals) -> None:
    """Signal a process, which may be gone."""
    try:
        os.kill(pid, sent)
    except ProcessLookupError:
        return


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """Hear no signal within; only the main thread hears any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for sent, handler in before.items():
            signal.signal(sent, handler)


def wait_until(done: Any, seconds: float) -> None:
    """Return when ``done()`` is true, or the time is over."""
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(0.1)
