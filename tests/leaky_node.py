"""``python -m tests.leaky_node``: a SuperExec whose app tells what its guard never sees.

To the greeting it adds an array that Flower cuts in the middle of the word; to the answer of each round a
record, written in another way each time. The server drops both: they are on the wire, which is what counts.
"""

import base64
import gzip
import zlib

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message

from client import executor, sentinel
from tests.search import canary

LEAK = canary("what a leaking site tells")
CHUNK = 1 << 16  # bytes; where Flower cuts, as the kit says
_WORD = f"/ward/{LEAK.token}^Jane.dcm".encode()
WAYS = (
    _WORD,
    _WORD.decode().encode("utf-16"),
    base64.b64encode(b"." + _WORD),
    _WORD.hex().upper().encode(),
    zlib.compress(_WORD),
    base64.b64encode(gzip.compress(_WORD, mtime=0)),
)


def leak(message: Message, context: Context) -> Message:
    """Answer as the installed app does, and say more."""
    from client.app import app

    reply = app(message, context)
    number = message.content.config_records["config"].get("round")
    if number is None:
        data = b"\0" * (CHUNK - 8) + LEAK.token.encode() + b"\0" * CHUNK
        reply.content["more"] = ArrayRecord({"x": Array("uint8", (len(data),), "numpy.ndarray", data)})
    else:
        reply.content["more"] = ConfigRecord({"x": WAYS[(int(str(number)) - 1) % len(WAYS)]})
    return reply


if __name__ == "__main__":
    sentinel._installed_app = lambda *_: leak
    executor.main()
