"""The rounds: who takes part, what comes back, what is kept.

Flower's ``Strategy.start`` counts from 1, keeps nothing on disk, waits without end and draws sites
from the global generator. So the loop is ours, and the aggregation is Flower's.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from server.conversation import TRAIN, ask
from server.folder import RunFolder
from server.log import say, warn
from server.norms import bound_of, hold
from server.roll import Roll
from server.spool import Spool
from server.strategy import Aggregator, Contribution, bounded_weights, quorum
from server.verification import Expectation, RefusedError, read_reply, records_of
from sparsecontrast import checkpoint, payload
from sparsecontrast.config import as_dict
from sparsecontrast.errors import BudgetSpentError, PayloadError, QuorumError
from sparsecontrast.settings import FederationConfig
from sparsecontrast.tensorboard import write_tensorboard
from sparsecontrast.trainer import derive_seed

# columns of metrics.jsonl that the server fills; a site's metric of that name is dropped
OURS = (
    "round", "site", "status", "code", "weight", "num_examples", "answer_seconds", "bytes_down", "bytes_up",
    "update_norm", "clipped",
)  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """What is kept of an answer: it is verified, or it has the code of why not; and its bytes."""

    reply: Contribution | None
    code: str
    bytes_up: int


@dataclass(frozen=True)
class Outcome:
    """What one round's replies were.

    Attributes:
        valid: verified replies, sorted by site.
        refused: site -> code, replies that may not be aggregated and sites that failed.
        silent: sites without an answer.
        rows: one row of metrics a site that was asked.
        bytes_down: sent to all sites together.
        bytes_up: received from all.
    """

    valid: list[Contribution]
    refused: dict[str, str]
    silent: list[str]
    rows: list[dict[str, Any]]
    bytes_down: int
    bytes_up: int


class Rounds:
    """Train until ``federation.rounds``, one checkpoint a round.

    Args:
        grid: Flower's.
        roll: the sites, called.
        folder: the run folder.
        overrides: what the sites compose their configuration from.
        weights: global weights by name, fp32; of the initial model or of the round to continue.
        strategy: the aggregation strategy's tensors to continue with.
    """

    def __init__(
        self,
        grid: Grid,
        roll: Roll,
        folder: RunFolder,
        overrides: str,
        weights: dict[str, Tensor],
        strategy: dict[str, Tensor],
    ):
        self.grid, self.roll, self.folder, self.overrides = grid, roll, folder, overrides
        self.config = folder.config.federation
        self.shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        self.flat = payload.pack(weights, list(weights), "fp32").flat
        self.aggregator = Aggregator(self.config)
        self.aggregator.restore(strategy)
        self.parent: str | None = None
        self.counted: dict[str, int] = {}  # site -> last round that its reply was joined in
        self.spent: set[str] = set()  # may not train any more in this run, and are not asked again

    def run(self) -> None:
        """Run every round that is left.

        Raises:
            QuorumError: fewer valid replies than the quorum.
            StorageError: a checkpoint could not be written; the rounds before it are intact.
        """
        if self.folder.done is None:
            self._keep(0, {"rows": []})
        else:
            meta = checkpoint.read_meta(self.folder.path, self.folder.done)
            self.parent, self.counted = checkpoint.weights_sha256(meta), meta["counted"]
        for number in range((self.folder.done or 0) + 1, self.config.rounds + 1):
            if not self._round(number):
                say(f"ends after round {number - 1}: every site's privacy budget is spent")
                return

    def _round(self, number: int) -> bool:
        """Run one round; False, and nothing changed, where no site may train on its patients any more."""
        with Spool(self.folder.path / "replies") as spool:
            return self._aggregated(number, spool)

    def _aggregated(self, number: int, spool: Spool) -> bool:
        started = time.monotonic()
        self.roll.look(number)
        outcome = self._exchange(number, spool)
        self.spent |= {name for name, code in outcome.refused.items() if code == BudgetSpentError.code}
        if self.spent.issuperset(self.roll.sites):
            self.folder.add_metrics(outcome.rows)  # who refused, for the report
            return False
        if len(outcome.valid) < self.aggregator.quorum:
            raise QuorumError(
                f"round {number}: {len(outcome.valid)} valid replies, {self.aggregator.quorum} are needed "
                f"(federation.min_sites, {self.config.strategy}); refused: {outcome.refused or 'none'}; "
                f"silent: {outcome.silent or 'none'}; privacy budget spent: {sorted(self.spent) or 'none'}"
            )
        self.flat = self.aggregator.aggregate(number, self.flat, outcome.valid)
        self.counted |= {reply.site: number for reply in outcome.valid}
        row = _summary(number, outcome, self.config, time.monotonic() - started)
        rows = [*outcome.rows, row]
        self._keep(number, {k: row[k] for k in ("contributors", "refused", "silent")} | {"rows": rows})
        self.folder.add_metrics(rows)
        if self.folder.config.tensorboard:
            write_tensorboard(self.folder.path)
        say(_line(row, self.config.rounds))
        return True

    def _exchange(self, number: int, spool: Spool) -> Outcome:
        """Send the weights out and verify what comes back, each answer as it arrives."""
        able = [name for name in self.roll.sites if name not in self.spent]
        names = participants(able, self.config, self.folder.config.seed, number)
        down = payload.repack(self.flat, self.shapes, self.config.payload_dtype)
        shared = records_of(down)
        letters = {name: self._letter(name, number, shared) for name in names}
        expected = Expectation(
            number,
            self.folder.run_key,
            self.shapes,
            self.config.payload_dtype,
            self.config.upload,
            down.flat.astype(np.float32),
            self.config.max_norm_ratio,
        )
        answers = ask(
            self.grid, letters, TRAIN, self.config.round_timeout, str(number),
            lambda name, content: _judge(name, content, expected, spool),
        )  # fmt: skip
        valid = {n: answers.replies[n].reply for n in sorted(answers.replies) if answers.replies[n].reply}
        refused = answers.errors | {n: r.code for n, r in answers.replies.items() if r.reply is None}
        lengths = {name: reply.update_norm for name, reply in valid.items()}
        valid, too_long = self._held(number, valid, expected.reference, spool)
        refused |= too_long
        for name, code in sorted(refused.items()):
            warn(f"round {number}: {name} left out: {code}")
        for name in answers.silent:
            warn(f"round {number}: {name} left out: no answer within {self.config.round_timeout:g} s")
        sent = {name: _bytes(content) for name, (_, content) in letters.items()}
        received = {name: judged.bytes_up for name, judged in answers.replies.items()}
        rows = [_row(number, name, valid, refused, answers.seconds.get(name)) for name in names]
        for row in rows:
            row |= {"bytes_down": sent[row["site"]], "bytes_up": received.get(row["site"], 0)}
            if row["site"] in lengths:
                row["update_norm"] = lengths[row["site"]]
        _add_weights(rows, list(valid.values()), self.config)
        return Outcome(
            list(valid.values()), refused, answers.silent, rows, sum(sent.values()), sum(received.values())
        )

    def _held(
        self, number: int, valid: Mapping[str, Contribution], reference: np.ndarray, spool: Spool
    ) -> tuple[dict[str, Contribution], dict[str, str]]:
        """Hold a round's updates to a bound; returns what may be joined, and the codes of what may not."""
        bound = bound_of([reply.update_norm for reply in valid.values()], self.config)
        held, refused = hold(list(valid.values()), reference, bound, spool)
        for reply in held:
            if reply.clipped:
                lengths = f"{reply.update_norm:.3g}, shortened to {bound:.3g}"
                warn(f"round {number}: the update of {reply.site} has length {lengths}")
        return {reply.site: reply for reply in held}, refused

    def _letter(self, name: str, number: int, shared: Mapping[str, Any]) -> tuple[int, RecordDict]:
        """Address the round's weights and orders to one site; the weights are the same for all."""
        orders = ConfigRecord(
            {
                "overrides": self.overrides,
                "site": name,
                "round": number,
                "rounds": self.config.rounds,
                "run_key": self.folder.run_key,
                "proximal_mu": self.aggregator.proximal_mu,
                "counted": self.counted.get(name, 0),
            }
        )
        return self.roll.sites[name], RecordDict({**shared, "config": orders})

    def _keep(self, number: int, facts: dict[str, Any]) -> None:
        """Write the round's checkpoint."""
        tensors = payload.unpack(payload.repack(self.flat, self.shapes, "fp32"))
        meta = {
            **facts,
            "counted": self.counted,
            "run_key": self.folder.run_key,
            "seed": self.folder.config.seed,
            "parent": self.parent,
            "fingerprint": payload.fingerprint(self.shapes),
            "config": as_dict(self.folder.config),
        }
        whole = checkpoint.write_round(self.folder.path, number, tensors, meta, self.aggregator.state())
        self.parent = checkpoint.weights_sha256(whole)


