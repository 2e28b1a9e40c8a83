"""Which sites take part, and the node that answers for each: asked at the start, and before each round.

At the start nodes are waited for. Later nobody is, but a node that was not there before, for
``GREET_SECONDS``: its sites take part from that round on, or from a later one where it answers later. Who is
there and cannot take part is asked again before each round and not waited for: once in order, it joins.

A name belongs to one node. Of two that bear it at the start neither takes part. Later the one that has it
keeps it while it is there, and the other is refused; where that one is gone, the site is now at the other: so
a site comes back under a new node id.
"""

import time
from collections.abc import Iterable, Mapping

from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import Grid

from server.conversation import NAME, Fetching, collect, send, status_of
from server.log import say, warn
from server.strategy import quorum
from sparsecontrast.errors import FederationError
from sparsecontrast.settings import FederationConfig

HELLO = "query.hello"
LOOK_SECONDS = 0.5  # between looks for nodes, at the start
SAY_SECONDS = 10.0  # between lines while waiting
SETTLE_SECONDS = 10.0  # without a new node, when as many as wanted have answered but not all can be used
GREET_SECONDS = 15.0  # for the first answer of a node that came after the start
DUPLICATE, UNUSED = "duplicate_name", "unused"
_ADVICE = {
    "backbone_mismatch": " (its backbone differs from the server's: same version of the code?)",
    "silent": " (no answer to its greeting yet)",
    DUPLICATE: " (two nodes bear this name; every site needs its own)",
    UNUSED: " (there are federation.sites of them without it)",
}
Told = list[tuple[str, str]]  # a node's sites, each with why it cannot take part, "" if it can
LeftOut = list[tuple[str, int, str]]  # site, node, why


class Roll:
    """The sites of a run.

    Args:
        grid: Flower's.
        config: ``sites``, ``min_sites``, ``connect_timeout``.
        fingerprint: of the server's backbone.
        overrides: the run's configuration, from which a site builds its own backbone.

    Attributes:
        sites: node id by site name, at most ``config.sites`` of them.
    """

    def __init__(self, grid: Grid, config: FederationConfig, fingerprint: str, overrides: str):
        self.grid, self.config, self.fingerprint = grid, config, fingerprint
        self.hello = RecordDict({"config": ConfigRecord({"overrides": overrides})})
        self.fetching = Fetching(grid)
        self.sites: dict[str, int] = {}
        self.told: dict[int, Told] = {}  # by node, of those that answered
        self.known: set[int] = set()  # nodes that were greeted
        self.pending: dict[str, str] = {}  # node, as text, by the message id of a greeting without an answer
        self.named: set[tuple[str, int, str]] = set()  # who was said to be left out

    def open(self) -> None:
        """Greet nodes as they connect, until all sites are here or the time is over.

        Raises:
            FederationError: fewer usable sites than the quorum in time; names the others with codes.
        """
        wanted, started = self.config.sites, time.monotonic()
        said, news = -SAY_SECONDS, started
        found: dict[str, int] = {}
        left_out: LeftOut = []
        while len(found) < wanted and (left := started + self.config.connect_timeout - time.monotonic()) > 0:
            if fresh := set(self.grid.get_node_ids()) - self.known:
                self._greet(fresh, left, left)
                found, left_out = deal(self.told, {})
                left_out += self._silent()
                news = time.monotonic()
            elif (
                len(found) + len({n for n, _, _ in left_out}) >= wanted
                and time.monotonic() - news >= SETTLE_SECONDS
            ):
                break
            elif time.monotonic() - said >= SAY_SECONDS:
                said = time.monotonic()
                say(f"waiting for {wanted} sites: {len(found)} ready on {len(self.known)} node(s)")
            else:
                time.sleep(LOOK_SECONDS)
        self.sites = _chosen(found, left_out, len(self.known), self.config)
        unused = [(name, node, UNUSED) for name, node in found.items() if name not in self.sites]
        self.named.update(left_out, unused)

    def look(self, number: int) -> None:
        """Let who came since take part in round ``number``, and who came back under another node id."""
        here = set(self.grid.get_node_ids())
        self._forget(self.known - here)
        self._hear(time.monotonic(), 0.0)
        self._greet(self._unfit() - set(map(int, self.pending.values())), self.config.connect_timeout, 0.0)
        if fresh := here - self.known - set(self.sites.values()):
            self._greet(fresh, self.config.connect_timeout, GREET_SECONDS)
        held = {name: node for name, node in self.sites.items() if node in here}
        found, left_out = deal(self.told, held)
        left_out += self._silent()
        for name, node in found.items():
            if name in held:
                continue
            if name in self.sites:
                say(f"round {number}: {name} is back, on node {node}")
            elif len(self.sites) < self.config.sites:
                say(f"round {number}: {name} joins, {len(self.sites) + 1} of {self.config.sites} sites")
            else:
                left_out.append((name, node, UNUSED))
                continue
            self.sites[name] = node
        for name, node, why in left_out:
            if (name, node, why) not in self.named:
                who = name if name == _label(node) else f"{name} on node {node}"
                warn(f"round {number}: {who} is left out: {why}{_advice(why)}")
        self.named.update(left_out)

    def _greet(self, nodes: Iterable[int], ttl: float, timeout: float) -> None:
        """Greet nodes, and take what they and those before them answer within ``timeout`` seconds."""
        started, nodes = time.monotonic(), sorted(nodes)
        self.known.update(nodes)
        fresh = send(self.grid, {str(n): (n, self.hello) for n in nodes}, HELLO, ttl, "hello")
        self._hear(started, timeout, fresh)
        self.pending |= fresh

    def _hear(self, started: float, timeout: float, pending: dict[str, str] | None = None) -> None:
        """File what nodes answer to greetings, by default to earlier ones."""
        asked = self.pending if pending is None else pending
        answers = collect(self.grid, asked, started, timeout, fetching=self.fetching)
        for node, reply in answers.replies.items():
            self.told[int(node)] = _greeting(reply, self.fingerprint, _label(node))
        for node, code in answers.errors.items():
            self.told[int(node)] = [(_label(node), code)]

    def _silent(self) -> LeftOut:
        return [(_label(node), int(node), "silent") for node in self.pending.values()]

    def _unfit(self) -> set[int]:
        """Nodes of which no site can take part as it is, though it may be mended."""
        return {node for node, told in self.told.items() if told and all(code for _, code in told)}

    def _forget(self, gone: set[int]) -> None:
        """Take nodes for new ones when they come back; they may have other sites then."""
        self.known -= gone
        self.told = {node: told for node, told in self.told.items() if node not in gone}
        self.pending = {key: node for key, node in self.pending.items() if int(node) not in gone}


