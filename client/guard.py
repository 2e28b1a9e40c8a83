"""The last look: a Flower mod that sees every answer of this node as it would leave, and can hold it back.

It stands outside of the app, so that a fault there, or code that was put there, meets it too. An answer is
checked (``sparsecontrast.release``), approved by a person where the site wants that, and logged on disk
(``sparsecontrast.egress``); then it goes. What does not pass goes as a code.
"""

import math
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from client.log import note
from client.site import Site, addressed, log_folder, resolve
from sparsecontrast.errors import EgressError, SparseContrastError
from sparsecontrast.settings import Config

TRAIN = {"arrays", "manifest", "status", "metrics"}


def guard(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Let the app answer, look at the answer, and log it before it goes."""
    reply = call_next(message, context)
    sites, folder, name = _who(message, context)
    try:
        if folder is None:  # not even a place to log: a code is all that may leave
            raise EgressError("this node has no configuration, so nothing may leave but a code")
        _release(message, reply.content, sites, folder)
    except Exception as error:  # noqa: BLE001  whatever fails here, the answer must not leave
        code = error.code if isinstance(error, SparseContrastError) else "internal"
        told = _error_of(reply) or code
        reply = Message(RecordDict({"status": ConfigRecord(_failed(told, name))}), reply_to=message)
        if folder is not None:
            note(folder, f"held back: {code}\n{traceback.format_exc()}")
    return reply


def _release(message: Message, content: RecordDict, sites: Sequence[Site], folder: Path) -> None:
    """Check an answer and log it.

    Raises:
        EgressError: it may not leave, or the log cannot be trusted.
        StorageError: the log could not be written.
    """
    from sparsecontrast.egress import EgressLog

    status = dict(content.config_records.get("status", {}))
    config = message.content.config_records.get("config", ConfigRecord())
    facts: dict[str, Any] = {"status": status.get("status"), "site": status.get("site") or ""}
    facts |= {key: config[key] for key in ("round", "run_key") if key in config}
    kind = str(message.metadata.message_type).removeprefix("query.")
    if set(content) - {"status"}:
        facts |= _checked_training(message, content, sites)
    _check_status(status)
    EgressLog(folder).append(kind, facts | {key: status[key] for key in ("code",) if key in status})


def _checked_training(message: Message, content: RecordDict, sites: Sequence[Site]) -> dict[str, Any]:
    """Check the answer to a round, wait for a person where the site wants one; returns what the log says."""
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
    return facts


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


def _check_status(status: dict[str, Any]) -> None:
    from sparsecontrast.release import check_status

    check_status(status)


def _who(message: Message, context: Context) -> tuple[Sequence[Site], Path | None, str]:
    """Sites, folder and name that answer; no site where the configuration is not in order."""
    overrides = ""
    try:
        config = message.content.config_records["config"]
        overrides = str(config["overrides"])
        sites = addressed(resolve(context.node_config, overrides), config)
        if len(sites) == 1:
            return sites, sites[0].state_dir, sites[0].name
    except Exception:  # noqa: BLE001  the app has answered it with a code
        sites = []
    return sites, log_folder(context.node_config, overrides), ""


def _error_of(reply: Message) -> str:
    """The code that the app itself answered with, if that is all it did."""
    from sparsecontrast.release import WORD

    status = reply.content.config_records.get("status", {})
    code = status.get("code", "")
    return code if status.get("status") == "error" and isinstance(code, str) and WORD.fullmatch(code) else ""


def _failed(code: str, name: str) -> dict[str, Any]:
    return {"status": "error", "code": code, "site": name}
