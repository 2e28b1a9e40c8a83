"""``flower-supernode`` as a hospital starts it: one that asks for work every second.

Flower's waits three seconds between two questions, and a round waits for the last of its sites. What is here
holds for Flower 1.41; ``tests/test_executor.py`` fails if Flower waits otherwise.
"""

import importlib
import time
from types import SimpleNamespace
from typing import Any

POLL_SECONDS = 1.0


def main() -> None:
    """Run Flower's program; the arguments are its own."""
    hurry(importlib.import_module("flwr.supernode.start_client_internal"))
    importlib.import_module("flwr.supernode.cli").flower_supernode()


def hurry(module: Any) -> None:
    """Shorten what a module of Flower sleeps to ``POLL_SECONDS``.

    Args:
        module: ``flwr.supernode.start_client_internal``.
    """
    around = {**vars(time), "sleep": lambda seconds: time.sleep(min(seconds, POLL_SECONDS))}
    module.time = SimpleNamespace(**around)


if __name__ == "__main__":
    main()
