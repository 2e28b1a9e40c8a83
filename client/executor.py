"""``flower-superexec`` as a hospital starts it: a client process that need not import torch first.

Flower starts a program for every message, and its imports take longer than a small site's training. So one
process of this node, the template, imports once what training needs (``warm``) and forks for each message.
What is forked is ``client/sentinel.py``, as in the cold, with nothing of an earlier message in it: the
template has never seen one. Until it is ready, where it is dead or does not answer, where the installed code
has changed since, and with ``SPARSECONTRAST_WARM=no``, Flower's own way is gone.

What is here holds for Flower 1.41; ``tests/test_executor.py`` fails if Flower starts its programs otherwise.
"""

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

VARIABLE = "SPARSECONTRAST_WARM"  # "no": a cold process for each message
PROGRAM = "flwr-clientapp"
ANSWER_SECONDS = 5.0  # for a fork, which takes some milliseconds
NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"
SET_NAME, SET_DUMPABLE = 15, 4  # of prctl(2)
READY = "ready"
# what a message is answered with; they bring the libraries with them
MODULES = (
    "client.sentinel", "flwr.supernode.runtime.run_clientapp", "flwr.supernode.cli.flwr_clientapp",
    "client.app", "client.rounds", "client.site", "sparsecontrast.federated.images",
    "sparsecontrast.trainers", "sparsecontrast.deltas",
    "sparsecontrast.egress", "sparsecontrast.approval", "sparsecontrast.release", "sparsecontrast.statuses",
    "sparsecontrast.progress",
    "sparsecontrast.data.cache", "sparsecontrast.data.index", "sparsecontrast.data.sites", "pandas",
)  # fmt: skip


def main() -> None:
    """Run Flower's program; the arguments are its own."""
    # started in the background of a shell it would not hear that its SuperNode has ended, and stay for good
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.get(VARIABLE) != "no":
        os.environ["HF_HUB_OFFLINE"] = "1"  # as in the sentinel: the template imports its client
        start_with(
            Template(), importlib.import_module("flwr.supercore.superexec.executor.subprocess_executor")
        )
    importlib.import_module("flwr.supercore.cli").flower_superexec()


class Template:
    """The process from which client processes are forked.

    To be made by a process of one thread. It ends when this one ends, in whatever way.
    """

    def __init__(self) -> None:
        self._code = installed()
        self._channel, its = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            self._channel.close()
            serve(its)
            os._exit(0)
        its.close()
        self._ready, self._over = False, False

    def start(self, arguments: Sequence[str]) -> int | None:
        """Fork a client process.

        Args:
            arguments: of ``flwr-clientapp``.

        Returns:
            Its process id, or None: nothing was started.
        """
        if self._over:
            return None
        try:
            if not self._ready and not self._hear(0):
                return None  # still at its imports
            self._ready = True
            if installed() != self._code:
                return self._end("the installed code has changed; restart the node to have it warm again")
            self._channel.sendall(json.dumps(list(arguments)).encode() + b"\n")
            if line := self._hear(ANSWER_SECONDS):
                return int(line)
        except (OSError, ValueError):
            pass
        return self._end("the process to fork from has ended, or does not answer")

    def _hear(self, seconds: float) -> str:
        """A line from the template, or nothing within the time.

        Raises:
            OSError: it has ended.
        """
        if not select.select([self._channel], [], [], seconds)[0]:
            return ""
        if not (line := self._channel.recv(64)):
            raise BrokenPipeError
        return line.decode().strip()

    def _end(self, why: str) -> None:
        """Take no more from it; what it forked goes on."""
        self._over = True
        self._channel.close()
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        print(f"{PROGRAM}: started in the cold from now on: {why}", file=sys.stderr, flush=True)


def installed() -> list[tuple[str, int, int]]:
    """Name the code that a cold process would run: our files, and the folder where pip puts packages."""
    found = []
    for name in ("client", "sparsecontrast", "flwr"):
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        package = Path(spec.origin).parent
        found += [package.parent] if name == "flwr" else sorted(package.rglob("*.py"))
    return [(str(path), told.st_mtime_ns, told.st_size) for path in found for told in (path.stat(),)]


def serve(channel: socket.socket) -> None:
    """Fork a client process for each line of arguments, until the other end is closed.

    It returns in the process that forks; a forked one leaves it by ``SystemExit``.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the node's to hear
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a client: the kernel does
    _prctl(SET_DUMPABLE, 0)  # as Flower's SuperExec: no other process of this user reads or writes its memory
    # torch would ask CUDA itself how many devices there are, which spoils it for a forked process
    ours = NVML not in os.environ
    os.environ.setdefault(NVML, "1")
    warm()
    lines = channel.makefile("rw", encoding="utf-8")
    _say(lines, READY)
    for line in lines:
        pid = os.fork()
        if pid == 0:
            lines.close()
            channel.close()
            if ours:
                del os.environ[NVML]
            become(json.loads(line))
        _say(lines, pid)


def _say(lines: TextIO, word: object) -> None:
    with contextlib.suppress(OSError):  # the other end is gone: the next line says so
        print(word, file=lines, flush=True)


def warm() -> None:
    """Import what a message needs, and keep Python's collector from touching, so copying, what is shared."""
    for name in MODULES:
        importlib.import_module(name)
    importlib.import_module("sparsecontrast.config").compose([])  # Hydra looks for its plugins once
    gc.collect()
    gc.freeze()


def become(arguments: Sequence[str]) -> None:
    """Be the client process: answer one message and end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _prctl(SET_NAME, PROGRAM.encode())  # what ps and top call it
    importlib.import_module(
        "numpy"
    ).random.seed()  # its global state is not the template's, hence everybody's
    sentinel = importlib.import_module("client.sentinel")
    sys.modules["__main__"] = (
        sentinel  # what a worker process imports first: a bundle need not know this file
    )
    sys.argv = [PROGRAM, *arguments]
    sentinel.main()
    sys.exit(0)


def start_with(template: Template, module: Any) -> None:
    """Let Flower's executor fork where it would start ``flwr-clientapp``.

    Args:
        template: to fork from.
        module: ``flwr.supercore.superexec.executor.subprocess_executor``.
    """
    cold = module.subprocess

    def popen(command: list[str], **how: Any) -> Any:
        pid = template.start(command[1:]) if command[0] == PROGRAM else None
        return cold.Popen(command, **how) if pid is None else pid

    module.subprocess = SimpleNamespace(Popen=popen, DEVNULL=cold.DEVNULL)


def _prctl(option: int, value: Any) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    main()
