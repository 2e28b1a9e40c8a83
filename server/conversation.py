"""Talk to the sites over a Flower Grid, with time-outs of our own.

Flower's reply list does not say who is missing, and waiting for nodes has no end. So every message
is pushed alone, replies are pulled by message id until a deadline, and whoever stays silent is
known by name. A site is addressed by its name: in a simulation with few SuperNodes one node serves
several sites.
"""

import contextvars
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

TRAIN = "train"
POLL_SECONDS = (0.02, 0.5)  # between pulls: at first, and at most
FETCH_SECONDS = (0.5, 2.0)  # for one answer before the others are asked for again: at least, and at most
_CODE = re.compile(r"[a-z][a-z_]{0,39}")
NAME = re.compile(r"[^\x00-\x1f/\\]{1,64}")


@dataclass(frozen=True)
class Answers:
    """What came back, by the name under which it was asked.

    Attributes:
        replies: contents, or what ``ask`` was told to make of them.
        errors: codes of answers that are Flower's errors.
        silent: who did not answer in time.
        seconds: time until each answer was here.
    """

    replies: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    silent: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def ask(
    grid: Grid,
    letters: Mapping[str, tuple[int, RecordDict]],
    kind: str,
    timeout: float,
    group: str,
    read: Callable[[str, RecordDict], Any] = lambda name, content: content,
) -> Answers:
    """Send one message for each name and collect the answers until ``timeout`` seconds have passed.

    Answers are fetched one by one, so that one is in memory at a time if ``read`` keeps none; but for those
    that take their time to arrive, whose sites may have lost their line.

    Args:
        grid: Flower's.
        letters: (node id, content) by name.
        kind: message type.
        timeout: seconds; also the messages' time to live, so nobody works on a stale one.
        group: Flower's group id, the round.
        read: makes of a name and a content what is kept of an answer.
    """
    started = time.monotonic()
    pending = send(grid, letters, kind, timeout, group)
    unsent = set(letters) - set(pending.values())
    answers = collect(grid, pending, started, timeout, read)
    answers.silent.extend(sorted(unsent | set(pending.values())))
    return answers


def send(
    grid: Grid, letters: Mapping[str, tuple[int, RecordDict]], kind: str, ttl: float, group: str
) -> dict[str, str]:
    """Send one message for each name; returns the name by message id, of those that could be sent.

    Args:
        grid: Flower's.
        letters: (node id, content) by name.
        kind: message type.
        ttl: seconds after which nobody works on it any more.
        group: Flower's group id.
    """
    pending = {}
    for name, (node, content) in letters.items():
        message = Message(content, dst_node_id=node, message_type=kind, ttl=ttl, group_id=group)
        for message_id in grid.push_messages([message]):  # alone: the order of ids is then no question
            if message_id:
                pending[message_id] = name
    return pending


def collect(
    grid: Grid,
    pending: dict[str, str],
    started: float,
    timeout: float,
    read: Callable[[str, RecordDict], Any] = lambda name, content: content,
    fetching: "Fetching | None" = None,
) -> Answers:
    """Take the answers that come until ``timeout`` seconds have passed; once, where they have already.

    Args:
        grid: Flower's.
        pending: of ``send``; what is answered is removed from it.
        started: moment that seconds count from, as ``time.monotonic`` tells it.
        timeout: seconds.
        read: as in ``ask``.
        fetching: for who collects again what did not arrive in time; by default that is given up.
    """
    answers = Answers()
    pause, most = POLL_SECONDS
    sleep = getattr(grid, "idle", time.sleep)  # a local grid feeds its workers meanwhile
    fetching = fetching or Fetching(grid)
    while pending:
        before = len(pending)
        for message_id in list(pending):
            for message in fetching.take(message_id, timeout - (time.monotonic() - started)):
                if message.metadata.reply_to_message_id != message_id or message_id not in pending:
                    continue
                name = pending.pop(message_id)
                answers.seconds[name] = time.monotonic() - started
                if message.has_error():  # its text stays unread: it may hold what must not be logged here
                    answers.errors[name] = f"flower_{message.error.code}"
                else:
                    answers.replies[name] = read(name, message.content)
        pause = POLL_SECONDS[0] if len(pending) < before else min(2 * pause, most)
        if time.monotonic() - started >= timeout:
            break
        if pending:
            sleep(pause)
    return answers


class Fetching:
    """Fetches answers so that none holds up the others, or the round.

    Flower's grid hands an answer on when all of it is there, and once its first part is, waits for the rest:
    for three minutes after each part, whatever the deadline.
    """

    def __init__(self, grid: Grid):
        self._grid = grid
        self._started: dict[str, Future[list[Message]]] = {}

    def take(self, message_id: str, seconds: float) -> list[Message]:
        """Return the answer to a message, or nothing yet.

        Args:
            message_id: of the message.
            seconds: to wait, within ``FETCH_SECONDS``; the first time alone.
        """
        if hasattr(self._grid, "idle"):  # a local one: answers are whole, workers are fed by this thread
            return list(self._grid.pull_messages([message_id]))
        if message_id not in self._started:
            self._started[message_id] = Future()
            fetch = contextvars.copy_context().run
            threading.Thread(target=fetch, args=(self._fetch, message_id), daemon=True).start()
            least, most = FETCH_SECONDS
            wait([self._started[message_id]], max(least, min(seconds, most)))
        if not self._started[message_id].done():
            return []
        return self._started.pop(message_id).result()

    def _fetch(self, message_id: str) -> None:
        future = self._started[message_id]
        try:
            future.set_result(list(self._grid.pull_messages([message_id])))
        except BaseException as error:  # noqa: BLE001  for the thread that waits
            future.set_exception(error)


def status_of(reply: RecordDict) -> tuple[str, str]:
    """Read a reply's status record: (site name or "", error code or ""); nothing in it is trusted."""
    record = reply.config_records.get("status", {})
    name, code = str(record.get("site", "")), str(record.get("code", ""))
    name = name if NAME.fullmatch(name) else ""
    if record.get("status") == "ok":
        return name, ""
    return name, code if _CODE.fullmatch(code) else "malformed"
