"""One client process: what ``benchmarks.deployment`` starts and times.

    python -P -m benchmarks.first_step cold|warm BEGAN MESSAGE SITE

``warm`` forks it, at a time of its own, from a process that is as ``client/executor.py`` keeps it. Imports
what a site's own client process imports (``client/sentinel.py``, Flower's runtime), answers the message in
the file as the site of that ``site.yaml``, and prints when each thing was done.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# training needs none of these
SPARED = (
    "sklearn", "matplotlib", "pandas.plotting", "opacus", "ray", "tensorboard", "onnx", "torch._dynamo",
    "torchvision", "scipy.stats", "pydicom",
)  # fmt: skip


def main(began: float, message: Path, site: Path) -> dict[str, Any]:
    """Answer; returns seconds since ``began`` (of ``time.time``) and what was imported for it."""
    told: dict[str, Any] = {}
    known = set(sys.modules)
    importlib.import_module("client.sentinel")
    importlib.import_module("flwr.supernode.runtime.run_clientapp")
    importlib.import_module("flwr.supernode.cli.flwr_clientapp")
    from flwr.app import Context, RecordDict
    from flwr.common.serde import message_from_proto
    from flwr.proto.message_pb2 import Message as ProtoMessage
    from flwr.supercore.task_identity import TaskIdentity

    from client.app import app

    told["imports_s"] = time.time() - began
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    asked = message_from_proto(ProtoMessage.FromString(message.read_bytes()))
    from torch.optim.optimizer import register_optimizer_step_post_hook

    told["torch_s"] = time.time() - began
    register_optimizer_step_post_hook(
        lambda *_: told.setdefault("first_step_s", time.time() - began) and None
    )
    answer = app(asked, Context(1, 1, {"site-config": str(site)}, RecordDict(), {}))
    told["cpu_s"] = time.process_time()
    told["answer_s"] = time.time() - began
    told["status"] = answer.content.config_records["status"]["status"]
    told["modules"], told["imported"] = len(sys.modules), len(set(sys.modules) - known)
    told["private_mib"] = _mib("/proc/self/smaps_rollup", "Private_Dirty")
    told["not_spared"] = " ".join(name for name in SPARED if name in sys.modules)
    return told


def forked(message: Path, site: Path) -> int:
    """Answer in a process that is forked from a warm one; returns its exit status."""
    from client import executor

    executor.warm()
    held = _mib("/proc/self/smaps_rollup", "Private_Dirty")
    began = time.time()
    if os.fork():
        return os.waitstatus_to_exitcode(os.wait()[1])
    before = time.process_time()
    told = main(began, message, site)
    print(json.dumps({**told, "cpu_s": told["cpu_s"] - before, "template_mib": held}), flush=True)
    return 0


def _mib(path: str, key: str) -> float:
    """A line of a file of /proc, in MiB."""
    lines = dict(line.split(":", 1) for line in Path(path).read_text().splitlines() if ":" in line)
    return round(int(lines[key].split()[0]) / 1024, 1)


if __name__ == "__main__":
    how, started, *files = sys.argv[1:]
    asked_in, site_file = map(Path, files)
    if how == "warm":
        sys.exit(forked(asked_in, site_file))
    else:
        print(json.dumps(main(float(started), asked_in, site_file)))