def participants(sites: list[str], config: FederationConfig, seed: int, number: int) -> list[str]:
    """Draw a round's sites: ``fraction`` of them, rounded up, never fewer than the quorum.

    The draw depends on the run's seed, the round and the names alone.
    """
    count = min(len(sites), max(quorum(config), math.ceil(config.fraction * len(sites) - 1e-9)))
    generator = np.random.Generator(np.random.PCG64(derive_seed(seed, "participants", number)))
    chosen = generator.permutation(len(sites))[:count]
    return sorted(sorted(sites)[i] for i in chosen)


def _judge(name: str, content: RecordDict, expected: Expectation, spool: Spool) -> Judged:
    """Verify one answer, empty it, and put a good one's weights into the spool."""
    size = _bytes(content)
    try:
        return Judged(spool.keep(read_reply(name, content, expected)), "", size)
    except (PayloadError, RefusedError) as error:
        return Judged(None, error.code, size)
    finally:  # Flower's views of a content refer back to it: its arrays would live until Python seeks cycles
        for record in content.array_records.values():
            record.clear()


def _row(
    number: int, site: str, valid: dict[str, Contribution], refused: dict[str, str], seconds: float | None
) -> dict[str, Any]:
    status = "ok" if site in valid else "refused" if site in refused else "silent"
    row: dict[str, Any] = {"round": number, "site": site, "status": status}
    if site in refused:
        row["code"] = refused[site]
    if seconds is not None:
        row["answer_seconds"] = round(seconds, 3)
    if site in valid:
        metrics = {k.replace("-", "_"): v for k, v in valid[site].metrics.items()}
        told = {k: v for k, v in metrics.items() if k not in OURS}
        row |= {"num_examples": valid[site].examples, "clipped": valid[site].clipped} | told
    return row


