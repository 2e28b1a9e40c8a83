"""Nodes that come after the run began, come back under another id, or claim a name that has its node."""

import logging
from contextlib import nullcontext

import pytest

from server.roll import DUPLICATE, deal
from simulation import run as simulation
from simulation.grid import FIRST_NODE, LocalGrid
from sparsecontrast import checkpoint
from tests.federations import DirectGrid, partitions, rows, serve, words, write_images
from tests.test_left_out import site_file

pytestmark = pytest.mark.usefixtures("impatient")
A, B, C, D = 10, 11, 12, 13  # node ids of a DirectGrid, in the order of its configs


class Changing(DirectGrid):
    """Nodes that come and go between rounds: ``there`` tells by the rounds that were which are there."""

    there: dict[int, tuple[int, ...]] = {}
    done = 0
    now: tuple[int, ...] = ()

    def get_node_ids(self):
        self.now = self.there[max(number for number in self.there if number <= self.done)]
        return list(self.now)

    def push_messages(self, messages):
        (message,) = messages
        self.done = int(str(message.content.config_records["config"].get("round", self.done)))
        if message.metadata.dst_node_id not in self.now:  # it waits for a node that is not there
            return [f"lost-{message.metadata.dst_node_id}"]
        return super().push_messages(messages)


def changing(there):
    return type("Changes", (Changing,), {"there": there})


@pytest.fixture
def hospitals(tmp_path):
    """Site files; each call gives one more node of a name."""

    def hospital(name, *more):
        folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        return site_file(folder, name, write_images(folder / "images", {"x": 4}), *more)

    return hospital


def told(tmp_path, *more):
    base = ("federation.rounds=3", "federation.connect_timeout=1", "federation.round_timeout=1")
    return words(tmp_path / "not-there.csv", tmp_path / "out", *base, *more)


def rounds(tmp_path):
    return [(r["contributors"], r["silent"]) for r in rows(tmp_path / "out") if r["site"] is None]


def test_a_site_that_starts_after_the_run_began_takes_part_from_then_on(tmp_path, hospitals, caplog):
    nodes = [hospital for hospital in map(hospitals, ("a", "b", "c"))]
    with caplog.at_level(logging.INFO, "flwr"):
        grid = serve(nodes, told(tmp_path), kind=changing({0: (A, B), 1: (A, B, C)}))
    assert rounds(tmp_path) == [(["a", "b"], []), (["a", "b", "c"], []), (["a", "b", "c"], [])]
    assert "2 of 3 sites are ready" in caplog.text and "round 2: c joins, 3 of 3 sites" in caplog.text
    assert len(grid.sent) == 3 + 2 + 3 + 3  # greeted once each
    assert checkpoint.read_meta(tmp_path / "out", 3)["counted"] == {"a": 3, "b": 3, "c": 3}


def test_a_site_comes_back_under_another_node_id(tmp_path, hospitals, caplog):
    """Registered anew it has another id, and the state of its rounds before."""
    again = hospitals("c")
    nodes = [hospitals("a"), hospitals("b"), again, again]
    with caplog.at_level(logging.INFO, "flwr"):
        serve(nodes, told(tmp_path), kind=changing({0: (A, B, C), 1: (A, B), 2: (A, B, D)}))
    assert rounds(tmp_path) == [(["a", "b", "c"], []), (["a", "b"], ["c"]), (["a", "b", "c"], [])]
    assert "round 3: c is back, on node 13" in caplog.text
    (row,) = (r for r in rows(tmp_path / "out") if (r["site"], r["round"]) == ("c", 3))
    assert row["state_round"] == 1  # not begun anew


def test_another_node_of_a_name_is_refused_while_its_own_is_there_and_has_it_after(
    tmp_path, hospitals, caplog
):
    nodes = [hospitals(name) for name in ("a", "b", "c", "c")]
    there = {0: (A, B, C), 1: (A, B, C, D), 2: (A, B, D)}
    serve(nodes, told(tmp_path), kind=changing(there))
    assert rounds(tmp_path) == [(["a", "b", "c"], [])] * 3
    asked = [r["state_round"] for r in rows(tmp_path / "out") if r["site"] == "c"]
    assert asked == [0, 1, 0]  # the other node has a state folder of its own
    assert caplog.text.count("round 2: c on node 13 is left out: duplicate_name (two nodes bear") == 1


