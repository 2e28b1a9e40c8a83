"""Every answer has a row in the log before it leaves: errors, what is held back, what escapes an app."""

import pytest
from flwr.app import ConfigRecord, RecordDict
from flwr.clientapp import ClientApp

from client.app import app as honest
from client.guard import guard
from server.conversation import ask
from sparsecontrast import cli
from sparsecontrast.egress import EgressLog
from tests.federations import MODEL, DirectGrid
from tests.test_guard import site

PHI = "PATIENT DOE^JANE"


def asked(app, node, *words):
    """What left in answer to one message: its status, and all of its bytes."""
    grid = DirectGrid([node], app)
    letter = RecordDict({"config": ConfigRecord({"overrides": " ".join(words), "round": 1})})
    reply = ask(grid, {"x": (10, letter)}, "query.hello", 60, "h").replies["x"]
    return dict(reply["status"]), grid.sent[0]


def told(folder):
    return [(r.kind, r.content["status"], r.content.get("code")) for r in EgressLog(folder).rows()]


@pytest.mark.parametrize(
    "word", ["no.such_key=1", "+egress.approve=auto", "seed=${oc.env:HOME}", "method=none"]
)
def test_words_in_no_order_are_told_of_in_the_state_folder(tmp_path, capsys, word):
    node, state = site(tmp_path), tmp_path / "x" / "state"
    status, _ = asked(honest, node, *MODEL, word)
    assert (status["status"], status["site"]) == ("error", "x")
    assert told(state) == [("hello", "error", status["code"])]
    assert status["code"] in (state / "client.log").read_text()
    assert not [p.name for p in (tmp_path / "x").iterdir() if p.suffix in (".log", ".jsonl")]
    assert cli.main(["egress", "list", str(state)]) == 0 and status["code"] in capsys.readouterr().out


def test_what_escapes_an_app_leaves_as_a_code_with_a_row(tmp_path):
    app = ClientApp(mods=[guard])

    @app.query("hello")
    def fall(message, context):
        raise ValueError(PHI)

    status, sent = asked(app, site(tmp_path), *MODEL)
    assert status == {"status": "error", "code": "internal", "site": "x"} and PHI.encode() not in sent
    assert told(tmp_path / "x" / "state") == [("hello", "error", "internal")]
    assert PHI in (tmp_path / "x" / "state" / "client.log").read_text()


def test_without_a_log_that_can_be_trusted_a_bare_code_leaves_and_the_site_is_told(tmp_path):
    node, state = site(tmp_path), tmp_path / "x" / "state"
    asked(honest, node, *MODEL)
    log = EgressLog(state)
    log.path.write_text(log.path.read_text().replace("hello", "jello"))
    status, _ = asked(honest, node, *MODEL)
    assert status == {"status": "error", "code": "egress", "site": "x"}
    assert "leaves without a row in the log" in (state / "client.log").read_text()
