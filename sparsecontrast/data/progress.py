"""Progress of long work: a bar on a terminal, a plain line every tenth elsewhere; both on stderr."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def track(items: Iterable[Item], total: int, title: str, enabled: bool = True) -> Iterator[Item]:
    """Pass items on and show how many of ``total`` have come.

    Args:
        items: anything; consumed lazily.
        total: how many there will be.
        title: what is being done, "reading headers".
        enabled: False shows nothing.
    """
    if not enabled or total == 0:
        yield from items
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track as bar

        yield from bar(items, title, total=total, console=Console(stderr=True))
    else:
        yield from _lines(items, total, title)


def _lines(items: Iterable[Item], total: int, title: str) -> Iterator[Item]:
    told = 0
    for done, item in enumerate(items, start=1):
        if done * 10 // total > told:
            told = done * 10 // total
            print(f"{title}: {done}/{total}", file=sys.stderr, flush=True)
        yield item
