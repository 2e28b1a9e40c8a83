"""Releases that wait for a person: ``pending/`` in a site's folder, and the decision as a file beside it.

A release is shown as what the log would say of it, and as the array itself, to be looked into. A decision is
about what was shown, not about a round: its name ends with the SHA-256 of that, and the decision holds all of
it, so that another answer to the same round is another release. Silence is an answer too: after
``wait_seconds`` it is held back for good, and the server hears a code.
"""

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparsecontrast.durable import write_bytes
from sparsecontrast.errors import ConfigError, HeldError

FOLDER = "pending"
POLL_SECONDS = 0.2
SHORT = 12  # hex digits of the digest that a release's name ends with
_ID = re.compile(r"[0-9a-zA-Z_-]{1,96}")  # a run key may have 64 digits


def wait_for_approval(
    folder: Path, release: str, facts: Mapping[str, Any], flat: np.ndarray, seconds: float
) -> None:
    """Return when a person has approved.

    Args:
        folder: of the site.
        release: its name, of letters, digits, - and _; it waits as ``release-DIGEST``.
        facts: what the log will say, the SHA-256 of the array included.
        flat: the array that would leave.
        seconds: to wait at most.

    Raises:
        HeldError: it was denied, nobody answered, or what was approved is something else.
        StorageError: it could not be shown.
    """
    pending, shown = Path(folder) / FOLDER, digest(facts)
    release = f"{release}-{shown[:SHORT]}"
    files = {end: pending / f"{release}.{end}" for end in ("json", "npy", "approved", "denied")}
    for end in ("approved", "denied"):  # of an earlier attempt: that was another release
        files[end].unlink(missing_ok=True)
    pending.mkdir(parents=True, exist_ok=True)
    np.save(files["npy"], flat, allow_pickle=False)
    write_bytes(files["json"], json.dumps(facts, indent=1).encode())
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            if files["approved"].exists():
                _compare(files["approved"].read_text(errors="replace").strip(), shown, release)
                return
            if files["denied"].exists():
                raise HeldError(f"{release}: denied by a person at this site")
            time.sleep(POLL_SECONDS)
        raise HeldError(f"{release}: nobody approved it within {seconds:g} s")
    finally:
        for file in files.values():
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)


def waiting(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what waits at a site: facts by name of the release."""
    found = {}
    for file in sorted((Path(folder) / FOLDER).glob("*.json")):
        with contextlib.suppress(OSError, ValueError):  # decided in this very moment
            found[file.stem] = json.loads(file.read_bytes())
    return found


def digest(facts: Mapping[str, Any]) -> str:
    """SHA-256 of what a person is shown; by its own ``sha256`` it covers the array."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def decide(folder: Path, release: str, approve: bool, sha256: str | None = None) -> None:
    """Approve or deny a release that waits, as it is shown in this moment.

    Args:
        folder: of the site.
        release: its name, as ``waiting`` has it.
        approve: or deny.
        sha256: of what was looked at, as ``digest`` has it, its first eight digits at least.

    Raises:
        ConfigError: nothing of that name waits, or what waits is not what was looked at.
    """
    found = waiting(folder)
    if not _ID.fullmatch(release) or release not in found:
        known = ", ".join(found) or "nothing"
        raise ConfigError(f"{release[:80]!r}: does not wait in {Path(folder) / FOLDER}; waiting: {known}")
    shown = digest(found[release])
    if sha256 is not None and not (len(sha256) >= 8 and shown.startswith(sha256.lower())):
        raise ConfigError(
            f"--sha256 {sha256[:64]}: {release} is {shown}: look at it again; nothing was decided"
        )
    write_bytes(Path(folder) / FOLDER / f"{release}.{'approved' if approve else 'denied'}", shown.encode())


def _compare(approved: str, shown: str, release: str) -> None:
    if approved != shown:
        raise HeldError(f"{release}: what was approved is {approved[:64] or 'not named'}, this is {shown}")
