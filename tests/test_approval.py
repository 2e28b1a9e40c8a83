"""A person approves what was shown, and nothing else that waits in its place."""

import threading
import time

import numpy as np
import pytest

from sparsecontrast.approval import FOLDER, decide, digest, wait_for_approval, waiting
from sparsecontrast.errors import ConfigError, HeldError

A = {"sha256": "a" * 64, "tensors": [], "bytes": 12, "metrics": {"loss": 1.5}}


class Release:
    """One that waits in a thread; ``end`` tells how it ended."""

    def __init__(self, folder, facts, seconds=60.0, name="run-0001"):
        self.outcome = "released"
        arguments = (folder, name, facts, np.zeros(3), seconds)
        self.thread = threading.Thread(target=self._wait, args=arguments)
        self.thread.start()
        while digest(facts) not in map(digest, waiting(folder).values()) and self.thread.is_alive():
            time.sleep(0.01)

    def _wait(self, *arguments):
        try:
            wait_for_approval(*arguments)
        except HeldError as error:
            self.outcome = str(error)

    def end(self):
        self.thread.join(60)
        assert not self.thread.is_alive()
        return self.outcome


@pytest.mark.parametrize(
    "other", [{"sha256": "b" * 64}, {"metrics": {"loss": 2.5}}], ids=["bytes", "metrics"]
)
def test_an_approval_is_for_what_was_looked_at_not_for_the_round(tmp_path, other):
    first = Release(tmp_path, A, 0.3)
    (name,) = waiting(tmp_path)
    assert "nobody approved" in first.end()
    second = Release(tmp_path, {**A, **other})
    with pytest.raises(ConfigError, match="does not wait"):
        decide(tmp_path, name, True)
    (now,) = waiting(tmp_path)
    with pytest.raises(ConfigError, match="look at it again; nothing was decided"):
        decide(tmp_path, now, True, digest(A))
    assert second.thread.is_alive() and not list((tmp_path / FOLDER).glob("*.approved"))
    decide(tmp_path, now, True, digest({**A, **other})[:8].upper())
    assert second.end() == "released" and not list((tmp_path / FOLDER).iterdir())


def test_the_longest_run_key_that_a_server_may_give_can_be_approved(tmp_path):
    waits = Release(tmp_path, A, name=f"{64 * 'f'}-1000000")
    (name,) = waiting(tmp_path)
    decide(tmp_path, name, True)
    assert waits.end() == "released"


@pytest.mark.parametrize("text", ["", "a" * 64])
def test_an_approval_of_other_bytes_releases_nothing(tmp_path, text):
    """Such as a file that was made by hand, or was put there before."""
    waits = Release(tmp_path, A)
    (name,) = waiting(tmp_path)
    (tmp_path / FOLDER / f"{name}.approved").write_text(text)
    outcome = waits.end()
    assert "what was approved is" in outcome and digest(A) in outcome
    assert not list((tmp_path / FOLDER).iterdir())


@pytest.mark.parametrize("sha256", ["", "abc", "z" * 64])
def test_a_digest_that_is_none_decides_nothing(tmp_path, sha256):
    waits = Release(tmp_path, A)
    (name,) = waiting(tmp_path)
    with pytest.raises(ConfigError, match="nothing was decided"):
        decide(tmp_path, name, True, sha256)
    decide(tmp_path, name, False)
    assert "denied by a person" in waits.end()
