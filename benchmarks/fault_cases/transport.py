"""Nodes that are none of the federation's: each is turned away, for its own reason, and the real one gets in.

All are copies of one registered hospital's kit with one thing wrong. The one with nothing wrong goes the same
way, through a front of its own, so that it is not the way that is refused. A node may end for many reasons, a
torn kit among them, so that it ended proves nothing: its log must give the reason that belongs to its kind,
and the SuperLink's log must agree.
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

from cryptography.hazmat.primitives import serialization

from benchmarks.fault_cases.case import Case, Found, expect
from benchmarks.fault_cases.fronts import passing_on
from simulation.deploy import LET_IN, Deployment
from sparsecontrast.provision.authority import new_authority, server_pem, site_key

SITE = "east"  # registered, and not started
PATIENCE = 180.0  # seconds
IN_ORDER = "in order"
CERTIFICATES = ("wrong name", "expired", "wrong authority")
PLAIN = ("plain HTTP", "plain HTTP, with the key")
UNREGISTERED = "unregistered key"
KINDS = (IN_ORDER, *CERTIFICATES, UNREGISTERED, *PLAIN)
# Flower's exit code and what its node says, in Flower 1.41; the process itself ends with 1 whatever happened
REASONS = {
    "wrong name": (305, "certificate verify failed: IP address mismatch"),
    "expired": (305, "certificate verify failed: certificate has expired"),
    "wrong authority": (305, "certificate verify failed: unable to get local issuer certificate"),
    UNREGISTERED: (305, "Failed to activate SuperNode"),  # why, the SuperLink alone writes
    "plain HTTP": (305, "Server disconnected without sending a response"),
    "plain HTTP, with the key": (303, "SuperNode authentication requires a secure TLS connection"),
}
UNKNOWN_KEY = "No SuperNode found with the given public key"
ADMITTED = ("[Fleet.ActivateNode] Activated", "/v1/fleet/register-node")  # neither may stand there


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
        if kind == UNREGISTERED:
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
        """Start a node of one kind; returns why it was turned away, ``LET_IN`` where it got in.

        Raises:
            BrokenPromiseError: it neither got in nor ended, or it ended for another reason than its own.
        """
        if kind == IN_ORDER:  # its key is a real node's, which may not have said goodbye
            self.federation.let_in(kind, self.kit(kind) / "supernode.sh")
            self.federation.end_one(kind)
            return LET_IN
        kit, logs = self.kit(kind), [self.federation.log(name) for name in (kind, "superlink")]
        before = [log.stat().st_size if log.exists() else 0 for log in logs]
        code = outcome(self.federation, kind, kit)
        if code == LET_IN:
            return LET_IN
        expect(code not in (0, None), f"neither in nor out: {code}")
        new = zip(logs, before, strict=True)
        said, heard = (log.read_bytes()[size:].decode(errors="replace") for log, size in new)
        return reason(kind, said, heard, kit / "node.key")

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
                return {"found": "let in, as it should be" if found == LET_IN else f"turned away: {found}"}

            return Case("transport", "nothing wrong" if kind == IN_ORDER else kind, work)

        yield [of(kind) for kind in KINDS]


def reason(kind: str, said: str, heard: str, key: Path) -> str:
    """Read off both logs why a node of one kind was turned away.

    Args:
        kind: one of ``REASONS``.
        said: what the node's log has since it was started.
        heard: what the SuperLink's log has since then.
        key: the node's private key.

    Raises:
        BrokenPromiseError: it ended for another reason, or the SuperLink's log does not agree.
    """
    code, words = REASONS[kind]
    flat = " ".join(said.split())
    expect(f"Exit Code: {code} " in flat and words in flat, f"ended for another reason: {flat[-250:]}")
    expect(not [w for w in ADMITTED if w in heard], f"the SuperLink let somebody in: {heard[-250:]}")
    if kind == UNREGISTERED:
        named = f"{public_pem(key)!r}, exception: {UNKNOWN_KEY}"
        expect(named in heard, f"the SuperLink did not refuse this key: {heard[-250:]}")
        words = UNKNOWN_KEY
    return f"{words} (Flower's exit code {code})"


def public_pem(key: Path) -> bytes:
    """Return the public half of a private key in OpenSSH's format, as the SuperLink's log spells it."""
    private = serialization.load_ssh_private_key(key.read_bytes(), None)
    kind = serialization.PublicFormat.SubjectPublicKeyInfo
    return private.public_key().public_bytes(serialization.Encoding.PEM, kind)


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
