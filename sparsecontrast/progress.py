"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

QUIET_SECONDS = 5.0  # between two plain lines


@contextlib.contextmanager
def progress(title: str, total: int, show: bool = True) -> Iterator[Callable[[str], None]]:
    """Yield ``tick(text)``, to be called once for each of ``total`` pieces of work.

    Both forms go to stderr, so a table on stdout stays clean. With ``show`` false nothing is written.
    """
    if not show:
        yield lambda text: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.fields[title]}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TextColumn("{task.fields[text]}", markup=False))  # fmt: skip
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=total, title=title, text="")
            yield lambda text: bar.update(task, advance=1, text=text)
    else:
        yield _plain_lines(title, total)


def _plain_lines(title: str, total: int) -> Callable[[str], None]:
    done, spoken = 0, 0.0

    def tick(text: str) -> None:
        nonlocal done, spoken
        done += 1
        if done == total or time.monotonic() - spoken >= QUIET_SECONDS:
            spoken = time.monotonic()
            print(f"{title}: {done}/{total} {text}".rstrip(), file=sys.stderr, flush=True)

    return tick


def track(items: Iterable[Item], total: int, title: str, enabled: bool = True) -> Iterator[Item]:
    """Pass ``items`` on, lazily, and show how many of ``total`` have come."""
    with progress(title, total, enabled and total > 0) as tick:
        for item in items:
            yield item
            tick("")
