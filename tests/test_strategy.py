"""Flower's strategies behind our door: right by brute force, resumable, and never fed rubbish."""

import dataclasses

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from server.strategy import STRATEGIES, Aggregator, Contribution, bounded_weights
from server.verification import Expectation, RefusedError, read_reply, records_of
from sparsecontrast import payload
from sparsecontrast.config import compose
from sparsecontrast.errors import ConfigError, FederationError, PayloadError, QuorumError

SHAPES = {"backbone.w": (5, 8), "saliency.b": (3,)}
SIZE = 43
KEY = "0" * 32


@pytest.fixture(autouse=True)
def _identity(monkeypatch):
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def federation(strategy="fedavg", min_sites=2, **options):
    text = "{" + ", ".join(f"{k}: {v}" for k, v in options.items()) + "}" if options else "null"
    return compose(
        [f"federation.strategy={strategy}", f"federation.options={text}", f"federation.min_sites={min_sites}"]
    ).federation


def vectors(n, seed=0, scale=1.0):
    return np.random.Generator(np.random.PCG64(seed)).normal(size=(n, SIZE)).astype(np.float32) * scale


def replies(n, seed=0, examples=None):
    counts = examples or [10 * (i + 1) for i in range(n)]
    return [Contribution(f"site-{i}", x, counts[i], {}) for i, x in enumerate(vectors(n, seed))]


def global_weights():
    return vectors(1, 99)[0]


# ---- aggregation against brute force


def test_fedavg_is_the_weighted_mean_in_fp32():
    given = replies(4)
    got = Aggregator(federation()).aggregate(1, global_weights(), given)
    shares = np.array([r.examples for r in given]) / sum(r.examples for r in given)
    want = (np.stack([r.flat for r in given]).astype(np.float64) * shares[:, None]).sum(0)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_median_and_trimmed_mean():
    given = replies(7)
    stack = np.stack([r.flat for r in given])
    median = Aggregator(federation("median")).aggregate(1, global_weights(), given)
    np.testing.assert_array_equal(median, np.median(stack, axis=0))
    trimmed = Aggregator(federation("trimmed_mean", beta=0.2)).aggregate(1, global_weights(), given)
    np.testing.assert_allclose(trimmed, np.sort(stack, axis=0)[1:-1].mean(0), rtol=1e-5, atol=1e-6)


def test_krum_picks_the_most_central_reply_even_when_all_are_close():
    """In fp32 Flower's distances of vectors 1e-4 apart around norm 600 are noise; ours go in as fp64."""
    offset = np.full(SIZE, 100, np.float32)
    near = vectors(5, seed=3, scale=1e-4)
    given = [Contribution(f"s{i}", offset + x, 1, {}) for i, x in enumerate(near)]
    stack = np.stack([r.flat for r in given]).astype(np.float64)
    distances = ((stack[:, None] - stack[None]) ** 2).sum(-1)
    scores = [np.sort(row)[1 : 1 + (5 - 1 - 2)].sum() for row in distances]
    got = Aggregator(federation("krum", min_sites=5, num_malicious_nodes=1)).aggregate(1, offset, given)
    np.testing.assert_array_equal(got, given[int(np.argmin(scores))].flat)


