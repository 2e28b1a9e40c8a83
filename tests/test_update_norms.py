"""One site moves the global weights as far as its neighbours do and not much farther, whatever it sends."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord

from server.norms import BEYOND, MULTIPLE, bound_of, hold, shortened
from server.spool import Spool
from server.strategy import OF_THE_MEAN, STRATEGIES, Contribution
from sparsecontrast import checkpoint, payload
from sparsecontrast.config import compose
from tests.federations import DirectGrid, partitions, rows, serve, words

SIZE = 50
AUTO = compose([]).federation


def told(**changes):
    return dataclasses.replace(AUTO, **changes)


def vector(seed, length):
    found = np.random.default_rng(seed).standard_normal(SIZE).astype(np.float32)
    return found * np.float32(length / payload.norm(found))


def replies(spool, reference, lengths):
    made = []
    for i, length in enumerate(lengths):
        flat = reference + vector(i + 1, length)
        one = Contribution(f"s{i}", flat, 10, {}, payload.norm(flat - reference))
        made.append(spool.keep(one))
    return made


# ---- the bound


def test_fewer_than_half_of_the_replies_cannot_move_the_bound_past_the_honest_ones():
    generator = np.random.default_rng(0)
    for _ in range(200):
        n = int(generator.integers(3, 12))
        honest = generator.uniform(1, 2, n - (n - 1) // 2)
        lies = 10 ** generator.uniform(-6, 6, (n - 1) // 2)
        bound = bound_of(generator.permutation([*honest, *lies]).tolist(), AUTO)
        assert bound is not None and bound <= MULTIPLE * honest.max()
        if (lies > 2).all():  # long lies alone shorten nobody who is honest
            assert bound >= honest.max()


def test_of_two_replies_nobody_knows_which_is_the_usual_one():
    assert bound_of([1.0, 300.0], AUTO) is None
    assert bound_of([], AUTO) is None
    assert bound_of([1.0, 300.0], told(update_norm=2.0)) == 2.0


def test_where_nobody_moves_nobody_is_refused():
    assert bound_of([0.0, 0.0, 1.0], AUTO) is None


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_auto_is_for_strategies_of_the_mean_and_a_number_for_all(strategy):
    lengths = [1.0, 1.0, 9.0]
    assert (bound_of(lengths, told(strategy=strategy)) is None) == (strategy not in OF_THE_MEAN)
    assert bound_of(lengths, told(strategy=strategy, update_norm=2.5)) == 2.5
    assert bound_of(lengths, told(strategy=strategy, update_norm="none")) is None


def test_an_update_is_shortened_in_its_own_direction_and_one_far_beyond_is_refused(tmp_path):
    reference = vector(0, 7.0)
    with Spool(tmp_path / "replies") as spool:
        given = replies(spool, reference, [1.0, 1.1, 1.2, 1.19 * MULTIPLE, 8.0, 1.23 * MULTIPLE * BEYOND])
        before = [reply.flat for reply in given]
        bound = bound_of([reply.update_norm for reply in given], AUTO)
        assert bound == pytest.approx(MULTIPLE * 1.2, rel=1e-5)  # s3 is just below it
        kept, refused = hold(given, reference, bound, spool)
        assert refused == {"s5": "payload_update_norm"}
        assert [(reply.site, reply.clipped) for reply in kept] == [
            ("s0", False), ("s1", False), ("s2", False), ("s3", False), ("s4", True),
        ]  # fmt: skip
        for was, reply in zip(before[:4], kept[:4], strict=True):
            assert reply.flat.tobytes() == was.tobytes()
        np.testing.assert_allclose(
            kept[4].flat - reference, (before[4] - reference) * (bound / 8.0), atol=2e-6
        )
        assert kept[4].update_norm == pytest.approx(8.0, rel=1e-5)  # what it was is what is told
        assert len(list(spool.folder.iterdir())) == 6  # in place: the disk holds one model a site


def test_where_most_sites_hardly_move_an_honest_one_is_shortened_and_not_refused(tmp_path):
    """Lengths of a first round, in which the learning rate of the first step is 0, and one site has three."""
    reference = vector(0, 30.0)
    with Spool(tmp_path / "replies") as spool:
        given = replies(spool, reference, [0.0076, 0.0076, 0.4755])
        bound = bound_of([reply.update_norm for reply in given], AUTO)
        kept, refused = hold(given, reference, bound, spool)
    assert not refused and [reply.clipped for reply in kept] == [False, False, True]


def test_a_shortened_update_has_the_length_it_may_have():
    reference = vector(0, 100.0)
    for length in (1e-3, 1.0, 50.0):
        found = shortened(reference + vector(1, 60.0), reference, length)
        assert payload.norm(found - reference) == pytest.approx(length, rel=1e-2)


# ---- whole federations


def liar(site, factor):
    """A grid whose one site multiplies its update on the wire."""

    class Lying(DirectGrid):
        def push_messages(self, messages):
            (message,) = messages
            orders = message.content.config_records["config"]
            ids = super().push_messages([message])
            if orders.get("site") == site:
                reply, sent = self.waiting[ids[0]], message.content.array_records["arrays"]["flat"].numpy()
                update = reply.content.array_records["arrays"]["flat"].numpy() - sent
                flat = (sent + np.float32(factor) * update).astype(np.float32)
                manifest: dict[str, Any] = dict(reply.content.config_records["manifest"])
                manifest["sha256"] = payload.manifest_of(dict.fromkeys(manifest["names"], ()), "fp32", flat)[
                    "sha256"
                ]
                reply.content["arrays"] = ArrayRecord({"flat": Array(flat)})
                reply.content["manifest"] = ConfigRecord(manifest)
            return ids

    return Lying


def run(images, folder, kind=DirectGrid, *more):
    """Serve three sites of unlike sizes, with as many steps each: so their updates are about as long."""
    serve(partitions(3), words(images, folder, "train.steps=1", *more), kind=kind)
    return folder


def flat_of(folder, number):
    tensors = checkpoint.read_round(folder, number).tensors
    return np.concatenate([tensors[name].numpy().reshape(-1) for name in sorted(tensors)])


@pytest.fixture(scope="module")
def honest(images, tmp_path_factory):
    return run(images, tmp_path_factory.mktemp("honest") / "run")


def test_an_honest_run_has_the_bits_of_one_without_a_bound_and_tells_its_lengths(images, honest, tmp_path):
    free = run(images, tmp_path / "free", DirectGrid, "federation.update_norm=none")
    assert flat_of(free, 2).tobytes() == flat_of(honest, 2).tobytes()
    found = [row for row in rows(honest) if row["site"]]
    assert all(row["update_norm"] > 0 and row["clipped"] is False for row in found)


def test_an_update_of_300_lengths_is_refused_by_name_and_the_others_are_the_round(images, tmp_path):
    found = run(images, tmp_path / "run", liar("b", 300.0))
    for row in rows(found):
        if row["site"] == "b":
            assert (row["status"], row["code"], row["weight"]) == ("refused", "payload_update_norm", 0)
            assert row["update_norm"] > 0 and "clipped" not in row
        elif row["site"] is None:
            assert row["contributors"] == ["a", "c"] and row["refused"] == {"b": "payload_update_norm"}
    without = run(images, tmp_path / "without", liar("b", 300.0), "federation.update_norm=none")
    assert [row["refused"] for row in rows(without) if row["site"] is None] == [{}, {}]  # what it was before


@pytest.mark.parametrize("factor", [-10.0, 10.0])
def test_an_update_ten_times_as_long_moves_no_farther_than_the_bound(images, honest, tmp_path, factor):
    start = flat_of(honest, 0)
    one = run(images, tmp_path / "run", liar("b", factor), "federation.rounds=1")
    told_rows = {row["site"]: row for row in rows(one)}
    assert [told_rows[site]["clipped"] for site in "abc"] == [False, True, False]
    free = run(
        images, tmp_path / "free", liar("b", factor), *("federation.rounds=1", "federation.update_norm=none")
    )
    share, longest = (
        told_rows["b"]["weight"],
        MULTIPLE * sorted(r["update_norm"] for r in told_rows.values() if r["site"])[1],
    )
    length = told_rows["b"]["update_norm"]
    # the two runs differ by what was cut off the one update, at its share
    assert payload.norm(flat_of(free, 1) - flat_of(one, 1)) == pytest.approx(
        share * (length - longest), rel=1e-3
    )
    assert payload.norm(flat_of(one, 1) - start) < payload.norm(flat_of(free, 1) - start)


def test_a_run_that_is_continued_shortens_what_it_would_have_shortened(images, tmp_path):
    class Stopped(BaseException):
        pass

    kind = liar("b", 10.0)

    class Doomed(kind):
        def push_messages(self, messages):
            (message,) = messages
            if message.metadata.group_id == "2":
                raise Stopped
            return super().push_messages([message])

    whole = run(images, tmp_path / "whole", kind)
    with pytest.raises(Stopped):
        run(images, tmp_path / "cut", Doomed)
    serve(partitions(3), [f"resume={tmp_path / 'cut'}"], kind=kind)
    for folder in (whole, tmp_path / "cut"):
        last = [row for row in rows(folder) if row["round"] == 2]
        assert [row["clipped"] for row in last if row["site"]] == [False, True, False]
    assert flat_of(whole, 2).tobytes() == flat_of(tmp_path / "cut", 2).tobytes()
