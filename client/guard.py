"""The last look: a Flower mod that sees every answer of this node, and makes what leaves in its place.

It stands outside of the app, so that a fault there, or code that was put there, meets it too. An answer is
checked (``sparsecontrast.release``, ``sparsecontrast.statuses``), approved by a person where the site wants
that, and logged on disk (``sparsecontrast.egress``). What then goes is written anew from what was verified:
nothing of the app's own message is passed on. What does not pass goes as a code.
"""

import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from client.log import note
from client.site import Site, addressed, house, resolve
from sparsecontrast.errors import EgressError, SparseContrastError, code_of
from sparsecontrast.settings import Config

TRAIN = {"arrays", "manifest", "status", "metrics"}


@dataclass(frozen=True)
class _Me:
    """Who answers: sites (none where the run is not in order), their names, and where their log lies."""

    sites: Sequence[Site] = ()
    names: tuple[str, ...] = ()
    folder: Path | None = None

    @property
    def name(self) -> str:
        return self.names[0] if len(self.names) == 1 else ""


def guard(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Let the app answer, look at the answer, and log what goes in its place."""
    me = _Me()
    try:
        me = _who(message, context)
        content, facts = _made_anew(message, call_next(message, context).content, me)
        _log(message, me, facts)
    except Exception as error:  # noqa: BLE001  whatever fails here, the answer must not leave
        content = _held_back(error, message, me)
    return Message(content, reply_to=message)


def _made_anew(message: Message, content: RecordDict, me: _Me) -> tuple[RecordDict, dict[str, Any]]:
    """Check an answer; returns what may leave, and what the log says of it.

    Raises:
        EgressError: nothing may.
    """
    from sparsecontrast.statuses import Known, rebuilt

    orders = _orders(message)
    known = Known(me.names, orders.get("round"), orders.get("run_key"))
    told = rebuilt(_kind(message), dict(content.config_records.get("status", {})), known)
    facts = {"status": told["status"], "site": told.get("site") or me.name}
    facts |= {key: told[key] for key in ("code",) if key in told}
    status = RecordDict({"status": ConfigRecord(told)})
    if told["status"] == "ok" and me.folder is None:  # not even a place to log
        raise EgressError("this node has no configuration, so nothing may leave but a code")
    if _kind(message) == "train" and told["status"] == "ok":
        records, more = _training(message, content, me.sites)
        return RecordDict({**status, **records}), facts | more
    if set(content) != {"status"}:
        raise EgressError("an answer without training holds a status alone")
    return status, facts


def _training(
    message: Message, content: RecordDict, sites: Sequence[Site]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check the answer to a round, wait for a person where the site wants one; as ``_made_anew``."""
    from sparsecontrast import payload, release
    from sparsecontrast.approval import wait_for_approval

    if set(content) != TRAIN or len(sites) != 1 or list(content.array_records["arrays"]) != ["flat"]:
        raise EgressError(f"an answer to a round holds exactly {sorted(TRAIN)}, of one site")
    (site,) = sites
    limits = _limits(message, site)
    flat = payload.from_npy(content.array_records["arrays"]["flat"].data)
    packed = payload.Payload(flat, dict(content.config_records["manifest"]))
    metrics = dict(content.metric_records.get("metrics", MetricRecord()))
    release.check_weights(packed, limits)
    release.check_metrics(metrics, limits)
    facts = {**release.told(packed), "metrics": metrics, "epsilon": (limits.scalars or {}).get("epsilon")}
    if site.egress.approve == "manual":
        config = message.content.config_records["config"]
        name = f"{config['run_key']}-{int(str(config['round'])):04d}"
        wait_for_approval(site.state_dir, name, facts, flat, site.egress.wait_seconds)
    array = Array(str(flat.dtype), flat.shape, "numpy.ndarray", payload.to_npy(flat))
    manifest = payload.manifest_of(
        limits.shapes, packed.manifest["dtype"], flat, packed.manifest["kind"], packed.manifest["scales"]
    )
    records = {
        "arrays": ArrayRecord({"flat": array}),
        "manifest": ConfigRecord(manifest),
        "metrics": MetricRecord(metrics),
    }
    return records, facts


def _limits(message: Message, site: Site) -> Any:
    """What may leave in answer: tensors as they came, scalars as the site's privacy has it."""
    from sparsecontrast import payload, release

    manifest = message.content.config_records["manifest"]
    names, shapes = list(manifest["names"]), list(manifest["shapes"])  # type: ignore[arg-type]
    came = {str(n): payload.parse_shape(str(s)) for n, s in zip(names, shapes, strict=True)}
    flat = payload.from_npy(message.content.array_records["arrays"]["flat"].data).astype("float32")
    wire = site.config.federation
    privacy, number, scalars = site.config.privacy, 0, None
    if privacy.name != "none":
        number = int(str(message.content.config_records["config"]["round"]))
        scalars = _private_scalars(message, site, sum(math.prod(shape) for shape in came.values()))
    return release.Limits(
        came,
        flat,
        site.egress.max_norm_ratio,
        wire.upload,
        wire.payload_dtype,
        privacy.target_epsilon,
        number,
        scalars,
    )


def _private_scalars(message: Message, site: Site, weights: int) -> dict[str, float] | None:
    """What the answer to a private round tells by the ledger's word; None where it holds no such round."""
    if not isinstance(site.config, Config):  # no other kind has a ledger, so nothing of it can be private
        raise EgressError(
            f"privacy={site.config.privacy.name}: no ledger holds a charge for this kind of run"
        )
    from sparsecontrast.disclosure import disclosure, public_patients
    from sparsecontrast.ledger import ledger_of

    told = message.content.config_records["config"]
    book = ledger_of(site.config, site.state_dir).read()
    mine = [e for e in book.entries if (e.run, e.round) == (told["run_key"], told["round"])]
    if not mine:
        return None
    entry = mine[-1]
    patients = public_patients(site.config, len(book.members[entry.cohort]))
    number, rounds = int(str(told["round"])), int(str(told["rounds"]))
    delta = book.policies[entry.cohort].delta
    scalars = disclosure(
        site.config, entry.charge, entry.epsilon, delta or 0.0, patients, weights, number, rounds
    )
    return {"num-examples": patients, "steps": entry.charge.steps, **scalars}


def _who(message: Message, context: Context) -> _Me:
    overrides = ""
    try:
        config = message.content.config_records["config"]
        overrides = str(config["overrides"])
        sites = addressed(resolve(context.node_config, overrides), config)
        if len(sites) == 1:
            return _Me(sites, (sites[0].name,), sites[0].state_dir)
    except Exception:  # noqa: BLE001  the app answers it with a code
        sites = []
    name, folder = house(context.node_config, overrides)
    return _Me(sites, (name,) if name else tuple(site.name for site in sites), folder)


def _log(message: Message, me: _Me, facts: Mapping[str, Any]) -> None:
    """Write a row.

    Raises:
        EgressError: the log cannot be trusted.
        StorageError: the log could not be written.
    """
    from sparsecontrast.egress import EgressLog

    if me.folder is not None:
        EgressLog(me.folder).append(_kind(message), {**_orders(message), **facts})


def _held_back(error: Exception, message: Message, me: _Me) -> RecordDict:
    """Make the answer that says no more than a code, and log that too."""
    told: dict[str, Any] = {"status": "error", "code": code_of(error), "site": me.name}
    if me.folder is not None:
        note(me.folder, f"held back: {told['code']}\n{traceback.format_exc()}")
        try:
            _log(message, me, told)
        except SparseContrastError as broken:  # then the coordinator must still hear that this site is out
            note(me.folder, f"{told['code']} leaves without a row in the log: {broken}")
    return RecordDict({"status": ConfigRecord(told)})


def _kind(message: Message) -> str:
    """The kind of a message; the server's own word is none to log."""
    kind = str(message.metadata.message_type).removeprefix("query.")
    return kind if kind in ("hello", "train") else "other"


def _orders(message: Message) -> dict[str, Any]:
    """Round and run of the orders, where they have any."""
    config = message.content.config_records.get("config", ConfigRecord())
    kinds = {"round": int, "run_key": str}
    return {key: config[key] for key, kind in kinds.items() if isinstance(config.get(key), kind)}