@pytest.mark.parametrize(
    ("strategy", "options", "least"),
    [
        ("krum", {"num_malicious_nodes": 1}, 5),
        ("multikrum", {"num_malicious_nodes": 1, "num_nodes_to_select": 3}, 5),
        ("bulyan", {"num_malicious_nodes": 1}, 7),
        ("median", {}, 3),
        ("trimmed_mean", {"beta": 0.34}, 3),
    ],
)
def test_robust_strategies_withstand_one_liar(strategy, options, least):
    honest = [Contribution(f"s{i}", x, 10, {}) for i, x in enumerate(vectors(least - 1, scale=0.01) + 1)]
    liar = Contribution("a-liar", np.full(SIZE, -50, np.float32), 10, {})
    got = Aggregator(federation(strategy, least, **options)).aggregate(1, global_weights(), [liar, *honest])
    assert np.abs(got - 1).max() < 0.1
    plain = Aggregator(federation()).aggregate(1, global_weights(), [liar, *honest])
    assert np.abs(plain - 1).max() > 5


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_every_strategy_keeps_fp32_and_ignores_the_order_of_arrival(strategy):
    given = replies(7)
    config = federation(strategy, 3)
    a = Aggregator(config).aggregate(1, global_weights(), given)
    b = Aggregator(config).aggregate(1, global_weights(), given[::-1])
    assert a.dtype == np.float32
    assert a.shape == (SIZE,)
    assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("fedadam", {"eta": 0.05}),
        ("fedyogi", {"eta": 0.05}),
        ("fedavgm", {"server_momentum": 0.9, "server_learning_rate": 0.7}),
        ("fedavg", {}),
    ],
)
def test_a_restored_strategy_continues_bit_for_bit(strategy, options):
    config = federation(strategy, **options)
    whole, first = Aggregator(config), Aggregator(config)
    x = y = global_weights()
    for number in range(1, 6):
        x = whole.aggregate(number, x, replies(3, seed=number))
        if number == 3:
            second = Aggregator(config)
            second.restore({name: tensor.clone() for name, tensor in first.state().items()})
            first = second
        y = first.aggregate(number, y, replies(3, seed=number))
        assert x.tobytes() == y.tobytes(), number
    assert bool(whole.state()) == (strategy != "fedavg")
    if strategy != "fedavg":  # the state matters: without it the next step is another one
        forgetful = Aggregator(config).aggregate(6, x, replies(3, seed=6))
        assert forgetful.tobytes() != whole.aggregate(6, x, replies(3, seed=6)).tobytes()


def test_fedavgm_by_hand():
    config = federation("fedavgm", server_momentum=0.5, server_learning_rate=0.1)
    aggregator, x, momentum = Aggregator(config), global_weights().astype(np.float64), 0.0
    got = global_weights()
    for number in (1, 2, 3):
        given = replies(2, seed=number, examples=[1, 1])
        got = aggregator.aggregate(number, got, given)
        momentum = 0.5 * momentum + (x - np.mean([r.flat for r in given], axis=0))
        x = x - 0.1 * momentum
    np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-5)


def test_only_fedprox_sends_a_proximal_weight():
    assert Aggregator(federation("fedprox")).proximal_mu == compose().federation.proximal_mu > 0
    assert Aggregator(federation("fedavg")).proximal_mu == 0


def test_a_diverged_strategy_is_an_error_and_too_few_replies_too():
    config = federation("fedavgm", server_learning_rate=3.0e38)
    with pytest.raises(FederationError, match="not finite"):
        Aggregator(config).aggregate(1, global_weights(), replies(2))
    with pytest.raises(QuorumError, match="too few"):
        Aggregator(federation("bulyan", 7, num_malicious_nodes=1)).aggregate(1, global_weights(), replies(5))


# ---- configuration


@pytest.mark.parametrize(
    ("strategy", "min_sites", "options", "says"),
    [
        ("fedsgd", 2, {}, "trimmed_mean"),
        ("fedavg", 2, {"eta": 1}, "none"),
        ("fedadam", 2, {"etta": 0.1}, "beta_1"),
        ("fedadam", 2, {"eta": "fast"}, "number"),
        ("fedadam", 2, {"eta": -1}, "non-negative"),
        ("trimmed_mean", 2, {"beta": 0.5}, "beta"),
        ("krum", 2, {"num_malicious_nodes": 4}, "at least 11"),
        ("krum", 5, {"num_malicious_nodes": 0.5}, "integer"),
        ("bulyan", 6, {"num_malicious_nodes": 2}, "at least 11"),
        ("multikrum", 5, {"num_malicious_nodes": 1, "num_nodes_to_select": 5}, "1..4"),
    ],
)
def test_impossible_strategies_are_refused_before_anyone_trains(strategy, min_sites, options, says):
    with pytest.raises(ConfigError, match=says):
        Aggregator(federation(strategy, min_sites, **options))


@pytest.mark.parametrize(
    ("strategy", "faulty", "needed"),
    [
        ("fedavg", 0, 2),
        ("krum", 0, 3),
        ("krum", 1, 5),
        ("multikrum", 2, 7),
        ("bulyan", 0, 3),
        ("bulyan", 1, 7),
    ],
)
def test_the_quorum_is_what_the_strategy_needs(strategy, faulty, needed):
    options = {"num_malicious_nodes": faulty} if faulty else {}
    assert Aggregator(federation(strategy, min_sites=2, **options)).quorum == needed
    assert Aggregator(federation(strategy, min_sites=8, **options)).quorum == 8


# ---- weights


