"""Talk to the sites over a Flower Grid, with time-outs of our own.

Flower's reply list does not say who is missing, and waiting for nodes has no end. So every message
is pushed alone, replies are pulled by message id until a deadline, and whoever stays silent is
known by name.
"""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from server.log import say, warn
from sparsecontrast.config import FederationConfig
from sparsecontrast.errors import FederationError

HELLO, TRAIN = "query.hello", "train"
POLL_SECONDS = (0.02, 0.5)  # between pulls: at first, and at most
_CODE = re.compile(r"[a-z][a-z_]{0,39}")
_NAME = re.compile(r"[^\x00-\x1f/\\]{1,64}")


@dataclass(frozen=True)
class Answers:
    """What came back from a set of nodes.

    Attributes:
        replies: content by node id.
        errors: node id -> code, for nodes that answered with an error.
        silent: node ids that did not answer in time.
        seconds: node id -> time until its answer was here.
    """

    replies: dict[int, RecordDict] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    silent: list[int] = field(default_factory=list)
    seconds: dict[int, float] = field(default_factory=dict)


def ask(grid: Grid, contents: Mapping[int, RecordDict], kind: str, timeout: float, group: str) -> Answers:
    """Send one message to each node and collect the answers until ``timeout`` seconds have passed.

    Args:
        grid: Flower's.
        contents: node id -> content.
        kind: message type.
        timeout: seconds; also the messages' time to live, so nobody works on a stale one.
        group: Flower's group id, the round.
    """
    answers, pending, started = Answers(), {}, time.monotonic()
    for node, content in contents.items():
        message = Message(content, dst_node_id=node, message_type=kind, ttl=timeout, group_id=group)
        for message_id in grid.push_messages([message]):  # alone: the order of ids is then no question
            if message_id:
                pending[message_id] = node
    unsent = set(contents) - set(pending.values())
    pause, most = POLL_SECONDS
    while pending and time.monotonic() - started < timeout:
        arrived = [m for m in grid.pull_messages(list(pending)) if m.metadata.reply_to_message_id in pending]
        for message in arrived:
            node = pending.pop(message.metadata.reply_to_message_id)
            answers.seconds[node] = time.monotonic() - started
            _sort(message, node, answers)
        pause = POLL_SECONDS[0] if arrived else min(2 * pause, most)
        if pending:
            time.sleep(pause)
    answers.silent.extend(sorted(unsent | set(pending.values())))
    return answers


def connect(grid: Grid, config: FederationConfig, fingerprint: str, overrides: str) -> dict[str, int]:
    """Wait for the sites, greet them, and keep those that train the same backbone.

    Args:
        grid: Flower's.
        config: ``sites``, ``min_sites``, ``connect_timeout``.
        fingerprint: of the server's backbone.
        overrides: the run's configuration, from which a site builds its own backbone.

    Returns:
        Node id by site name, sorted by name, at most ``sites`` of them.

    Raises:
        FederationError: fewer than ``min_sites`` usable sites in time; names the others with codes.
    """
    nodes = _wait_for_nodes(grid, config)
    hello = RecordDict({"config": ConfigRecord({"overrides": overrides})})
    answers = ask(grid, dict.fromkeys(nodes, hello), HELLO, config.connect_timeout, "hello")
    excluded = {f"node {node}": code for node, code in answers.errors.items()}
    excluded |= {f"node {node}": "silent" for node in answers.silent}
    sites: dict[str, int] = {}
    for node, reply in answers.replies.items():
        name, code = _greeting(reply, fingerprint, f"node {node}")
        if name in sites or name in excluded:
            code = "duplicate_name"
            sites.pop(name, None)
        if code:
            excluded[name] = code
        else:
            sites[name] = node
    for name, code in sorted(excluded.items()):
        warn(f"{name} is left out of this run: {code}{_advice(code)}")
    chosen = sorted(sites)[: config.sites]
    if len(chosen) < len(sites):
        warn(f"federation.sites={config.sites}: not used: {', '.join(sorted(sites)[config.sites :])}")
    if len(chosen) < config.min_sites:
        raise FederationError(
            f"{len(chosen)} usable site(s) of {len(nodes)} node(s), federation.min_sites={config.min_sites} "
            f"are needed; left out: {excluded or 'none'}"
        )
    say(f"{len(chosen)} sites: {', '.join(chosen)}")
    return {name: sites[name] for name in chosen}


def status_of(reply: RecordDict) -> tuple[str, str]:
    """Read a reply's status record: (site name or "", error code or ""); nothing in it is trusted."""
    record = reply.config_records.get("status", {})
    name, code = str(record.get("site", "")), str(record.get("code", ""))
    name = name if _NAME.fullmatch(name) else ""
    if record.get("status") == "ok":
        return name, ""
    return name, code if _CODE.fullmatch(code) else "malformed"


def _sort(message: Message, node: int, answers: Answers) -> None:
    """File a reply; an error's text stays unread, it may hold what must not be logged here."""
    if message.has_error():
        answers.errors[node] = f"flower_{message.error.code}"
    else:
        answers.replies[node] = message.content


def _wait_for_nodes(grid: Grid, config: FederationConfig) -> list[int]:
    deadline, said = time.monotonic() + config.connect_timeout, 0.0
    while len(nodes := sorted(grid.get_node_ids())) < config.sites and time.monotonic() < deadline:
        if time.monotonic() - said > 10:
            say(f"waiting for {config.sites} sites, {len(nodes)} connected")
            said = time.monotonic()
        time.sleep(POLL_SECONDS[1])
    if len(nodes) < config.sites:
        warn(
            f"{len(nodes)} of {config.sites} sites connected within {config.connect_timeout:g} s; going on "
            'with them. In a simulation set --federation-config "num-supernodes=..." or federation.sites'
        )
    return nodes


def _greeting(reply: RecordDict, fingerprint: str, fallback: str) -> tuple[str, str]:
    """Return the site's name and why it cannot take part, "" if it can."""
    name, code = status_of(reply)
    if not name:
        return fallback, code or "malformed"
    if not code and reply.config_records["status"].get("fingerprint") != fingerprint:
        code = "backbone_mismatch"
    return name, code


def _advice(code: str) -> str:
    return {
        "backbone_mismatch": " (its backbone differs from the server's: same version of the code?)",
        "config": " (see client.log in the site's state folder)",
        "silent": " (no answer within federation.connect_timeout)",
        "duplicate_name": " (two nodes bear this name; every site needs its own)",
    }.get(code, "")
