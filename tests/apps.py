"""ClientApps that misbehave on purpose; worker processes load them by name."""

import os
import time

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client.app import hello
from client.app import train as honest_train
from sparsecontrast.payload import manifest_of

toy = ClientApp()
liars = ClientApp()
liars.query("hello")(hello)


@toy.train()
def _toy(message: Message, context: Context) -> Message:
    """Do what the message says: echo, die, hang, raise."""
    task = message.content.config_records["config"]["task"]
    if task == "die":
        os._exit(3)
    if task == "hang":
        time.sleep(600)
    if task == "raise":
        raise ValueError("PATIENT DOE^JANE in /secret/path")
    array = message.content.array_records["arrays"]["flat"].numpy()
    told = {"pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"], **context.node_config}
    content = {"arrays": ArrayRecord({"flat": Array(array * 2)}), "told": ConfigRecord(told)}
    return Message(RecordDict(content), reply_to=message)


@liars.train()
def _lie(message: Message, context: Context) -> Message:
    """Train honestly, then spoil the reply in another way at each site."""
    reply = honest_train(message, context)
    site = str(message.content.config_records["config"]["site"])
    lie = os.environ["SPARSECONTRAST_TEST_LIES"].split(",")[int(context.node_config["partition-id"])]
    assert reply.content.config_records["status"]["site"] == site
    array = reply.content.array_records["arrays"]["flat"]
    flat = array.numpy().copy()
    if lie == "nan":
        flat[0] = np.nan
        reply.content["arrays"] = ArrayRecord({"flat": Array(flat)})
        manifest = reply.content.config_records["manifest"]
        shapes = dict.fromkeys(manifest["names"], ())  # their number alone is in the digest
        manifest["sha256"] = manifest_of(shapes, "fp32", flat)["sha256"]
    elif lie == "short":
        reply.content["arrays"] = ArrayRecord({"flat": Array(flat[:-1])})
    elif lie == "torn":
        torn = Array(array.dtype, array.shape, array.stype, array.data[:-5])
        reply.content["arrays"] = ArrayRecord({"flat": torn})
    elif lie == "weight":
        reply.content["metrics"] = MetricRecord({"num-examples": -3})
    elif lie == "names":
        told = {"site": 5, "round": 7, "status": 1, "code": 2, "bytes-up": 0, "weight": 9.0}
        reply.content["metrics"] = MetricRecord({**reply.content["metrics"], **told})
    elif lie == "die":
        os._exit(9)
    elif lie == "raise":
        raise ValueError("PATIENT DOE^JANE in /secret/path")
    return reply
