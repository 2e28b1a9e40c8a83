"""A Flower Grid on one machine: the same apps and the same bytes, N worker processes, no SuperLink.

Every message is serialised to the protobuf bytes of the wire and read back on the other side. A
worker serves one message at a time and lives for the whole run, so torch is imported once per
worker. A worker that dies is replaced, and one that outlives its message's time to live is killed:
either way the server gets an error reply, never silence without end.
"""

import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any
from uuid import uuid4

from flwr.app import Error, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from simulation.worker import serve
from sparsecontrast.processes import one_thread

SERVER_NODE = 1
FIRST_NODE = 100
WORKER_DIED = 1  # Flower's ErrorCode.UNKNOWN


@dataclass
class Worker:
    """A process, our end of its pipe, and the message it is working on."""

    process: Any
    pipe: Connection
    message: Message | None = None

    @property
    def late(self) -> bool:
        """Whether its message's time to live is over."""
        return self.message is not None and _expired(self.message)


class LocalGrid(Grid):
    """Run ClientApp messages in worker processes.

    Args:
        node_configs: one node per entry, ``{"partition-id": 0, "num-partitions": 3}`` or
            ``{"site-config": "/abs/site.yaml"}``.
        workers: processes.
        client_app: ``module:attribute`` of the ClientApp.
        on_event: called with ("sent" | "answered" | "failed", message type) for progress displays.
        preload: module that workers import while the server still gets ready.
    """

    def __init__(
        self,
        node_configs: list[dict[str, Any]],
        workers: int,
        client_app: str = "client.app:app",
        on_event: Callable[[str, str], None] | None = None,
        preload: str = "sparsecontrast.trainer",
    ):
        self.nodes = {FIRST_NODE + i: dict(config) for i, config in enumerate(node_configs)}
        self.client_app, self.preload = client_app, preload
        self._notify = on_event or (lambda event, kind: None)
        self._queue: deque[Message] = deque()
        self._replies: dict[str, Message] = {}
        self._run = Run.create_empty(run_id=uuid4().int >> 66)
        # Message() reads the identity of the running task from here
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, self._run.run_id, SERVER_NODE
        self._workers = [self._start() for _ in range(min(workers, len(self.nodes)))]

    def __enter__(self) -> "LocalGrid":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers; the ones at work are killed."""
        for worker in self._workers:
            _stop(worker)
        self._workers = []

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """Run information."""
        return self._run

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message; deprecated in Flower, part of its interface."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids."""
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; returns their ids."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            ids.append(message.metadata.message_id)
            self._queue.append(message)
        self._pump(0)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are here."""
        self._pump(0.0)
        wanted = set(message_ids)
        return [self._replies.pop(i) for i in wanted & set(self._replies)]

    def idle(self, seconds: float) -> None:
        """Keep the workers fed while the server has nothing to do, at most for ``seconds``."""
        self._pump(seconds)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push messages and wait for the replies, at most ``timeout`` seconds."""
        pending, replies, started = set(self.push_messages(messages)), [], time.monotonic()
        while pending and (timeout is None or time.monotonic() - started < timeout):
            self.idle(0.2)
            arrived = list(self.pull_messages(pending))
            replies += arrived
            pending -= {message.metadata.reply_to_message_id for message in arrived}
        return replies

    def _pump(self, seconds: float) -> None:
        """Hand out queued messages, then take what is ready within ``seconds``."""
        self._hand_out()
        ready = wait([end for w in self._workers for end in (w.pipe, w.process.sentinel)], timeout=seconds)
        for place, worker in enumerate(self._workers):
            if worker.pipe in ready:
                self._take(place, worker)
            elif worker.process.sentinel in ready:
                self._replace(place, worker, "the worker process died")
            elif worker.late:
                self._replace(place, worker, "the site did not answer in time")
        self._hand_out()

    def _hand_out(self) -> None:
        while self._queue and _expired(self._queue[0]):
            asked = self._queue.popleft()
            self._file(Message(Error(WORKER_DIED, "never started"), reply_to=asked), asked, "failed")
        for place, idle in enumerate(self._workers):
            if idle.message is None and not idle.process.is_alive():
                self._replace(place, idle, "")
        for place, worker in enumerate(self._workers):
            if worker.message is None and self._queue:
                worker.message = self._queue.popleft()
                node = worker.message.metadata.dst_node_id
                self._notify("sent", worker.message.metadata.message_type)
                try:
                    worker.pipe.send((node, self._run.run_id, self.nodes[node]))
                    worker.pipe.send_bytes(message_to_proto(worker.message).SerializeToString())
                except OSError:
                    self._replace(place, worker, "the worker process died")

    def _take(self, place: int, worker: Worker) -> None:
        """Receive a reply, or notice that the worker died."""
        try:
            data = worker.pipe.recv_bytes()
        except (EOFError, OSError):
            self._replace(place, worker, "the worker process died")
            return
        if worker.message is not None:
            self._file(message_from_proto(ProtoMessage.FromString(data)), worker.message, "answered")
        worker.message = None

    def _replace(self, place: int, worker: Worker, reason: str) -> None:
        if worker.message is not None:
            self._file(Message(Error(WORKER_DIED, reason), reply_to=worker.message), worker.message, "failed")
        _stop(worker)
        self._workers[place] = self._start()

    def _file(self, reply: Message, asked: Message, event: str) -> None:
        self._replies[asked.metadata.message_id] = reply
        self._notify(event, asked.metadata.message_type)

    def _start(self) -> Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, self.client_app, self.preload))
        with one_thread():
            process.start()
        theirs.close()  # so that its death is the end of the pipe
        return Worker(process, ours)


def _expired(message: Message) -> bool:
    return time.time() > message.metadata.created_at + message.metadata.ttl


def _stop(worker: Worker) -> None:
    worker.pipe.close()
    worker.process.kill()  # durable files are written atomically: nothing is torn by this
    worker.process.join(timeout=10)
    worker.process.close()
