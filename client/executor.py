"""``flower-superexec`` as a hospital starts it: a client process that need not import torch first.

Flower starts a program for every message, and its imports take longer than a small site's training. So one
process of this node imports once what training needs (``warm``) and forks for each message. What is forked is
``client/sentinel.py``, the same as in the cold, with nothing of an earlier message in it: the process that
forks has never seen one. Where it is dead, or ``SPARSECONTRAST_WARM=no``, Flower's way is gone.

What is here holds for Flower 1.41; ``tests/test_executor.py`` fails if Flower starts its programs otherwise.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

VARIABLE = "SPARSECONTRAST_WARM"  # "no": a cold process for each message
PROGRAM = "flwr-clientapp"
# what a message is answered with; they bring the libraries with them
MODULES = (
    "client.sentinel", "flwr.supernode.runtime.run_clientapp", "flwr.supernode.cli.flwr_clientapp",
    "client.app", "client.rounds", "client.site", "sparsecontrast.trainers", "sparsecontrast.deltas",
    "sparsecontrast.egress", "sparsecontrast.approval", "sparsecontrast.release", "sparsecontrast.progress",
    "sparsecontrast.data.cache", "sparsecontrast.data.index", "sparsecontrast.data.sites", "pandas",
)  # fmt: skip


def main() -> None:
    """Run Flower's program; the arguments are its own."""
    template = None if os.environ.get(VARIABLE) == "no" else Template()
    if template is not None:
        start_with(template, importlib.import_module("flwr.supercore.superexec.executor.subprocess_executor"))
    importlib.import_module("flwr.supercore.cli").flower_superexec()


class Template:
    """A process from which client processes are forked.

    To be made by a process of one thread. It ends when this one ends, in whatever way.
    """

    def __init__(self) -> None:
        ours, its = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            serve(its)
            os._exit(0)
        its.close()
        self._lines = ours.makefile("rw", encoding="utf-8")

    def start(self, arguments: Sequence[str]) -> int | None:
        """Fork a client process.

        Args:
            arguments: of ``flwr-clientapp``.

        Returns:
            Its process id, or None: the template is dead, and nothing was started.
        """
        if self._lines.closed:
            return None
        with contextlib.suppress(OSError):
            print(json.dumps(list(arguments)), file=self._lines, flush=True)
            if line := self._lines.readline():
                return int(line)
        with contextlib.suppress(OSError):
            self._lines.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        print(f"{PROGRAM}: started in the cold, the process to fork from has ended", file=sys.stderr)
        return None


def serve(channel: socket.socket) -> None:
    """Fork a client process for each line of arguments, until the other end is closed.

    It returns in the process that forks; a forked one leaves it by ``SystemExit``.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the node's to hear
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a client: the kernel does
    warm()
    lines = channel.makefile("rw", encoding="utf-8")
    for line in lines:
        pid = os.fork()
        if pid == 0:
            lines.close()
            channel.close()
            become(json.loads(line))
        try:
            print(pid, file=lines, flush=True)
        except OSError:
            return


def warm() -> None:
    """Import what a message needs, and keep Python's collector from touching, so copying, what is shared."""
    # asking CUDA itself how many devices there are would spoil it for a forked process
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    for name in MODULES:
        importlib.import_module(name)
    importlib.import_module("sparsecontrast.config").compose([])  # Hydra looks for its plugins once
    gc.collect()
    gc.freeze()


def become(arguments: Sequence[str]) -> None:
    """Be the client process: answer one message and end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(15, PROGRAM.encode(), 0, 0, 0)  # PR_SET_NAME: what ps and top call it
    sys.argv = [PROGRAM, *arguments]
    importlib.import_module("client.sentinel").main()
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


if __name__ == "__main__":
    main()
