"""Pseudonyms: a keyed hash of an identifier, under a key that never leaves the site.

Without the key nobody can try all hospital numbers against the hashes; with it, the same patient
has the same pseudonym in every index that this site makes.
"""

import contextlib
import hashlib
import hmac
import os
import secrets
import tempfile
from pathlib import Path

from sparsecontrast.errors import StorageError

KEY_FILE = "pseudonym.key"
KEY_BYTES = 32


def load_key(state_dir: Path) -> bytes:
    """Return the site's key, making it at the first call: random, readable by its owner alone.

    The key is written whole under another name and then linked to its own, which fails if another
    process was faster; then that one's key is taken. No reader ever sees half a key.

    Raises:
        StorageError: the folder cannot be written, or the file there is no key.
    """
    file = Path(state_dir) / KEY_FILE
    try:
        if not file.exists():
            _create(file)
        key = file.read_bytes()
    except OSError as error:
        raise StorageError(f"{file}: cannot keep the site's pseudonym key: {error.strerror}") from error
    if len(key) != KEY_BYTES:
        raise StorageError(f"{file}: {len(key)} bytes are no key of {KEY_BYTES}; restore it from a backup")
    return key


def pseudonym(key: bytes, kind: str, identifier: str) -> str:
    """Return HMAC-SHA256(key, kind + ":" + identifier), its first 64 bits as 16 hexadecimal digits."""
    text = f"{kind}:{identifier}".encode(errors="surrogateescape")  # may be the name of a file
    return hmac.new(key, text, hashlib.sha256).hexdigest()[:16]


def _create(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{KEY_FILE}.", dir=file.parent)  # mode 0600
    try:
        with os.fdopen(handle, "wb") as temporary:
            temporary.write(secrets.token_bytes(KEY_BYTES))
            temporary.flush()
            os.fsync(temporary.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(name, file)
    finally:
        os.unlink(name)
