"""``flower-supernode`` as a hospital starts it: one that asks for work soon after it has answered.

Flower's waits three seconds between two questions, and half a second between two looks for its own client's
answer; a round waits for the last of its sites. This one asks the server every second, four times a second in
the half minute after an answer, when the next message is near, and looks ten times a second for its client's,
which lies in its own memory. What is here holds for Flower 1.41; ``tests/test_executor.py`` fails if Flower
waits otherwise.
"""

import importlib
import time
from types import SimpleNamespace
from typing import Any

POLL_SECONDS = 1.0  # between questions to the server
SOON_SECONDS, SOON_FOR = 0.25, 30.0  # between them after an answer, and how long
LOOK_SECONDS = 0.1  # between looks for the own client's answer
FLOWERS_LOOK = 0.5  # what Flower sleeps there


def main() -> None:
    """Run Flower's program; the arguments are its own."""
    hurry(importlib.import_module("flwr.supernode.start_client_internal"))
    importlib.import_module("flwr.supernode.cli").flower_supernode()


def hurry(module: Any) -> None:
    """Shorten what a module of Flower sleeps.

    Args:
        module: ``flwr.supernode.start_client_internal``.
    """
    worked = -SOON_FOR  # when the client was last waited for

    def sleep(seconds: float) -> None:
        nonlocal worked
        now = time.monotonic()
        if seconds <= FLOWERS_LOOK:
            worked, pause = now, LOOK_SECONDS
        else:
            pause = SOON_SECONDS if now - worked < SOON_FOR else POLL_SECONDS
        time.sleep(min(seconds, pause))

    module.time = SimpleNamespace(**{**vars(time), "sleep": sleep})


if __name__ == "__main__":
    main()
