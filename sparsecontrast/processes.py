"""Worker processes: one thread each, and none that outlives its parent."""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# torch, BLAS and OpenMP read these when they are imported: two threads in two workers cost 4x the time
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@contextmanager
def one_thread() -> Iterator[None]:
    """Start the processes within with one thread each."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def follow_parent() -> None:
    """End this worker when its parent is killed, even in the middle of its work."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