def _add_weights(rows: list[dict[str, Any]], valid: list[Contribution], config: FederationConfig) -> None:
    weights = (
        bounded_weights([v.examples for v in valid], config.weighting, config.max_weight) if valid else []
    )
    share = {v.site: w for v, w in zip(valid, weights, strict=True)}
    for row in rows:
        row["weight"] = share.get(row["site"], 0.0)


def _summary(number: int, outcome: Outcome, config: FederationConfig, seconds: float) -> dict[str, Any]:
    """Make the row of a whole round; its means are weighted like the weights."""
    return {
        "round": number,
        "site": None,
        "loss": _mean(outcome.rows, "loss"),
        "keep": _mean(outcome.rows, "keep"),
        **(
            {"epsilon": max(told)} if (told := [r["epsilon"] for r in outcome.rows if "epsilon" in r]) else {}
        ),
        "seconds": round(seconds, 3),
        "bytes_down": outcome.bytes_down,
        "bytes_up": outcome.bytes_up,
        "contributors": [reply.site for reply in outcome.valid],
        "refused": outcome.refused,
        "silent": outcome.silent,
        "rounds": config.rounds,
        "strategy": config.strategy,
    }


def _mean(rows: list[dict[str, Any]], name: str) -> float | None:
    """Mean of a metric over the sites that told it; None when none did."""
    found = [(r["weight"], r[name]) for r in rows if r["status"] == "ok" and name in r]
    total = sum(weight for weight, _ in found)
    return sum(w * x for w, x in found) / total if total else None


def _line(row: dict[str, Any], rounds: int) -> str:
    loss = "      -" if row["loss"] is None else f"{row['loss']:7.4f}"
    kept = "" if row["keep"] is None else f"  tokens {row['keep']:.0%}"
    kept += f"  epsilon {row['epsilon']:.3f}" if "epsilon" in row else ""
    asked = len(row["contributors"]) + len(row["refused"]) + len(row["silent"])
    return (
        f"round {row['round']:3d}/{rounds}  loss {loss}{kept}  sites {len(row['contributors'])}/{asked}  "
        f"up {row['bytes_up'] / 1e6:.1f} MB  down {row['bytes_down'] / 1e6:.1f} MB  {row['seconds']:.1f} s"
    )


def _bytes(content: RecordDict) -> int:
    return sum(record.count_bytes() for record in content.values())


def initial_weights(method: torch.nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Return a method's shared tensors, fp32 on the CPU."""
    state = method.state_dict()
    return {name: state[name].detach().cpu().to(torch.float32) for name in names}