def test_weights_follow_images_until_the_cap():
    assert bounded_weights([1, 1, 2], "examples", 0.9) == pytest.approx([0.25, 0.25, 0.5])
    assert bounded_weights([1, 1, 2], "uniform", 0.9) == pytest.approx([1 / 3] * 3)
    assert bounded_weights([1, 3, 10**15], "examples", 0.6) == pytest.approx([0.1, 0.3, 0.6])
    assert bounded_weights([1, 10**9, 10**9], "examples", 0.4) == pytest.approx([0.2, 0.4, 0.4])
    assert bounded_weights([5, 1], "examples", 0.3) == pytest.approx([0.5, 0.5])
    assert bounded_weights([7], "examples", 0.9) == [1.0]


def test_weights_sum_to_one_and_never_pass_the_cap():
    generator = np.random.Generator(np.random.PCG64(0))
    for _ in range(300):
        n = int(generator.integers(2, 12))
        cap = float(generator.uniform(1 / n + 0.01, 1))
        counts = [int(c) for c in np.exp(generator.uniform(0, 30, n)) + 1]
        shares = bounded_weights(counts, "examples", cap)
        assert sum(shares) == pytest.approx(1)
        assert max(shares) <= cap + 1e-9
        order = np.argsort(counts, kind="stable")
        assert (np.diff(np.array(shares)[order]) >= -1e-12).all()


# ---- the door


def reply(flat=None, site="a", number=3, key=KEY, examples=12, dtype="fp32", **status):
    packed = payload.repack(vectors(1)[0] if flat is None else flat, SHAPES, dtype)
    record = {"status": "ok", "site": site, "round": number, "run_key": key, **status}
    metrics = MetricRecord({"num-examples": examples, "loss": 1.5})
    return RecordDict({**records_of(packed), "status": ConfigRecord(record), "metrics": metrics})


def expectation(**changes):
    usual = Expectation(3, KEY, SHAPES, "fp32", "weights", vectors(1)[0], 10.0)
    return dataclasses.replace(usual, **changes)


def test_a_good_reply_passes():
    got = read_reply("a", reply(), expectation())
    assert (got.site, got.examples, got.metrics) == ("a", 12, {"loss": 1.5})
    np.testing.assert_array_equal(got.flat, vectors(1)[0])
    half = read_reply("a", reply(dtype="fp16"), expectation(dtype="fp16"))
    assert half.flat.dtype == np.float32


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (reply(number=2), "payload_stale"),
        (reply(key="1" * 32), "payload_stale"),
        (reply(site="b"), "payload_stale"),
        (reply(examples=0), "payload_weight"),
        (reply(examples=-5), "payload_weight"),
        (reply(examples=2.5), "payload_weight"),
        (reply(examples=float("nan")), "payload_weight"),
        (reply(examples=float("inf")), "payload_weight"),
        (reply(dtype="fp16"), "payload_dtype"),
        (reply(flat=vectors(1)[0] * 1e3), "payload_norm"),
        (RecordDict(), "malformed"),
        (reply(status="error", code="site_too_small"), "site_too_small"),
        (reply(status="error", code="/home/p/DOE^JANE.dcm"), "malformed"),
    ],
)
def test_a_bad_reply_is_refused_with_its_code(bad, code):
    with pytest.raises((PayloadError, RefusedError)) as caught:
        read_reply("a", bad, expectation())
    assert caught.value.code == code


def test_missing_and_additional_arrays_and_truncated_bytes_are_refused():
    no_metrics = reply()
    del no_metrics["metrics"]
    two = reply()
    two["more"] = ArrayRecord({"flat": Array(np.ones(1, np.float32))})
    named = reply()
    named["arrays"] = ArrayRecord({"teacher": Array(vectors(1)[0])})
    torn = reply()
    array = torn.array_records["arrays"]["flat"]
    torn["arrays"] = ArrayRecord({"flat": Array(array.dtype, array.shape, array.stype, array.data[:-3])})
    codes = []
    for bad in (no_metrics, two, named, torn):
        with pytest.raises(PayloadError) as caught:
            read_reply("a", bad, expectation())
        codes.append(caught.value.reason)
    assert codes == ["weight", "manifest", "manifest", "size"]


def test_metrics_are_kept_only_if_they_are_plain_finite_scalars():
    odd = reply()
    odd["metrics"] = MetricRecord(
        {"num-examples": 3, "loss": float("nan"), "DOE^JANE": 1.0, "list": [1.0], "kept": 0.5}
    )
    assert read_reply("a", odd, expectation()).metrics == {"kept": 0.5}
