"""The real ClientApp, at a site whose disk is full in one round; ``PLAN`` names the file that says which."""

import json
import os
from pathlib import Path

from flwr.app import Context, Message

from benchmarks.fault_cases.disk import Disk
from client.app import app as honest

PLAN = "FAULTS_FULL_SITE"


def app(message: Message, context: Context) -> Message:
    """Answer as always, on a disk that may be full; what was written is told beside the plan."""
    plan = Path(os.environ[PLAN])
    told = json.loads(plan.read_text()) if plan.exists() else {}
    config = message.content.config_records["config"]
    if not told or (config.get("site"), config.get("round")) != (told["site"], told["round"]):
        return honest(message, context)
    with Disk(Path(told["folder"]), told["full_from"]).used() as disk:
        reply = honest(message, context)
    plan.with_suffix(".writes").write_text(json.dumps(disk.writes))
    return reply