def test_no_more_sites_than_the_run_has_are_let_in(tmp_path, hospitals, caplog):
    nodes = [hospitals(name) for name in ("a", "b", "c", "d")]
    serve(nodes, told(tmp_path), kind=changing({0: (A, B, C), 1: (A, B, C, D)}))
    assert rounds(tmp_path) == [(["a", "b", "c"], [])] * 3
    assert caplog.text.count("d on node 13 is left out: unused") == 1


def test_a_site_that_was_mended_joins_without_a_new_node(tmp_path, hospitals, caplog):
    odd = hospitals("odd", "backbone.depth=2")
    nodes = [hospitals("a"), hospitals("b"), odd]

    class Mended(changing({0: (A, B, C)})):
        def push_messages(self, messages):
            if messages[0].metadata.group_id == "2":
                (folder,) = tmp_path.glob("odd-*")
                text = (folder / "site.yaml").read_text()
                (folder / "site.yaml").write_text(text.replace("- backbone.depth=2\n", ""))
            return super().push_messages(messages)

    serve(nodes, told(tmp_path), kind=Mended)
    assert rounds(tmp_path) == [(["a", "b"], []), (["a", "b"], []), (["a", "b", "odd"], [])]
    assert caplog.text.count("odd is left out: backbone_mismatch") == 1


def test_a_new_node_that_does_not_answer_is_waited_for_once_and_heard_later(tmp_path, hospitals, monkeypatch):
    monkeypatch.setattr("server.roll.GREET_SECONDS", 0.2)
    waits = []

    class Slow(changing({0: (A, B), 1: (A, B, C)})):
        def pull_messages(self, message_ids):
            held = {i: m for i, m in self.waiting.items() if m.metadata.src_node_id == C and self.done < 2}
            for i in set(held) & set(message_ids):
                waits.append(i)
                del self.waiting[i]
            try:
                return super().pull_messages(message_ids)
            finally:
                self.waiting |= held

    serve([hospitals(name) for name in ("a", "b", "c")], told(tmp_path), kind=Slow)
    assert rounds(tmp_path) == [(["a", "b"], []), (["a", "b"], []), (["a", "b", "c"], [])]
    assert waits and len(set(waits)) == 1  # one greeting


def test_who_was_there_first_keeps_a_name_and_of_two_newcomers_neither_has_it():
    one = [("x", "")]
    assert deal({1: one, 2: one}, {}) == ({}, [("x", 1, DUPLICATE), ("x", 2, DUPLICATE)])
    assert deal({1: one, 2: one}, {"x": 2}) == ({"x": 2}, [("x", 1, DUPLICATE)])
    assert deal({1: [("x", ""), ("x", "")]}, {}) == ({}, [("x", 1, DUPLICATE)] * 2)
    assert deal({1: one, 2: [("x", "config"), ("y", "")]}, {"x": 1}) == (
        {"x": 1, "y": 2}, [("x", 2, DUPLICATE)],
    )  # fmt: skip
    assert deal({1: [("x", "config")]}, {}) == ({}, [("x", 1, "config")])


def test_in_worker_processes_a_node_that_is_added_takes_part(images, tmp_path):
    """The grid of ``python -m simulation``, bytes and processes and all."""
    first, second, late = partitions(3)
    with LocalGrid([first, second, {"site-config": "/not/there"}], 2) as grid:

        def push_messages(messages, push=grid.push_messages):
            if messages[0].metadata.group_id == "1":
                grid.nodes[FIRST_NODE + 3] = late
            return push(messages)

        grid.push_messages = push_messages
        simulation._serve(grid, nullcontext, words(images, tmp_path / "out"))
    assert rounds(tmp_path) == [(["a", "b"], []), (["a", "b", "c"], [])]


def test_looks_change_no_bit_of_a_run_in_which_nobody_comes_or_goes(images, tmp_path, monkeypatch):
    more = ("federation.rounds=2", "federation.fraction=0.6")
    serve(partitions(3), words(images, tmp_path / "looked", *more))
    monkeypatch.setattr("server.roll.Roll.look", lambda self, number: None)
    serve(partitions(3), words(images, tmp_path / "not", *more))
    one, two = (checkpoint.round_file(tmp_path / name, 2).read_bytes() for name in ("looked", "not"))
    assert one == two
