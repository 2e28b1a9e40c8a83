"""The last look: whatever the app says, only what may leave does, and the log knows of it first."""

import functools
import json
import threading
import time

import numpy as np
import pytest
import yaml
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.clientapp import ClientApp

from client.app import hello
from client.app import train as honest
from client.guard import guard
from sparsecontrast import cli, payload
from sparsecontrast.approval import digest, waiting
from sparsecontrast.egress import EgressLog
from sparsecontrast.errors import FederationError
from sparsecontrast.overrides import assign
from tests.federations import rows, serve, words, write_images
from tests.test_leaves import messages
from tests.test_private_federation import PRIVATE


def site(folder, name="x", egress=None, more=()):
    index = write_images(folder / name / "images", {name: 6}, prefix=f"{name}-")
    own = [assign("data.index", index), "data.min_images=2", *more]
    told = {"name": name, "state_dir": str(folder / name / "state"), "overrides": own}
    (folder / name / "site.yaml").write_text(yaml.safe_dump(told | ({"egress": egress} if egress else {})))
    return {"site-config": str(folder / name / "site.yaml")}


def told(folder, *more):
    base = words(folder / "none.csv", folder / "run", "federation.sites=1", "federation.min_sites=1")
    return [*base, "method=patch_contrast", "federation.rounds=1", *more]


def liar(change):
    """An app whose answers are spoilt after honest training, behind the guard."""
    app = ClientApp(mods=[guard])
    app.query("hello")(hello)

    @app.train()
    def train(message, context):
        reply = honest(message, context)
        change(reply.content)
        return reply

    return app


def scaled(content):
    flat = content["arrays"]["flat"].numpy() * 1e6
    content["arrays"] = ArrayRecord({"flat": Array(flat)})
    content["manifest"] = ConfigRecord(payload.repack(flat, shapes(content["manifest"]), "fp32").manifest)


def renamed(content):
    content["manifest"] = ConfigRecord(
        {**content["manifest"], "names": ["backbone.images", *content["manifest"]["names"][1:]]}
    )


def shapes(manifest):
    return {n: payload.parse_shape(s) for n, s in zip(manifest["names"], manifest["shapes"], strict=True)}


def one_more(content):
    content["arrays"] = ArrayRecord({**content["arrays"], "pixels": Array(np.zeros(4, dtype=np.float32))})


