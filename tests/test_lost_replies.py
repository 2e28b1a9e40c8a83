"""Updates in 8 bits, and replies that never counted: what rounding left of earlier ones is still sent."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import Error, Message

from client.rounds import KeptRounds
from sparsecontrast import checkpoint
from sparsecontrast.checkpoint import read_tensors, write_tensors
from sparsecontrast.deltas import pack_upload
from tests.federations import DirectGrid, partitions, rows, serve, words

SIZE, ROUNDS = 40, 12
LARGE, SMALL = (
    1.0,
    0.0015,
)  # the small ones are below half a step of 1 / 127: they arrive by what is left over
UPDATE = np.array([LARGE] + [SMALL] * (SIZE - 1), np.float32)


class Local:
    """The state of a trainer that has none."""

    def save(self, path):
        write_tensors(path, {"none": torch.zeros(1)})

    def load(self, path):
        read_tensors(path)


def site(folder, lost, told=True):
    """Run the rounds of one site that always wants the same step; returns the weights and all that arrived.

    Args:
        folder: of the site.
        lost: rounds whose replies the server never joins.
        told: whether the orders say which round counted last.
    """
    trainer, weights, counted = SimpleNamespace(local=Local()), np.zeros(SIZE, np.float32), 0
    for number in range(1, ROUNDS + 1):
        kept = KeptRounds(folder / "state", folder)
        owed = kept.residual(kept.restore(trainer, number), counted if told else None)
        state = {"backbone.w": torch.from_numpy(weights + UPDATE)}
        packed, left = pack_upload(state, list(state), "delta_int8", "fp32", weights, owed)
        kept.save(trainer, number, left, owed)
        if number not in lost:
            arrived = packed.flat.astype(np.float32) * np.float32(packed.manifest["scales"][0])
            weights, counted = weights + arrived, number
    return weights


LOSSES = [set(), {3}, {6}, {3, 6, 9}, {4, 5, 6, 7}, {1, 2}, {11}]


@pytest.mark.parametrize("lost", LOSSES, ids=str)
def test_a_lost_reply_costs_its_own_update_and_nothing_of_those_before(lost, tmp_path):
    """An exact run with the same losses is met to half a step of rounding, wherever they fall."""
    exact = (ROUNDS - len(lost)) * UPDATE.astype(np.float64)
    step = (LARGE + SMALL * ROUNDS) / 127
    assert np.abs(site(tmp_path, lost) - exact).max() <= step / 2 + 1e-6


def test_without_being_told_a_site_loses_what_it_owed(tmp_path):
    """The same measure sees the fault: one reply lost in the wrong place costs more than its own update."""
    step = (LARGE + SMALL * ROUNDS) / 127
    worst = max(
        float(np.abs(site(tmp_path / f"{n}", {n}, told=False) - (ROUNDS - 1) * UPDATE)[1:].max())
        for n in range(1, ROUNDS)
    )
    assert worst > step / 2 + 1e-6


@pytest.mark.parametrize("counted", [None, 2, 5])
def test_where_every_reply_counts_it_is_what_rounding_left(counted, tmp_path):
    kept, left, before = KeptRounds(tmp_path, tmp_path), UPDATE * 2, UPDATE * 3
    kept.save(SimpleNamespace(local=Local()), 2, left, before)
    np.testing.assert_array_equal(kept.residual(2, counted), left)
    np.testing.assert_array_equal(kept.residual(2, 1), before)
    assert kept.residual(3, counted) is None


def test_before_the_first_reply_that_counts_nothing_is_owed(tmp_path):
    kept = KeptRounds(tmp_path, tmp_path)
    kept.save(SimpleNamespace(local=Local()), 1, UPDATE, None)
    assert kept.residual(1, 0) is None


# ---- whole federations


class Losing(DirectGrid):
    """The node of b fails on the way back, in round 2; and the orders of each round are kept."""

    orders: dict = {}

    def push_messages(self, messages):
        (message,) = messages
        ids = super().push_messages([message])
        told = message.content.config_records["config"]
        if "round" in told:
            self.orders[told["site"], told["round"]] = told["counted"]
        if (told.get("site"), message.metadata.group_id) == ("b", "2"):
            self.waiting[ids[0]] = Message(Error(1, "gone"), reply_to=message)
        return ids


def left(folder, name, number):
    (file,) = (folder / "sites" / name / "state").glob(f"*/residual_{number:04d}.safetensors")
    return {key: tensor.numpy() for key, tensor in read_tensors(file).items()}


def test_the_server_tells_each_site_what_counted_and_remembers_it_when_continued(images, tmp_path):
    class Stopped(BaseException):
        pass

    class Doomed(Losing):
        def push_messages(self, messages):
            if messages[0].metadata.group_id == "3":
                raise Stopped
            return super().push_messages(messages)

    more = ("federation.upload=delta_int8", "federation.rounds=3", "train.steps=1")
    Losing.orders = {}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    serve(partitions(3), words(images, whole, *more), kind=Losing)
    wanted = {(s, n): n - 1 for s in "abc" for n in (1, 2, 3)} | {("b", 3): 1}
    assert Losing.orders == wanted
    with pytest.raises(Stopped):
        serve(partitions(3), words(images, cut, *more), kind=Doomed)
    Losing.orders = {}
    serve(partitions(3), [f"resume={cut}"], kind=Losing)
    assert Losing.orders == {key: n for key, n in wanted.items() if key[1] == 3}
    file = checkpoint.round_file(whole, 3)
    assert checkpoint.round_file(cut, 3).read_bytes() == file.read_bytes()
    # a owes what rounding left of round 2; b what it owed then, for the server has nothing of its round 2
    np.testing.assert_array_equal(left(whole, "a", 3)["before"], left(whole, "a", 2)["residual"])
    np.testing.assert_array_equal(left(whole, "b", 3)["before"], left(whole, "b", 2)["before"])
    assert not np.array_equal(left(whole, "b", 2)["before"], left(whole, "b", 2)["residual"])
    assert [row["refused"] for row in rows(whole) if row["site"] is None] == [{}, {"b": "flower_1"}, {}]
