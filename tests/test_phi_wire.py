"""Names are planted all over a site; its wire in clear text and all that the server keeps hold none of them.

Real processes on loopback: a SuperLink, the node of a hospital that is full of names (``tests/ward.py``), and
one that leaks on purpose. A recording relay stands before each node. Ten rounds go well or wrong in as many
ways (``tests/phi_run.py``), then a server asks for more than it should. ``tests/search.py`` says what is
searched for, in how many ways of writing.
"""

import json
from contextlib import ExitStack

import pytest

from client.log import LOG
from sparsecontrast.egress import EgressLog
from sparsecontrast.errors import CODES as KNOWN_CODES
from tests.leaky_node import CHUNK, LEAK, WAYS
from tests.nosy_server import QUESTIONS, SAID
from tests.phi_run import CODES, HOSPITAL, LEAKY, RUN, Recorded, heard, paths
from tests.search import Canary, found

pytestmark = pytest.mark.e2e
SITE, FOLDER = Canary("name of the hospital", HOSPITAL), Canary("folder of the run", RUN)  # these may travel
FLEET = {
    "register-node", "activate-node", "send-node-heartbeat", "get-run", "get-fab", "pull-messages",
    "pull-object", "confirm-message-received", "push-messages", "push-object", "deactivate-node",
    "unregister-node",
}  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, shared_data):
    """The federation, which has ended; the database is still open."""
    with ExitStack() as stack:
        film = shared_data / "dicom" / "rsna_cxr_mono2_jpeg.dcm"
        made = Recorded(tmp_path_factory.mktemp("phi"), film, stack)
        made.start()
        assert made.run() == "finished:completed"
        assert made.ask() == "finished:completed"
        for name in (made.ward("kit folder"), LEAKY):
            made.federation.end_one(name)
        yield made
    assert not made.federation.processes()


@pytest.fixture(scope="module")
def words(recorded):
    return list(recorded.ward.canaries.values())


@pytest.fixture(scope="module")
def wire(recorded):
    return heard(recorded.tap)


def test_each_failure_reaches_the_server_as_its_code_and_the_site_is_back_after_it(recorded):
    assert not recorded.tap.errors
    assert recorded.told(HOSPITAL) == CODES
    assert set(recorded.told(LEAKY).values()) == {""}


def test_every_word_lies_at_the_site_and_its_log_keeps_the_detail(recorded, words):
    kept = recorded.of_site()
    told = {line.rpartition(": ")[0] for line in found(words, b"\n".join(kept.values()))}
    assert len(words) == len({one.token for one in words}) > 35
    assert {one.place for one in words} <= told
    log = found(words, (recorded.ward.state / LOG).read_bytes())
    for place in ("second data folder", "cell of the index", "box in the index", "state folder"):
        assert f"{place}: plain" in log
    quarantined = found(words, (recorded.ward.state / "quarantine.csv").read_bytes())
    assert {"broken file: plain", "missing file: plain"} <= set(quarantined)


def test_no_word_is_on_the_wire(words, wire):
    up, down = wire
    assert len(up) > 1_000_000
    assert found(words, up) == []
    assert found(words, down) == []


def test_what_travels_is_found_by_the_same_search(wire):
    up, down = wire
    assert found([SITE, FOLDER], up) == [f"{SITE.place}: plain"]  # a site has no reason to repeat the folder
    assert {f"{SITE.place}: plain", f"{FOLDER.place}: plain"} <= set(found([SITE, FOLDER], down))


def test_a_site_that_leaks_is_caught_in_each_way_of_writing(recorded):
    up, _ = heard(recorded.leak)
    ways = " ".join(found([LEAK], up))
    for way in ("plain", "utf-16", "base64", "hex", "wrapped"):
        assert way in ways
    for number, way in enumerate(WAYS):
        assert way in up, number
    # the greeting's array: cut in the middle of the word on the wire, whole where the parts are joined
    cut = b"\0" * 8 + LEAK.token.encode() + b"\0" * 8
    assert not [line for line in recorded.leak.lines if cut in bytes(line.up)]
    assert cut in up and len(cut) < CHUNK


def test_no_word_is_in_anything_that_the_server_keeps(recorded, words):
    kept = recorded.of_server()
    if found(words, b"\n".join(kept.values())):
        pytest.fail(str({name: told for name, data in kept.items() if (told := found(words, data))}))
    # and what may be there is there: rows of metrics, checkpoints, logs, the database
    rounds = {f"{RUN}/rounds/round_{number:04d}.json" for number in CODES}
    for name in (f"{RUN}/metrics.jsonl", f"{RUN}/config.yaml", "the runs' logs", "the database", *rounds):
        assert found([SITE, FOLDER], kept[name]), name
    assert {f"{RUN}/rounds/round_{number:04d}.safetensors" for number in CODES} <= set(kept)


def test_the_site_calls_nothing_but_what_a_round_needs(recorded):
    """Above all no log of its own is pushed: that is between the app and its node."""
    called = {path.removeprefix("/v1/fleet/") for path in paths(recorded.tap)}
    assert {"push-messages", "push-object"} < called <= FLEET


def test_whatever_a_server_asks_it_hears_a_code(recorded):
    log = "".join(recorded.federation.printed)
    told = [json.loads(line.partition(SAID)[2]) for line in log.splitlines() if SAID in line]
    asked = [answer["asked"] for answer in told]
    assert sorted(asked) == sorted([*QUESTIONS, *QUESTIONS])  # of both nodes
    for answer in told:
        if "error" in answer["heard"]:
            assert answer["heard"]["reason"] == "see client.log at the site"
            continue
        status = answer["heard"]["status"]
        if status["status"] == "error":
            assert set(status) == {"status", "code", "site"} and status["code"] in KNOWN_CODES
        else:
            assert answer["asked"] == "a file"  # a plain greeting: the site's own file decides
    log = EgressLog(recorded.ward.state)
    assert log.verify().number == 1 + len(CODES) + len(QUESTIONS)  # each answer has its row
