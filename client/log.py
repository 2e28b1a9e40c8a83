"""The site's own log: texts that never travel."""

import contextlib
import time
from pathlib import Path

LOG = "client.log"
LOG_BYTES = 1_000_000  # of client.log before it is moved to client.log.1


def note(folder: Path, text: str) -> None:
    """Append to the site's own log; whatever is wrong with log or text, no round ends for it."""
    path = folder / LOG
    with contextlib.suppress(Exception):
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > LOG_BYTES:
            path.replace(path.with_suffix(".log.1"))
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {text.rstrip()}\n")
