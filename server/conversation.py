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

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from server.log import say, warn
from server.strategy import quorum
from sparsecontrast.errors import FederationError
from sparsecontrast.settings import FederationConfig

HELLO, TRAIN = "query.hello", "train"
POLL_SECONDS = (0.02, 0.5)  # between pulls: at first, and at most
FETCH_SECONDS = 2.0  # for one answer, before the others are asked for again
SAY_SECONDS = 10.0  # between lines while waiting
SETTLE_SECONDS = 10.0  # without a new node, when as many as wanted have answered but not all can be used
_CODE = re.compile(r"[a-z][a-z_]{0,39}")
_NAME = re.compile(r"[^\x00-\x1f/\\]{1,64}")
_ADVICE = {
    "backbone_mismatch": " (its backbone differs from the server's: same version of the code?)",
    "silent": " (no answer within federation.connect_timeout)",
    "duplicate_name": " (two nodes bear this name; every site needs its own)",
}


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
    answers, pending, started = Answers(), {}, time.monotonic()
    for name, (node, content) in letters.items():
        message = Message(content, dst_node_id=node, message_type=kind, ttl=timeout, group_id=group)
        for message_id in grid.push_messages([message]):  # alone: the order of ids is then no question
            if message_id:
                pending[message_id] = name
    unsent = set(letters) - set(pending.values())
    pause, most = POLL_SECONDS
    sleep = getattr(grid, "idle", time.sleep)  # a local grid feeds its workers meanwhile
    fetching = _Fetching(grid)
    while pending and time.monotonic() - started < timeout:
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
        if pending:
            sleep(pause)
    answers.silent.extend(sorted(unsent | set(pending.values())))
    return answers


class _Fetching:
    """Fetches answers so that none holds up the others, or the round.

    Flower's grid hands an answer on when all of it is there, and once its first part is, waits for the rest:
    for three minutes after each part, whatever the deadline.
    """

    def __init__(self, grid: Grid):
        self._grid = grid
        self._started: dict[str, Future[list[Message]]] = {}

    def take(self, message_id: str, seconds: float) -> list[Message]:
        """Return the answer to a message, or nothing yet; waits for at most ``seconds``, and once."""
        if hasattr(self._grid, "idle"):  # a local one: answers are whole, workers are fed by this thread
            return list(self._grid.pull_messages([message_id]))
        if message_id not in self._started:
            self._started[message_id] = Future()
            fetch = contextvars.copy_context().run
            threading.Thread(target=fetch, args=(self._fetch, message_id), daemon=True).start()
            wait([self._started[message_id]], min(seconds, FETCH_SECONDS))
        if not self._started[message_id].done():
            return []
        return self._started.pop(message_id).result()

    def _fetch(self, message_id: str) -> None:
        future = self._started[message_id]
        try:
            future.set_result(list(self._grid.pull_messages([message_id])))
        except BaseException as error:  # noqa: BLE001  for the thread that waits
            future.set_exception(error)


def connect(grid: Grid, config: FederationConfig, fingerprint: str, overrides: str) -> dict[str, int]:
    """Greet nodes as they connect, and keep the sites that train the same backbone.

    Args:
        grid: Flower's.
        config: ``sites``, ``min_sites``, ``connect_timeout``.
        fingerprint: of the server's backbone.
        overrides: the run's configuration, from which a site builds its own backbone.

    Returns:
        Node id by site name, sorted by name, at most ``sites`` of them.

    Raises:
        FederationError: fewer usable sites than the quorum in time; names the others with codes.
    """
    hello = RecordDict({"config": ConfigRecord({"overrides": overrides})})
    deadline, said = time.monotonic() + config.connect_timeout, -SAY_SECONDS
    sites: dict[str, int] = {}
    excluded: dict[str, str] = {}
    greeted: set[int] = set()
    news = time.monotonic()
    while len(sites) < config.sites and (left := deadline - time.monotonic()) > 0:
        fresh = sorted(set(grid.get_node_ids()) - greeted)
        greeted |= set(fresh)
        if fresh:
            answers = ask(grid, {f"node {n}": (n, hello) for n in fresh}, HELLO, left, "hello")
            _admit(answers, {f"node {n}": n for n in fresh}, fingerprint, sites, excluded)
            news = time.monotonic()
        elif len(sites) + len(excluded) >= config.sites and time.monotonic() - news >= SETTLE_SECONDS:
            break
        elif time.monotonic() - said >= SAY_SECONDS:
            said = time.monotonic()
            say(f"waiting for {config.sites} sites: {len(sites)} ready on {len(greeted)} node(s)")
        else:
            time.sleep(POLL_SECONDS[1])
    return _chosen(sites, excluded, len(greeted), config)


def status_of(reply: RecordDict) -> tuple[str, str]:
    """Read a reply's status record: (site name or "", error code or ""); nothing in it is trusted."""
    record = reply.config_records.get("status", {})
    name, code = str(record.get("site", "")), str(record.get("code", ""))
    name = name if _NAME.fullmatch(name) else ""
    if record.get("status") == "ok":
        return name, ""
    return name, code if _CODE.fullmatch(code) else "malformed"


def _admit(
    answers: Answers, nodes: dict[str, int], fingerprint: str, sites: dict[str, int], excluded: dict[str, str]
) -> None:
    """File the sites of fresh nodes under ``sites`` or, with a code, under ``excluded``."""
    excluded |= answers.errors | dict.fromkeys(answers.silent, "silent")
    for label, reply in answers.replies.items():
        for name, code in _greeting(reply, fingerprint, label):
            if name in sites or name in excluded:
                sites.pop(name, None)
                excluded[name] = "duplicate_name"
            elif code:
                excluded[name] = code
            else:
                sites[name] = nodes[label]


def _greeting(reply: RecordDict, fingerprint: str, label: str) -> list[tuple[str, str]]:
    """Return each site of a node and why it cannot take part, "" if it can."""
    name, code = status_of(reply)
    if code:
        return [(name or label, code)]
    record = reply.config_records["status"]
    if record.get("idle"):
        return []
    names = record.get("sites")
    if not isinstance(names, list) or not all(isinstance(n, str) and _NAME.fullmatch(n) for n in names):
        return [(label, "malformed")]
    code = "" if record.get("fingerprint") == fingerprint else "backbone_mismatch"
    return [(str(n), code) for n in names]


def _chosen(
    sites: dict[str, int], excluded: dict[str, str], nodes: int, config: FederationConfig
) -> dict[str, int]:
    for name, code in sorted(excluded.items()):
        advice = _ADVICE.get(code, " (see client.log in its state folder)")
        warn(f"{name} is left out of this run: {code}{advice}")
    names = sorted(sites)[: config.sites]
    needed = quorum(config)
    if len(names) < needed:
        codes = [f"{list(excluded.values()).count(c)} x {c}" for c in sorted(set(excluded.values()))]
        raise FederationError(
            f"{len(names)} usable site(s) on {nodes} node(s), {needed} are needed (federation.min_sites, "
            f"{config.strategy}); left out: {', '.join(codes) or 'none'}"
        )
    if len(names) < config.sites:
        warn(f"{len(names)} of {config.sites} sites are ready; going on with them")
    if len(names) < len(sites):
        warn(f"federation.sites={config.sites}: not used: {', '.join(sorted(sites)[config.sites :])}")
    say(f"{len(names)} sites: {', '.join(names)}")
    return {name: sites[name] for name in names}
