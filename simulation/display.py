"""What a person sees of a local run: a live bar on a terminal, the server's plain lines elsewhere."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from simulation.grid import LocalGrid

FLOWER = "flwr"  # the logger that the server app speaks through
NOISE = "aggregate_train:"  # Flower's own line a round, said better by ours


@contextmanager
def shown_grid(
    node_configs: list[dict[str, Any]], workers: int, rounds: int
) -> Iterator[tuple[LocalGrid, Callable[[], AbstractContextManager[None]]]]:
    """Start a local grid; yields it and a context manager under which its rounds are shown."""
    bar = _Bar(len(node_configs), rounds) if sys.stderr.isatty() else None
    with LocalGrid(node_configs, workers, on_event=bar.event if bar else None) as grid:
        yield grid, lambda: _lines(bar)


class _Bar:
    """Answers of the round at hand, and rounds."""

    def __init__(self, sites: int, rounds: int):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self.answers = self.progress.add_task("sites trained", total=sites * rounds)

    def event(self, event: str, kind: str) -> None:
        """Advance when a site has answered."""
        if kind == "train" and event != "sent":
            self.progress.advance(self.answers)


class _AboveTheBar(logging.Handler):
    """Print records on the console of a live bar, which makes room for them."""

    def __init__(self, console: Any):
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        self.console.print(record.getMessage(), style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _lines(bar: _Bar | None) -> Iterator[None]:
    """Let Flower's logger write plain lines, above the bar where there is one."""
    logger = logging.getLogger(FLOWER)
    handler: logging.Handler = logging.StreamHandler(sys.stdout)
    if bar is not None:
        handler = _AboveTheBar(bar.progress.console)
        bar.progress.start()
    handler.setLevel(logging.INFO)
    # an error ends the run and is said once, at the end
    handler.addFilter(lambda r: r.levelno < logging.ERROR and not r.getMessage().startswith(NOISE))
    before = list(logger.handlers)
    logger.handlers = [handler]
    try:
        yield
    finally:
        logger.handlers = before
        if bar is not None:
            bar.progress.stop()
