"""A ServerApp that asks a site what it should not, in every kind of message, and prints all that it hears."""

import json
import time
from logging import INFO
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

app = ServerApp()
client = ClientApp()  # no site runs it
ORDERS = {"round": 1, "rounds": 1, "run_key": "0" * 32, "proximal_mu": 0.0, "overrides": ""}
TORN = {"arrays": ArrayRecord({"flat": Array("float32", (9,), "numpy.ndarray", b"torn")})}
SAID = "NOSY "
# what is asked, as what kind of message: (kind, orders; None for none, more records)
QUESTIONS: dict[str, tuple[str, dict[str, Any] | None, dict[str, Any]]] = {
    "the environment": ("query.hello", {"overrides": "train.batch_size=${oc.env:WARD}"}, {}),
    "another folder": ("query.hello", {"overrides": "hydra.searchpath=[file:///etc]"}, {}),
    "a file": ("query.hello", {"overrides": "data.root=/etc output_dir=/etc"}, {}),
    "an odd key": ("query.hello", {"overrides": "no.such.key=1"}, {}),
    "nothing": ("query.hello", None, {}),
    "a query of its own": ("query.files", {"overrides": ""}, {}),
    "an evaluation": ("evaluate", {"overrides": ""}, {}),
    "training on torn weights": ("train", ORDERS, TORN),
    "training without weights": ("train", ORDERS, {}),
    "training for another run": ("train", {**ORDERS, "run_key": "../../etc"}, TORN),
    "training of another site": ("train", {**ORDERS, "site": "elsewhere"}, TORN),
}


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Ask every node everything."""
    while len(nodes := list(grid.get_node_ids())) < 2:
        time.sleep(0.5)
    for name, (kind, orders, more) in QUESTIONS.items():
        records = more if orders is None else {**more, "config": ConfigRecord(orders)}
        asked = {}
        for node in nodes:
            message = Message(RecordDict(dict(records)), dst_node_id=node, message_type=kind, ttl=60.0)
            (asked[node],) = grid.push_messages([message])
        deadline = time.monotonic() + 60
        while asked and time.monotonic() < deadline:
            for node, number in list(asked.items()):
                for reply in grid.pull_messages([number]):
                    log(INFO, "%s", SAID + json.dumps({"asked": name, "heard": heard(reply)}))
                    del asked[node]
            time.sleep(0.1)


def heard(reply: Message) -> Any:
    """All that an answer says."""
    if reply.has_error():
        return {"error": reply.error.code, "reason": reply.error.reason}
    content = reply.content.items()
    return {name: {key: str(value) for key, value in record.items()} for name, record in content}