def deal(told: Mapping[int, Told], held: Mapping[str, int]) -> tuple[dict[str, int], LeftOut]:
    """Give each name to the one node that claims it.

    Args:
        told: claims by node.
        held: names that have a node, which is there; they keep it.

    Returns:
        Node id by site name, those of ``held`` among them, and who is left out.
    """
    claims: dict[str, list[tuple[int, str]]] = {}
    for node in sorted(told):
        for name, code in told[node]:
            claims.setdefault(name, []).append((node, code))
    sites: dict[str, int] = dict(held)
    left_out: LeftOut = []
    for name, claimed in sorted(claims.items()):
        for node, code in claimed:
            if held.get(name) == node:
                continue
            if name in held or len(claimed) > 1:
                left_out.append((name, node, DUPLICATE))
            elif code:
                left_out.append((name, node, code))
            else:
                sites[name] = node
    return sites, left_out


def _greeting(reply: RecordDict, fingerprint: str, label: str) -> Told:
    """Return each site of a node and why it cannot take part, "" if it can."""
    name, code = status_of(reply)
    if code:
        return [(name or label, code)]
    record = reply.config_records["status"]
    if record.get("idle"):
        return []
    names = record.get("sites")
    if not isinstance(names, list) or not all(isinstance(n, str) and NAME.fullmatch(n) for n in names):
        return [(label, "malformed")]
    code = "" if record.get("fingerprint") == fingerprint else "backbone_mismatch"
    return [(str(n), code) for n in names]


def _chosen(sites: dict[str, int], left_out: LeftOut, nodes: int, config: FederationConfig) -> dict[str, int]:
    why = {name: code for name, _, code in left_out}
    for name, code in sorted(why.items()):
        warn(f"{name} is left out: {code}{_advice(code)}")
    names = sorted(sites)[: config.sites]
    needed = quorum(config)
    if len(names) < needed:
        codes = [f"{list(why.values()).count(c)} x {c}" for c in sorted(set(why.values()))]
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


def _label(node: int | str) -> str:
    return f"node {node}"


def _advice(code: str) -> str:
    return _ADVICE.get(code, " (see client.log in its state folder)")
