"""Asking the sites: an answer whose end does not come holds up neither the others nor the round."""

import threading
from uuid import uuid4

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from server.conversation import ask

PATIENCE = 20.0  # seconds after which a test that hangs goes on, and fails


class Slow:
    """A grid that waits for the rest of north's answer, as Flower's does when its first bytes are there.

    Args:
        rest: when it is there.
    """

    def __init__(self, rest):
        self.rest, self.sent, self.asked, self.fetched = rest, {}, 0, threading.Event()
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

    def push_messages(self, messages):
        (message,) = messages
        message.metadata.__dict__["_message_id"] = str(uuid4())
        self.sent[message.metadata.message_id] = message
        return [message.metadata.message_id]

    def pull_messages(self, ids):
        message = self.sent[ids[0]]
        name = str(message.content.config_records["config"]["site"])
        if name == "broken":
            raise ConnectionError("no SuperLink")
        if name == "north" and not self.rest(self).wait(PATIENCE):
            return []
        if name == "south":
            self.asked += 1
            if self.asked == 1:  # it is still at work
                return []
            self.fetched.set()
        return [Message(message.content, reply_to=message)]


def asked(grid, timeout, *names):
    letters = {
        name: (number, RecordDict({"config": ConfigRecord({"site": name})}))
        for number, name in enumerate(names, 1)
    }
    return ask(grid, letters, "train", timeout, "1")


def test_who_never_sends_the_rest_is_silent_and_alone_in_that():
    """Before, the round lasted until Flower gave up, and whoever answered meanwhile was silent too."""
    rest = threading.Event()
    grid = Slow(lambda _: rest)
    answers = asked(grid, 5.0, "north", "south")
    rest.set()
    assert answers.silent == ["north"] and set(answers.replies) == {"south"}


def test_an_answer_whose_rest_comes_after_the_next_one_counts():
    grid = Slow(lambda grid: grid.fetched)
    answers = asked(grid, PATIENCE / 2, "north", "south")
    assert not answers.silent and set(answers.replies) == {"north", "south"}


def test_an_error_of_the_grid_is_the_callers():
    with pytest.raises(ConnectionError, match="no SuperLink"):
        asked(Slow(lambda _: threading.Event()), PATIENCE, "broken")
