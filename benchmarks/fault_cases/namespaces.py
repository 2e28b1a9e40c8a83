"""Machines that share a disk and nothing else: network namespaces of Linux, each on a line to a server's.

A line is a veth pair. Cut at the server's end, it loses whatever is sent into it without a word: the site's
own end stays up, and its neighbour is known for good, so that no route goes and no address is asked for. Root
makes them, or anybody within a user namespace where those are allowed. A namespace ends with its last
process; the one that holds it open ends with the process that made it, in whatever way that ends.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Sequence

from benchmarks.fault_cases.case import NotHereError

ADDRESS = "10.77.0.1"  # of the server, on every line
TOOLS = ("unshare", "nsenter", "ip")
END = "line"  # a site's end of its line


class Machines:
    """A server and sites; there until the ``with`` block is left.

    Args:
        sites: names, at most 254.

    Raises:
        NotHereError: when entered, where this machine does not allow it.
    """

    def __init__(self, sites: Sequence[str]):
        self.lines = {name: number for number, name in enumerate(sites, 1)}
        self._stack = contextlib.ExitStack()
        self._enter: dict[str | None, list[str]] = {}
        self._user: list[str] = []

    def __enter__(self) -> "Machines":
        if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
            raise NotHereError(f"no program {', '.join(missing)}")
        try:
            self._make()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def within(self, site: str | None = None) -> list[str]:
        """Words before a command that run it on a site's machine, or the server's; its process id stays."""
        return self._enter[site]

    def cut(self, site: str) -> None:
        """Let nothing pass a site's line."""
        self._ip(None, "link", "set", self._port(site), "down")

    def mend(self, site: str) -> None:
        """Let everything pass again."""
        self._ip(None, "link", "set", self._port(site), "up")

    def _make(self) -> None:
        own = [] if os.geteuid() == 0 else ["--map-root-user"]
        try:
            self._hold(None, own)
        except NotHereError:
            if own:
                raise
            own = ["--map-root-user"]  # a root that may not: of a container
            self._hold(None, own)
        self._ip(None, "address", "add", f"{ADDRESS}/32", "dev", "lo")
        self._ip(None, "link", "set", "lo", "up")
        for site, number in self.lines.items():
            pid = self._hold(site, [])
            port, server, far = self._port(site), f"10.77.{number}.1", f"10.77.{number}.2"
            self._ip(None, "link", "add", port, "type", "veth", "peer", "name", END, "netns", pid)
            self._ip(None, "address", "add", f"{server}/30", "dev", port)
            self._ip(None, "link", "set", port, "up")
            self._ip(site, "link", "set", "lo", "up")
            self._ip(site, "address", "add", f"{far}/30", "dev", END)
            self._ip(site, "link", "set", END, "up")
            self._ip(site, "route", "add", ADDRESS, "via", server)
            there = self._ip(None, "-oneline", "link", "show", port).split("link/ether ")[1].split()[0]
            self._ip(site, "neighbour", "replace", server, "lladdr", there, "dev", END, "nud", "permanent")

    def _hold(self, site: str | None, how: Sequence[str]) -> str:
        """Open a namespace, and hold it by a process that ends when this one does; returns its process id."""
        before = self._enter[None] if site else []
        process = subprocess.Popen(
            [*before, "unshare", *how, "--net", "cat"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self._stack.callback(process.communicate)  # closes its input, and waits
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(b"\n")
            process.stdin.flush()
        if not process.stdout.readline():  # the namespace is there when the line comes back
            raise NotHereError(" ".join(process.stderr.read().decode(errors="replace").split()))
        if how:
            self._user = ["--user", "--preserve-credentials"]  # the one that all namespaces here belong to
        pid = str(process.pid)
        self._enter[site] = ["nsenter", "--target", pid, *self._user, "--net"]
        return pid

    def _ip(self, site: str | None, *words: str) -> str:
        done = subprocess.run([*self.within(site), "ip", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotHereError(f"ip {' '.join(words[:3])}: {done.stderr.strip()}")
        return done.stdout

    def _port(self, site: str) -> str:
        return f"to{self.lines[site]}"