LIES = {
    "a norm blown up": scaled,
    "a foreign tensor name": renamed,
    "a second array": one_more,
    "a record of its own": lambda c: c.update({"extra": ConfigRecord({"x": "y"})}),
    "a metric not on the list": lambda c: c.update(
        {"metrics": MetricRecord({**c["metrics"], "mean-age": 61.0})}
    ),
    "a path in the status": lambda c: c.update(
        {"status": ConfigRecord({**c["status"], "site": "/data/DOE"})}
    ),
    "a key of its own in the status": lambda c: c.update(
        {"status": ConfigRecord({**c["status"], "note": "hi"})}
    ),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_what_may_not_leave_is_held_back_and_the_server_hears_a_code(tmp_path, lie):
    node = site(tmp_path)
    with pytest.raises(FederationError):
        grid = serve([node], told(tmp_path), liar(lie))
        assert grid
    log = (tmp_path / "x" / "state" / "client.log").read_text()
    assert "held back: egress" in log
    greeting, answer = EgressLog(tmp_path / "x" / "state").rows()  # the log tells of what left: a code
    assert (greeting.kind, answer.kind, answer.content["code"]) == ("hello", "train", "egress")
    assert "sha256" not in answer.content


SCALARS = ("num-examples", "steps", "delta", "noise_multiplier", "noise_to_signal", "keep")


def changed(key, metrics):
    """An app that hides something in the last digits of a number that may leave."""
    assert metrics[key]
    return {**metrics, key: metrics[key] + (1 if isinstance(metrics[key], int) else 1e-9)}


@pytest.mark.parametrize(
    "change",
    [
        lambda m: {**m, "loss": 1.0},
        lambda m: {k: v for k, v in m.items() if k != "epsilon"},
        lambda m: {**m, "epsilon": 0.1},
        lambda m: {**m, "seconds": 3.0},
        *(functools.partial(changed, key) for key in SCALARS),
        lambda m: {**m, "state-round": 7},
        lambda m: {**m, "state-round": 0.25},
    ],
    ids=["a loss", "no epsilon", "a smaller epsilon", "a duration", *SCALARS, "a later round", "no round"],
)
def test_a_private_round_tells_neither_more_nor_other_than_the_ledger(tmp_path, change):
    node = site(tmp_path, more=[*PRIVATE, "privacy.planned_rounds=2"])

    def lie(content):
        content["metrics"] = MetricRecord(change(dict(content["metrics"])))

    with pytest.raises(FederationError):
        serve([node], told(tmp_path), liar(lie))
    assert "held back: egress" in (tmp_path / "x" / "state" / "client.log").read_text()


def test_a_private_round_that_was_never_charged_does_not_leave(tmp_path, monkeypatch):
    """An app that trains without its ledger: the guard asks the ledger itself."""
    from sparsecontrast.account import Account
    from sparsecontrast.ledger import Receipt

    def unpaid(self, number):
        from sparsecontrast.accounting import Charge

        self._left = self.steps_per_round
        charge = Charge(self.mechanism.noise_multiplier, self.mechanism.sample_rate, self.steps_per_round)
        return Receipt(1, "0" * 64, 1, self.policy, charge, 1.0)

    node = site(tmp_path, more=[*PRIVATE, "privacy.planned_rounds=2"])
    monkeypatch.setattr(Account, "reserve", unpaid)
    with pytest.raises(FederationError):
        serve([node], told(tmp_path))
    assert "held back: ledger" in (tmp_path / "x" / "state" / "client.log").read_text()


def test_the_log_tells_tensors_norms_and_digest_of_the_bytes_that_left(tmp_path):
    node = site(tmp_path, more=[*PRIVATE, "privacy.planned_rounds=2"])
    grid = serve([node], told(tmp_path, "federation.rounds=2"))
    log = EgressLog(tmp_path / "x" / "state").rows()
    assert [r.kind for r in log] == ["hello", "train", "train"]
    answers = [m.content for m in messages(grid.sent) if m.content.array_records]
    found = rows(tmp_path / "run")
    for row, content in zip(log[1:], answers, strict=True):
        facts, manifest = row.content, content["manifest"]
        assert facts["sha256"] == manifest["sha256"] and facts["metrics"] == dict(content["metrics"])
        assert [t[0] for t in facts["tensors"]] == manifest["names"]
        parts = payload.unpack(payload.Payload(content["arrays"]["flat"].numpy(), dict(manifest)))
        for name, _, norm in facts["tensors"]:
            assert norm == pytest.approx(float(parts[name].norm()), rel=1e-4)
        assert (
            facts["epsilon"] == [r["epsilon"] for r in found if r["round"] == facts["round"] and r["site"]][0]
        )
    assert cli.main(["egress", "verify", str(tmp_path / "x" / "state")]) == 0
    assert cli.main(["egress", "list", str(tmp_path / "x" / "state")]) == 0


def test_an_error_is_logged_too_and_a_broken_log_stops_everything(tmp_path):
    node = site(tmp_path)
    serve([node], told(tmp_path))
    state = tmp_path / "x" / "state"
    log = EgressLog(state)
    text = log.path.read_text()
    log.path.write_text(text.replace("hello", "jello", 1))
    with pytest.raises(FederationError, match="egress"):
        serve([node], told(tmp_path / "again"))
    assert cli.main(["egress", "verify", str(state)]) == 2


@pytest.mark.parametrize("approve", [True, False])
def test_a_person_decides(tmp_path, approve, capsys):
    node = site(tmp_path, egress={"approve": "manual", "wait_seconds": 60})
    state, seen = tmp_path / "x" / "state", {}

    def person():
        while not (found := waiting(state)):
            time.sleep(0.05)
        (name,) = found
        seen.update(found[name])
        seen["array"] = np.load(state / "pending" / f"{name}.npy", allow_pickle=False)
        listed = [cli.main(["egress", "list", str(state)]), capsys.readouterr().out]
        sha256 = digest(found[name])
        assert (
            f"waits: {name}: " in listed[1] and name.endswith(sha256[:12]) and f"sha256 {sha256}" in listed[1]
        )
        action = "approve" if approve else "deny"
        seen["refused"] = cli.main(["egress", action, str(state), name, "--sha256", "0" * 64])
        cli.main(["egress", action, str(state), name, "--sha256", sha256])

    thread = threading.Thread(target=person)
    thread.start()
    try:
        if approve:
            serve([node], told(tmp_path))
        else:
            with pytest.raises(FederationError):
                serve([node], told(tmp_path))
            assert "held back: held" in (state / "client.log").read_text()
    finally:
        thread.join(30)
    assert seen["refused"] == 2
    assert seen["bytes"] == seen["array"].nbytes and seen["metrics"]["num-examples"] == 6
    told_of = [(r.kind, r.content["status"], "sha256" in r.content) for r in EgressLog(state).rows()]
    assert told_of == [("hello", "ok", False), ("train", "ok" if approve else "error", approve)]
    assert not list((state / "pending").iterdir())


def test_nobody_answers(tmp_path, capsys):
    node = site(tmp_path, egress={"approve": "manual", "wait_seconds": 0.3})
    with pytest.raises(FederationError, match="held"):
        serve([node], told(tmp_path))
    assert cli.main(["egress", "approve", str(tmp_path / "x" / "state"), "none"]) == 2
    assert "waiting: nothing" in capsys.readouterr().err


@pytest.mark.parametrize("egress", [{"approve": "maybe"}, {"wait": 3}, ["manual"], {"max_norm_ratio": 0.5}])
def test_an_impossible_policy_is_refused_before_anything(tmp_path, egress):
    node = site(tmp_path, egress=egress)
    with pytest.raises(FederationError, match="config"):
        serve([node], told(tmp_path, "federation.connect_timeout=2"))
    assert "egress" in (tmp_path / "x" / "client.log").read_text()


def test_simulated_sites_have_a_log_each(tmp_path):
    from tests.federations import partitions

    index = write_images(tmp_path / "images", {"a": 5, "b": 5})
    base = words(index, tmp_path / "run", "federation.sites=2", "federation.rounds=2")
    serve(partitions(2), base)
    for name in "ab":
        folder = tmp_path / "run" / "sites" / name
        assert [r.kind for r in EgressLog(folder).rows()] == ["hello", "train", "train"]
        assert json.loads((folder / "egress.jsonl").read_text().splitlines()[0])["number"] == 1
