"""The ClientApp: one hospital's side of a round.

Two messages are understood, ``query.hello`` and ``train``. Whatever goes wrong, what travels back is
a code of ``sparsecontrast.errors``; the text stays in ``client.log`` in the site's state folder. What this
file answers passes the guard before it leaves (``guard.py``).
"""

import functools
import math
import re
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client.guard import guard
from client.log import note
from sparsecontrast.errors import (
    BackboneMismatchError,
    ConfigError,
    PayloadError,
    code_of,
)

app = ClientApp(mods=[guard])
_RUN_KEY = re.compile(r"[0-9a-f]{8,64}")


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Say who this site is and which backbone it would train."""
    return _answer(_hello, message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round on the site's own images; reply with allow-listed weights and scalars."""
    return _answer(_train, message, context)


def _hello(message: Message, sites: Sequence[Any]) -> RecordDict:
    from sparsecontrast.federated import kind_of
    from sparsecontrast.payload import fingerprint
    from sparsecontrast.statuses import own_version

    status: dict[str, Any] = {"status": "ok", "version": own_version()}
    if sites:
        status["sites"] = [site.name for site in sites]
        config = sites[0].config
        status["fingerprint"] = fingerprint(_shapes(kind_of(config).build(config, pretrained=False)))
    else:
        status["idle"] = True
    return RecordDict({"status": ConfigRecord(status)})


def _train(message: Message, sites: Sequence[Any]) -> RecordDict:
    import torch

    from client.rounds import KeptRounds
    from sparsecontrast.deltas import pack_upload
    from sparsecontrast.federated import Place, kind_of

    (site,) = sites
    started = time.perf_counter()
    number, rounds, run_key, mu, counted = _orders(message.content.config_records["config"])
    torch.set_num_threads(site.config.train.threads)  # part of what a seed reproduces
    kind, say = kind_of(site.config), functools.partial(note, site.state_dir)
    method = kind.build(site.config, pretrained=False)  # the server's weights follow
    weights, reference = _global_weights(message.content, _shapes(method))
    method.load_state_dict(weights, strict=False)
    place = Place(site.name, site.simulated, site.state_dir, site.key_dir, run_key, say)
    learner = kind.learner(method, site.config, place)
    kept = KeptRounds(site.state_dir / "state" / run_key, site.state_dir)
    restored = kept.restore(learner.trainer, number)
    result = learner.run(number, rounds, mu, kept.part(restored))
    state, allowed, wire = method.state_dict(), method.shared_parameters(), site.config.federation
    owed = kept.residual(restored, counted)
    packed, residual = pack_upload(
        {name: state[name] for name in allowed}, allowed, wire.upload, wire.payload_dtype, reference, owed
    )
    kept.save(learner.trainer, number, residual, owed)
    metrics: dict[str, int | float] = {
        "num-examples": result.examples, "steps": result.steps, "state-round": restored, **result.metrics
    }  # fmt: skip
    if result.images is not None and result.seconds is not None:  # a private round tells neither
        setup = time.perf_counter() - started - result.seconds
        metrics |= {"images": result.images, "seconds": result.seconds, "setup-seconds": setup}
    status: dict[str, Any] = {"status": "ok", "site": site.name, "round": number, "run_key": run_key}
    return RecordDict(
        {
            "arrays": ArrayRecord({"flat": _array(packed.flat)}),
            "manifest": ConfigRecord(packed.manifest),
            "status": ConfigRecord(status),
            "metrics": MetricRecord({k: v for k, v in metrics.items() if math.isfinite(v)}),
        }
    )


def _answer(
    work: Callable[[Message, Sequence[Any]], RecordDict], message: Message, context: Context
) -> Message:
    """Do the work; turn every exception into a code, and write its text where only the site reads it."""
    from client.site import addressed, house, resolve

    overrides, name, folder = "", "", None
    try:
        config = message.content.config_records["config"]
        overrides = str(config["overrides"])
        sites = addressed(resolve(context.node_config, overrides), config)
        if len(sites) == 1:
            name, folder = sites[0].name, sites[0].state_dir
            if sites[0].unheard:
                note(folder, f"refused from the server, this site's own file decides: {sites[0].unheard}")
        content = work(message, sites)
    except Exception as error:  # noqa: BLE001  every failure must become an answer, and only a code
        code = code_of(error)
        if folder is None:
            name, folder = house(context.node_config, overrides)
        if folder is not None:
            note(folder, f"{code}\n{traceback.format_exc()}")
        status: dict[str, Any] = {"status": "error", "code": code, "site": name}
        content = RecordDict({"status": ConfigRecord(status)})
    return Message(content, reply_to=message)


def _orders(config: ConfigRecord) -> tuple[int, int, str, float, int | None]:
    """Read (round, rounds, run key, proximal mu, the last round that counted, None where it is not told).

    The key becomes a folder, so its form is checked.
    """
    number, rounds = config.get("round"), config.get("rounds")
    run_key, mu = config.get("run_key"), config.get("proximal_mu")
    if not (isinstance(number, int) and isinstance(rounds, int) and 1 <= number <= rounds):
        raise ConfigError(f"round {number!r} of {rounds!r}: must be integers, 1 <= round <= rounds")
    if not isinstance(run_key, str) or not _RUN_KEY.fullmatch(run_key):
        raise ConfigError("run_key: must be 8 to 64 hexadecimal digits")
    if not isinstance(mu, int | float) or not 0 <= mu < math.inf:
        raise ConfigError(f"proximal_mu={mu!r}: must be a non-negative number")
    counted = config.get("counted")
    if counted is not None and not (isinstance(counted, int) and 0 <= counted < number):
        raise ConfigError(f"counted={counted!r}: must be a round before {number}, or 0")
    return number, rounds, run_key, float(mu), counted


def _global_weights(content: RecordDict, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, Any], Any]:
    """Unpack the server's weights: by name, and as the vector [n], fp32, that updates count from.

    Raises:
        BackboneMismatchError: they are of another backbone.
        PayloadError: they are damaged.
    """
    from sparsecontrast import payload

    arrays = content.array_records["arrays"]
    manifest = dict(content.config_records["manifest"])
    packed = payload.Payload(payload.from_npy(arrays["flat"].data), manifest)
    try:
        payload.verify(packed, shapes)
    except PayloadError as error:
        if error.reason in ("names", "shape", "size"):
            raise BackboneMismatchError(
                f"the server's weights do not fit this site's backbone: {error}"
            ) from error
        raise
    tensors = payload.unpack(packed)
    return tensors, packed.flat.astype("float32")


def _shapes(method: Any) -> dict[str, tuple[int, ...]]:
    state = method.state_dict()
    return {name: tuple(state[name].shape) for name in method.shared_parameters()}


def _array(flat: Any) -> Array:
    from sparsecontrast.payload import to_npy

    return Array(str(flat.dtype), tuple(flat.shape), "numpy.ndarray", to_npy(flat))
