"""A tiny federation of phantoms on a local grid, and the wire between its sites and the server.

The grid is the simulation's, with its worker processes and its bytes; ``Wire`` stands where a network
would, and loses, holds back, repeats or rewrites what passes. The server knows nothing of it.
"""

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict

from benchmarks.fault_cases.answers import copy
from simulation.grid import SERVER_NODE, LocalGrid
from sparsecontrast import overrides

TINY = (
    "backbone.img_size=32", "backbone.patch_size=4", "backbone.depth=1", "method.projection_hidden=32",
    "method.projection_dim=16", "train.batch_size=4", "data.min_images=2",
)  # fmt: skip
Delivery = tuple[bool, Message]  # at once, or only when the site is asked again; and what is then delivered


class Trouble:
    """What the wire does to one round's message of one site; this one does nothing.

    Attributes:
        recorded: whether the wire keeps a copy of every answer.
    """

    recorded = True

    def lost(self, site: str, round_number: int) -> bool:
        """Whether the server's message never arrives."""
        return False

    def deliver(self, site: str, round_number: int, reply: Message) -> list[Delivery]:
        """Return what reaches the server in place of a site's reply, and whether at once."""
        return [(True, reply)]


class Wire(LocalGrid):
    """A grid whose training messages pass through ``trouble``.

    Attributes:
        arrived: each site's own answers, by site and round, as they were before any trouble.
        unasked: answers delivered when nobody waited for them any more.
    """

    trouble = Trouble()

    def reset(self, trouble: Trouble) -> None:
        """Begin a run with a wire of its own."""
        self.trouble = trouble
        self.asked: dict[str, tuple[str, int]] = {}
        self.due: list[Message] = []
        self.held: list[tuple[str, Message]] = []
        self.stray: list[Message] = []
        self.arrived: dict[tuple[str, int], Message] = {}
        self.unasked = 0

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send what the wire does not lose; the sender cannot tell."""
        ids = []
        for message in messages:
            told = message.content.config_records.get("config", {})
            site, number = str(told.get("site", "")), int(str(told.get("round", 0)))
            if site and self.trouble.lost(site, number):
                ids.append(f"lost-{site}-{number}")
                continue
            self.stray += [reply for of, reply in self.held if of == site]
            self.held = [(of, reply) for of, reply in self.held if of != site]
            (one,) = super().push_messages([message])
            ids.append(one)
            self.asked[one] = (site, number)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Deliver what is due, also what nobody waits for any more."""
        for reply in super().pull_messages(list(self.asked)):
            site, number = self.asked.pop(reply.metadata.reply_to_message_id)
            if not site:
                self.due.append(reply)
                continue
            if self.trouble.recorded:
                self.arrived[site, number] = copy(reply)  # the server empties what it has read
            for at_once, told in self.trouble.deliver(site, number, reply):
                if at_once:
                    self.due.append(told)
                else:
                    self.held.append((site, told))
        wanted = set(message_ids)
        given = [reply for reply in self.due if reply.metadata.reply_to_message_id in wanted]
        self.due = [reply for reply in self.due if reply.metadata.reply_to_message_id not in wanted]
        given += self.stray
        self.unasked += len(self.stray)
        self.stray = []
        return given


def nodes(count: int) -> list[dict[str, Any]]:
    """Node configs of so many simulated sites."""
    return [{"partition-id": i, "num-partitions": count} for i in range(count)]


def words(folder: Path, sites: int, *more: str) -> list[str]:
    """Overrides of a tiny run of phantoms; runs beside each other share one cache."""
    base = [
        *TINY, "data=phantom", f"data.phantom.sites={sites}", "data.phantom.patients_per_site=8",
        f"federation.sites={sites}", "federation.connect_timeout=900",
        "federation.update_norm=none",  # a round must be the mean of whole updates, see answers.py
        overrides.assign("output_dir", folder / "run"),
        overrides.assign("data.cache_dir", folder.parent / "cache"),
    ]  # fmt: skip
    return overrides.merge(base, list(more))


def serve(
    wire: Wire, told: Sequence[str], trouble: Trouble | None = None, run: Path | None = None
) -> list[dict[str, Any]]:
    """Run the ServerApp over the wire to its end; returns the rows of ``metrics.jsonl``.

    Args:
        wire: between the server and its sites.
        told: overrides of the run.
        trouble: on the wire.
        run: its folder, where ``told`` is not of pretraining.

    Raises:
        SparseContrastError: why the run failed.
    """
    from server.app import app

    wire.reset(trouble or Trouble())
    context = Context(wire.run.run_id, SERVER_NODE, {}, RecordDict(), {"overrides": overrides.join(told)})
    app(wire, context)
    return rows(run or folder_of(told))


def folder_of(told: Sequence[str]) -> Path:
    """Where a run writes."""
    from sparsecontrast.config import compose

    config = compose(list(told))
    return Path(config.resume or config.output_dir)


def rows(run: Path) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl``."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def whole_rounds(told: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep the rows of whole rounds."""
    return [row for row in told if row["site"] is None]


@contextlib.contextmanager
def when_used(sites: int, log: Path) -> Iterator[Callable[[], Wire]]:
    """Give a function that starts a grid of so many sites at its first call; the block ends it."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def wire() -> Wire:
            stack.enter_context(quiet(log))
            one = Wire(nodes(sites), 1)
            stack.callback(one.close)
            return one

        yield wire


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Keep Flower's log in a file: a fault is loud, and its table is what is read."""
    logger = logging.getLogger("flwr")
    before = list(logger.handlers)
    log.parent.mkdir(parents=True, exist_ok=True)
    log_file = logging.FileHandler(log)
    logger.handlers = [log_file]
    try:
        yield
    finally:
        logger.handlers = before
        log_file.close()
