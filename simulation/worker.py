"""A worker process of the local grid: bytes in, ClientApp, bytes out."""

import importlib
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

from sparsecontrast.processes import follow_parent


def serve(pipe: Connection, client_app: str, preload: str) -> None:
    """Answer messages until the pipe closes.

    Args:
        pipe: delivers (node id, run id, node config), then a message's protobuf bytes.
        client_app: ``module:attribute``.
        preload: module to import before the first message.
    """
    follow_parent()  # its end is ours too, even in the middle of a round
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    module, _, name = client_app.partition(":")
    app = getattr(importlib.import_module(module), name)
    importlib.import_module(preload)
    while True:
        try:
            node, run, node_config = pipe.recv()
            data = pipe.recv_bytes()
        except (EOFError, OSError):
            sys.exit(0)
        reply = _answer(app, data, node, run, node_config)
        try:
            pipe.send_bytes(reply)
        except OSError:  # the parent is gone
            sys.exit(0)


def _answer(app: Any, data: bytes, node: int, run: int, node_config: dict[str, Any]) -> bytes:
    from flwr.app import Context, RecordDict
    from flwr.common.serde import message_from_proto, message_to_proto
    from flwr.proto.message_pb2 import Message as ProtoMessage
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run, node
    message = message_from_proto(ProtoMessage.FromString(data))
    context = Context(run, node, node_config, RecordDict(), {})
    reply = app(message, context)
    return message_to_proto(reply).SerializeToString()
