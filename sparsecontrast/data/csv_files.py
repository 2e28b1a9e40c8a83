"""Tables on disk that name files: whatever name a file has, what is read back opens the same file.

A name is bytes on Linux, and archives export some that are no UTF-8. Python carries such bytes through text
as lone surrogates (PEP 383, ``surrogateescape``); written the same way the table holds the name's own bytes.
Names may also hold commas, quotes and line ends of all kinds: they are quoted.
"""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from sparsecontrast.errors import StorageError

if TYPE_CHECKING:
    import pandas as pd

ESCAPED = "surrogateescape"
# RFC 4180. Also: csv quotes a lone carriage return only where line ends hold one, and it would end a row
LINE_END = "\r\n"


def write_table(frame: "pd.DataFrame", csv: Path) -> None:
    """Write a table whole or not at all, for instance a quarantine.

    Raises:
        StorageError: it cannot be written; a file that was there before is still there.
    """
    csv = Path(csv)
    try:
        csv.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{csv.name}.", dir=csv.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", errors=ESCAPED, newline="") as file:
                frame.to_csv(file, index=False, lineterminator=LINE_END)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, csv)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise StorageError(f"{csv}: cannot be written: {error.strerror}") from error


def read_table(csv: Path) -> "pd.DataFrame":
    """Read a table as text throughout: a pseudonym like 12e4567890123456 is no number.

    Raises:
        OSError: it cannot be read.
        ValueError: not a table, or a cell of another column than ``path`` is not in UTF-8.
    """
    import pandas as pd

    frame = pd.read_csv(csv, dtype=str, keep_default_na=False, encoding_errors=ESCAPED)
    for name in frame.columns:
        str(name).encode()
        if name != "path":
            "".join(frame[name]).encode()
    return frame
