"""Tiny federations: three hospitals, a handful of 32-pixel images, a backbone of one block."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

MODEL = (
    "backbone.img_size=32",
    "backbone.patch_size=4",
    "backbone.depth=1",
    "method.projection_hidden=32",
    "method.projection_dim=16",
    "train.batch_size=4",
    "data.min_images=2",
)
FEDERATION = ("federation.sites=3", "federation.rounds=2", "federation.connect_timeout=60")


def write_images(folder: Path, sites: dict[str, int], prefix: str = "", broken: tuple[str, ...] = ()) -> Path:
    """Write PNG files and their index: ``sites`` says how many training images each site has.

    Every site also has one validation and one test image, which must never be trained on. Sites in
    ``broken`` have files that are no images.
    """
    import pandas as pd
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.Generator(np.random.PCG64(len(sites)))
    rows = []
    for site, count in sites.items():
        for i in range(count + 2):
            name = f"{prefix}{site}-{i}"
            path = folder / f"{name}.png"
            pixels = np.kron(generator.integers(0, 256, (4, 4)), np.ones((8, 8))).astype(np.uint8)
            if site in broken:
                path.write_bytes(b"no image")
            else:
                Image.fromarray(pixels).save(path)
            split = "train" if i < count else ("val", "test")[i - count]
            ids = {"image_id": name, "path": str(path), "patient_id": f"{prefix}p-{name}", "study_id": name}
            rows.append({**ids, "site": site, "view": "PA", "split": split, "height": 32, "width": 32})
    frame = pd.DataFrame(rows).assign(boxes="[]", label_odd=lambda f: np.arange(len(f)) % 2)
    index = folder / "index.csv"
    frame.to_csv(index, index=False)
    return index


def words(index: Path, output_dir: Path, *more: str) -> list[str]:
    """Overrides of a tiny run on a written index."""
    from sparsecontrast.overrides import assign, merge

    base = [*MODEL, *FEDERATION, assign("data.index", index), assign("output_dir", output_dir)]
    return merge(base, list(more))


class DirectGrid(Grid):
    """Call the ClientApp in this process, over the wire's bytes; ``sent`` keeps every reply's.

    Args:
        node_configs: one a node.
        app: the ClientApp.
        mute: partition ids that never answer.
    """

    def __init__(self, node_configs: list[dict[str, Any]], app: ClientApp, mute: tuple[int, ...] = ()):
        self.nodes = {10 + i: dict(config) for i, config in enumerate(node_configs)}
        self.app, self.mute = app, {10 + i for i in mute}
        self.sent: list[bytes] = []
        self.waiting: dict[str, Message] = {}
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

    @property
    def run(self) -> Run:
        return Run.create_empty(1)

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, *_: Any, **__: Any) -> list[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            ids.append(message.metadata.message_id)
            node = message.metadata.dst_node_id
            if node in self.mute and message.metadata.message_type == "train":
                continue
            arrived = message_from_proto(
                ProtoMessage.FromString(message_to_proto(message).SerializeToString())
            )
            try:
                reply = self.app(arrived, Context(1, node, self.nodes[node], RecordDict(), {}))
            except ValueError as error:  # what Flower does with an app's exception
                reply = Message(Error(1, str(error)), reply_to=arrived)
            self.sent.append(message_to_proto(reply).SerializeToString())
            self.waiting[ids[-1]] = message_from_proto(ProtoMessage.FromString(self.sent[-1]))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self.waiting.pop(i) for i in message_ids if i in self.waiting]


def partitions(n: int) -> list[dict[str, Any]]:
    """Node configs of a simulation with n nodes."""
    return [{"partition-id": i, "num-partitions": n} for i in range(n)]


def serve(
    nodes: list[dict[str, Any]],
    told: list[str],
    app: ClientApp | None = None,
    mute: tuple[int, ...] = (),
    kind: type[DirectGrid] = DirectGrid,
) -> DirectGrid:
    """Run the ServerApp against nodes in this process; returns the grid."""
    from client.app import app as client_app
    from server.app import app as server_app
    from sparsecontrast.overrides import join

    grid = kind(nodes, app or client_app, mute)
    server_app(grid, Context(1, 1, {}, RecordDict(), {"overrides": join(told)}))
    return grid


def rows(folder: Path) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl``."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
