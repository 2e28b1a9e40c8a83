"""Nodes that are none of the federation's: each is turned away, for its own reason, and the real one gets in.

All are copies of one registered hospital's kit with one thing wrong. The one with nothing wrong goes the same
way, through a front of its own, so that it is not the way that is refused.
"""

import contextlib
import functools
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from benchmarks.fault_cases.case import Case, Found, expect
from benchmarks.fault_cases.fronts import passing_on
from simulation.deploy import LET_IN, Deployment
from sparsecontrast.provision.authority import new_authority, server_pem, site_key

SITE = "east"  # registered, and not started
PATIENCE = 180.0  # seconds
IN_ORDER = "in order"
CERTIFICATES = ("wrong name", "expired", "wrong authority")
PLAIN = ("plain HTTP", "plain HTTP, with the key")
KINDS = (IN_ORDER, *CERTIFICATES, "unregistered key", *PLAIN)


class Strangers:
    """Kits with one thing wrong, beside a running SuperLink.

    Args:
        federation: started, with ``SITE`` registered.
        stack: closes the fronts.
    """

    def __init__(self, federation: Deployment, stack: contextlib.ExitStack):
        self.federation, self.stack = federation, stack

    def kit(self, kind: str) -> Path:
        """Make the kit of one kind."""
        if kind in (IN_ORDER, *CERTIFICATES):
            front = passing_on(self._pem(kind), self.federation.plan.server.bind)
            return copy_of(self.federation, SITE, kind, SUPERLINK=self.stack.enter_context(front))
        kit = copy_of(self.federation, SITE, kind)
        if kind == "unregistered key":
            (kit / "node.key").write_bytes(site_key(SITE)[0])
            return kit
        script = kit / "supernode.sh"
        secret = "--root-certificates ca.crt"
        keys = f"{secret} \\\n    --auth-supernode-private-key node.key"
        old, new = (secret, "--insecure") if "key" in kind else (keys, "--insecure --max-wait-time 3")
        text = script.read_text()
        assert old in text, "the start script has changed"
        script.write_text(text.replace(old, new))
        return kit

    def refused(self, kind: str) -> str:
        """Start a node of one kind; returns how it ended, ``LET_IN`` where it got in."""
        if kind == IN_ORDER:  # its key is a real node's, which may not have said goodbye
            self.federation.let_in(kind, self.kit(kind) / "supernode.sh")
            self.federation.end_one(kind)
            return LET_IN
        code = outcome(self.federation, kind, self.kit(kind))
        if code == LET_IN:
            return LET_IN
        expect(code not in (0, None), f"neither in nor out: {code}")
        text = self.federation.log(kind).read_text(errors="replace")
        expect(
            kind not in CERTIFICATES or "certificate" in text.lower(), f"for another reason: {text[-200:]}"
        )
        return f"exit status {code}"

    def _pem(self, kind: str) -> Path:
        folder, ours = self.federation.folder, self.federation.kits.authority()
        names, days, now = ("127.0.0.1",), 30, None
        if kind == "wrong name":
            names = ("fl.example.org", "127.0.0.2")
        if kind == "expired":
            now = datetime.now(UTC) - timedelta(days=60)
        signer = new_authority("loopback", 30) if kind == "wrong authority" else ours
        path = folder / f"{kind}.pem"
        path.write_bytes(server_pem(signer, names, days, now))
        return path


@contextlib.contextmanager
def cases(folder: Path, quick: bool) -> Iterator[list[Case]]:
    """Give the cases; every process ends with the block."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def strangers() -> Strangers:
            made = Deployment(folder / str(time.time_ns()), ("north", SITE), patients=8)
            federation = stack.enter_context(made)
            federation.provision()
            federation.start(())
            return Strangers(federation, stack)

        def of(kind: str) -> Case:
            def work(_: Path) -> Found:
                found = strangers().refused(kind)
                expect((found == LET_IN) == (kind == IN_ORDER), f"{kind}: {found}")
                return {"found": "let in, as it should be" if found == LET_IN else f"turned away, {found}"}

            return Case("transport", "nothing wrong" if kind == IN_ORDER else kind, work)

        yield [of(kind) for kind in KINDS]


def copy_of(federation: Deployment, site: str, name: str, **settings: str) -> Path:
    """Copy a site's kit, with other settings, under another name."""
    kit = shutil.copytree(federation.kits.site(site), federation.folder / "strangers" / name)
    text = (kit / "settings.env").read_text()
    for key, value in settings.items():
        text = re.sub(rf"(?m)^{key}=.*$", f"{key}={value}", text)
    (kit / "settings.env").write_text(text)
    return Path(kit)


def outcome(federation: Deployment, name: str, kit: Path) -> str | int | None:
    """Start a kit: ``LET_IN`` where the SuperLink knew it, and it is stopped then; else its exit status."""

    def known() -> bool:
        return LET_IN in federation.log(name).read_text(errors="replace")

    process, deadline = federation.launch(name, kit / "supernode.sh"), time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if known():
            federation.end_one(name)
            return LET_IN
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            return LET_IN if known() else process.returncode
    return None
