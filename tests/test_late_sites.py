"""Real processes: a site that starts when a run is under way, and one that is registered anew meanwhile."""

import json
import threading
import time

import pytest

from simulation.deploy import Deployment
from sparsecontrast.provision import change
from tests.federations import MODEL, rows

pytestmark = pytest.mark.e2e
MANY = 200  # rounds; the test ends the run when it has seen what it waits for


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """North and south; west is registered and not started."""
    with Deployment(tmp_path_factory.mktemp("late"), patients=8) as running:
        running.provision()
        running.start(("north", "south"))
        yield running
    assert not running.processes()


def seen(federation, true, seconds=400):
    """Wait for a whole round of which something is true; returns its row."""
    deadline, file = time.monotonic() + seconds, federation.folder / "run" / "metrics.jsonl"
    while time.monotonic() < deadline:
        whole = [r for r in rows(federation.folder / "run") if r["site"] is None] if file.exists() else []
        if found := [row for row in whole if true(row)]:
            return found[0]
        time.sleep(0.2)
    raise AssertionError(federation.end("superlink"))


def number_of(federation):
    told = json.loads(federation.tell("flower.sh", "list", "loopback", "--format", "json"))
    return str(told["runs"][0]["run-id"])


def test_a_site_that_starts_late_takes_part_and_one_under_a_new_node_id_takes_part_again(federation):
    words = [
        *MODEL,
        f"federation.rounds={MANY}",
        "federation.connect_timeout=45",
        "federation.round_timeout=90",
    ]
    ended = []
    running = threading.Thread(target=lambda: ended.append(federation.run(words)))
    running.start()
    first = seen(federation, lambda row: True)
    assert (first["round"], first["contributors"], first["silent"]) == (1, ["north", "south"], [])
    federation.start_node("west")
    joined = seen(federation, lambda row: "west" in row["contributors"])
    assert joined["round"] > 1

    change.rotate_site(federation.kits.root, "south")  # a new key, so another node id
    federation.end_one("south")
    federation.tell("register.sh")
    gone = seen(federation, lambda row: "south" not in row["contributors"])
    federation.let_in("south")
    back = seen(federation, lambda row: "south" in row["contributors"] and row["round"] > gone["round"])
    assert joined["round"] < gone["round"] < back["round"] < MANY
    run = number_of(federation)
    federation.tell("flower.sh", "stop", run, "loopback")
    running.join()
    assert ended == ["finished:stopped"]
    told = federation.tell("flower.sh", "log", run, "loopback", "--show")
    assert f"round {joined['round']}: west joins, 3 of 3 sites" in told
    assert f"round {back['round']}: south is back, on node " in told
    (row,) = (
        r for r in rows(federation.folder / "run") if (r["site"], r["round"]) == ("south", back["round"])
    )
    assert row["state_round"] > 0  # it goes on from its own state
