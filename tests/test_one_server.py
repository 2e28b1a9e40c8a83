"""Two servers never continue one run: the second waits for the first one's end, or says why it stops."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from server import folder
from server.folder import alone
from sparsecontrast.errors import StorageError

HOLD = """
import sys, time
from pathlib import Path
from server.folder import alone

with alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_server_is_refused_while_the_first_one_lives(tmp_path, other, monkeypatch):
    monkeypatch.setattr(folder, "OTHER_SECONDS", 0.3)
    with pytest.raises(StorageError, match="another server is at work"), alone(tmp_path):
        pass
    with alone(tmp_path / "another run"):
        pass


def test_a_killed_server_keeps_nobody_off_and_its_end_is_waited_for(tmp_path, other, monkeypatch):
    sleep = time.sleep

    def killing(seconds):
        other.kill()
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", killing)  # the first wait is the other's end
    with alone(tmp_path):
        assert other.poll() is not None


def test_the_folder_is_free_after_an_error_too(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "OTHER_SECONDS", 0.0)
    with pytest.raises(RuntimeError), alone(tmp_path):
        raise RuntimeError
    with alone(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"), alone(tmp_path / "file" / "run"):
        pass
