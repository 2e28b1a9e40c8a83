"""Releases that wait for a person: ``pending/`` in a site's folder, and the decision as a file beside it.

A release is shown as what the log would say of it, and as the array itself, to be looked into. Silence is
an answer too: after ``wait_seconds`` it is held back for good, and the server hears a code.
"""

import contextlib
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
_ID = re.compile(r"[0-9a-zA-Z_-]{1,80}")


def wait_for_approval(
    folder: Path, release: str, facts: Mapping[str, Any], flat: np.ndarray, seconds: float
) -> None:
    """Return when a person has approved.

    Args:
        folder: of the site.
        release: its name, of letters, digits, - and _.
        facts: what the log will say.
        flat: the array that would leave.
        seconds: to wait at most.

    Raises:
        HeldError: it was denied, or nobody answered.
        StorageError: it could not be shown.
    """
    pending = Path(folder) / FOLDER
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


def decide(folder: Path, release: str, approve: bool) -> None:
    """Approve or deny a release that waits.

    Raises:
        ConfigError: nothing of that name waits.
    """
    if not _ID.fullmatch(release) or release not in waiting(folder):
        known = ", ".join(waiting(folder)) or "nothing"
        raise ConfigError(f"{release[:80]!r}: does not wait in {Path(folder) / FOLDER}; waiting: {known}")
    write_bytes(Path(folder) / FOLDER / f"{release}.{'approved' if approve else 'denied'}", b"")
