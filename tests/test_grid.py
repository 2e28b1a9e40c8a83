"""The local grid: real bytes, reused workers, and no worker's death or sleep stops a run."""

import os

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from server.conversation import ask
from simulation.grid import LocalGrid


@pytest.fixture(scope="module")
def grid():
    nodes = [{"partition-id": i, "num-partitions": 3} for i in range(3)]
    with LocalGrid(nodes, 2, "tests.apps:toy", preload="flwr") as running:
        yield running
    assert not [pid for pid in running.pids if os.path.exists(f"/proc/{pid}")]


def letter(node, task="echo"):
    arrays = ArrayRecord({"flat": Array(np.arange(4, dtype=np.float32) + node)})
    return node, RecordDict({"arrays": arrays, "config": ConfigRecord({"task": task})})


def exchange(grid, tasks, timeout=60.0):
    nodes = list(grid.get_node_ids())
    letters = {f"s{i}": letter(nodes[i], task) for i, task in enumerate(tasks)}
    return ask(grid, letters, "train", timeout, "1")


def test_messages_go_to_their_node_and_back(grid):
    answers = exchange(grid, ["echo"] * 3)
    assert sorted(answers.replies) == ["s0", "s1", "s2"]
    for i, node in enumerate(grid.get_node_ids()):
        reply = answers.replies[f"s{i}"]
        assert reply.config_records["told"]["partition-id"] == i
        assert reply.config_records["told"]["threads"] == "1"
        want = 2 * (np.arange(4, dtype=np.float32) + node)
        np.testing.assert_array_equal(reply.array_records["arrays"]["flat"].numpy(), want)


def test_workers_are_reused_over_rounds(grid):
    told = [exchange(grid, ["echo"] * 3).replies for _ in range(3)]
    pids = {r.config_records["told"]["pid"] for replies in told for r in replies.values()}
    assert pids <= set(grid.pids)
    assert len(grid.pids) == 2


def test_a_reply_that_comes_twice_at_once_counts_once(grid):
    class Twice:
        push_messages, idle = grid.push_messages, grid.idle

        def pull_messages(self, ids):
            return [message for message in grid.pull_messages(ids) for _ in range(2)]

    answers = ask(Twice(), {"s0": letter(next(iter(grid.get_node_ids())))}, "train", 60.0, "1")
    assert list(answers.replies) == list(answers.seconds) == ["s0"] and not answers.silent


def test_a_dying_worker_is_an_error_reply_and_is_replaced(grid):
    before = set(grid.pids)
    answers = exchange(grid, ["echo", "die", "echo"])
    assert sorted(answers.replies) == ["s0", "s2"]
    assert list(answers.errors) == ["s1"]
    assert len(set(grid.pids) - before) == 1
    assert len(exchange(grid, ["echo"] * 3).replies) == 3


def test_a_worker_killed_between_messages_is_replaced(grid):
    os.kill(grid.pids[0], 9)
    os.waitid(os.P_PID, grid.pids[0], os.WEXITED | os.WNOWAIT)  # ended, and not yet noticed by the grid
    assert len(exchange(grid, ["echo"] * 3).replies) == 3


def test_a_hanging_site_is_named_and_its_worker_is_replaced(grid):
    exchange(grid, ["echo"] * 3)  # both workers are up
    answers = exchange(grid, ["echo", "hang", "echo"], timeout=3.0)
    assert sorted(answers.replies) == ["s0", "s2"]
    assert "s1" in answers.silent or "s1" in answers.errors
    assert len(exchange(grid, ["echo"] * 3).replies) == 3


def test_all_workers_hanging_does_not_keep_the_queue_waiting(grid):
    exchange(grid, ["echo"] * 3)
    answers = exchange(grid, ["hang"] * 3, timeout=2.0)
    assert not answers.replies
    assert sorted([*answers.silent, *answers.errors]) == ["s0", "s1", "s2"]
    assert len(exchange(grid, ["echo"] * 3).replies) == 3


def test_an_exception_in_a_foreign_app_is_an_error_reply(grid):
    answers = exchange(grid, ["raise", "echo", "echo"])
    assert list(answers.errors) == ["s0"]
    assert "DOE" not in str(answers.errors)


def test_send_and_receive_is_flowers_interface(grid):
    node, content = letter(next(iter(grid.get_node_ids())))
    replies = grid.send_and_receive([Message(content, node, "train")], timeout=60)
    assert [reply.metadata.src_node_id for reply in replies] == [node]
