"""A round holds one reply in memory at a time, and nothing of a round stays on the disk."""

import tracemalloc

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.app import app as client_app
from server.conversation import ask
from server.rounds import _judge
from server.spool import Spool
from server.strategy import Aggregator, Contribution, bounded_weights
from server.verification import Expectation, records_of
from sparsecontrast import payload
from sparsecontrast.config import compose
from sparsecontrast.errors import StorageError
from tests.federations import DirectGrid

SIZE = 200_000
KEY = "0" * 32


@pytest.fixture(autouse=True)
def _identity(monkeypatch):
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def federation(strategy):
    return compose([f"federation.strategy={strategy}", "federation.sites=32"]).federation


def vector(i, size=SIZE):
    return np.random.Generator(np.random.PCG64(i)).normal(size=size).astype(np.float32)


class Echo(DirectGrid):
    """Nodes whose answer is made when it is fetched, each with weights of its own."""

    def push_messages(self, messages):
        ids = []
        for message in messages:
            ids.append(str(message.metadata.dst_node_id))
            message.metadata.__dict__["_message_id"] = ids[-1]
            self.waiting[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids):
        return [Message(answer(int(i)), reply_to=self.waiting.pop(i)) for i in message_ids]


def answer(node):
    packed = payload.pack({"backbone.w": torch.from_numpy(vector(node))}, ["backbone.w"], "fp32")
    status = {"status": "ok", "site": f"s{node}", "round": 1, "run_key": KEY}
    return RecordDict({
        **records_of(packed), "status": ConfigRecord(status),
        "metrics": MetricRecord({"num-examples": 1 + node}),
    })  # fmt: skip


def peak_of_a_round(sites, folder, strategy="fedavg"):
    grid = Echo([{} for _ in range(sites)], client_app)
    letters = {f"s{node}": (node, RecordDict()) for node in grid.get_node_ids()}
    aggregator, current = Aggregator(federation(strategy)), vector(0)
    expected = Expectation(1, KEY, {"backbone.w": (SIZE,)}, "fp32", "weights", current, 10)
    tracemalloc.start()
    with Spool(folder) as spool:
        answers = ask(
            grid, letters, "train", 60, "1", lambda name, content: _judge(name, content, expected, spool)
        )
        replies = [judged.reply for judged in answers.replies.values()]
        assert len(replies) == sites and all(replies)
        aggregator.aggregate(1, current, replies)
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_of_a_round_does_not_grow_with_the_number_of_sites(tmp_path):
    few, many = (peak_of_a_round(sites, tmp_path / "replies") for sites in (3, 30))
    assert many - few < 4 * SIZE  # less than one model for 27 more sites
    assert peak_of_a_round(30, tmp_path / "replies", "median") - few > 20 * 4 * SIZE  # it can be seen


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fedadam", "fedyogi", "fedavgm"])
def test_streamed_is_bit_for_bit_what_flower_makes_of_all_replies_at_once(strategy, tmp_path):
    streamed, at_once = Aggregator(federation(strategy)), Aggregator(federation(strategy))
    current = mine = vector(99, 500)
    with Spool(tmp_path / "replies") as spool:
        for number in (1, 2):
            given = [Contribution(f"s{i}", vector(7 * number + i, 500), 3 + i, {}) for i in range(5)]
            mine = streamed.aggregate(number, mine, [spool.keep(reply) for reply in given])
            weights = bounded_weights([r.examples for r in given], "examples", at_once.config.max_weight)
            at_once._remember(current)
            messages = [
                Message(
                    RecordDict({"arrays": ArrayRecord({"flat": Array(r.flat)}),
                                "metrics": MetricRecord({"num-examples": w})}),
                    dst_node_id=0, message_type="train")
                for r, w in zip(given, weights, strict=True)
            ]  # fmt: skip
            arrays, _ = at_once.strategy.aggregate_train(number, messages)
            current = arrays["flat"].numpy().astype(np.float32)
            np.testing.assert_array_equal(mine, current)
    for name, tensor in at_once.state().items():
        np.testing.assert_array_equal(tensor, streamed.state()[name])


def test_what_a_killed_round_left_goes_and_nothing_stays(tmp_path):
    (tmp_path / "replies").mkdir()
    (tmp_path / "replies" / "0000.npy").write_bytes(b"torn")
    reply = Contribution("s", vector(1, 5), 1, {})
    with Spool(tmp_path / "replies") as spool:
        kept = spool.keep(reply)
        np.testing.assert_array_equal(kept.flat, reply.flat)
        assert len(list(spool.folder.iterdir())) == 1
    assert not (tmp_path / "replies").exists()


def test_a_disk_that_takes_no_more_is_said(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with Spool(tmp_path / "replies") as spool:
        monkeypatch.setattr(np, "save", full)
        with pytest.raises(StorageError, match="No space left.*resume="):
            spool.keep(Contribution("s", vector(1, 5), 1, {}))
