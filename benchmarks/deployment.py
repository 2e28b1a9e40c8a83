"""What a deployment costs beside the training: a client's start, and a round's overhead.

    python -m benchmarks.deployment [--quick] [--json FILE]

``start`` rows: a client process, from before it is started to the end of its first optimizer step, on images
that are already cached, as in every round but the first; cold, or forked from a process that has imported
what it needs (``client/executor.py``), which is how a kit starts it. ``round`` rows: three sites on loopback,
TLS, SQLite, a process for each message (``simulation/deploy.py``). overhead_s is a round's wall clock minus
the longest training of its sites; they train at the same time, so on fewer cores than sites they share them.
The first round reads and caches the images too.
"""

import argparse
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import print_table, write_result
from simulation.deploy import ROOT, TINY, Deployment
from sparsecontrast import overrides

MODEL = (
    "backbone=vit_tiny", "backbone.img_size=224", "backbone.patch_size=16", "backbone.depth=12",
    "method.projection_hidden=512", "method.projection_dim=128", "train.batch_size=8", "federation.rounds=4",
)  # fmt: skip
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the tiny model, one start, two rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    args = parser.parse_args(argv)
    words = [*TINY] if args.quick else overrides.merge([*TINY], [*MODEL])
    with tempfile.TemporaryDirectory(prefix="deployment") as folder:
        rows = starts(Path(folder) / "start", words, 1 if args.quick else 7)
        for warm in (True, False):
            rows += rounds(Path(folder) / f"rounds-{warm}", words, 8 if args.quick else 24, warm)
    for kind in ("start", "round"):
        print_table(f"Deployment: {kind}", [row for row in rows if row["kind"] == kind])
    if args.json:
        command = f"python -m benchmarks.deployment{' --quick' if args.quick else ''}"
        write_result("deployment", command, rows, args.json)


def starts(folder: Path, words: Sequence[str], repeats: int) -> list[Row]:
    """One row a client process, cold and warm by turns; the first two, not counted, cache the images."""
    deployment = Deployment(folder, ("north",), 16)
    deployment.provision()
    site = deployment.kits.site("north") / "site.yaml"
    message = folder / "message.bin"
    message.write_bytes(order("north", words))
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    rows = []
    for number in range(2 * (repeats + 1)):
        how = ("cold", "warm")[number % 2]
        command = [
            sys.executable,
            "-P",
            "-m",
            "benchmarks.first_step",
            how,
            repr(time.time()),
            str(message),
            str(site),
        ]
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        told = json.loads(done.stdout.splitlines()[-1])
        if told.pop("status") != "ok":
            raise RuntimeError(f"the client refused: see client.log below {folder}")
        told = {key: round(value, 3) if key.endswith("_s") else value for key, value in told.items()}
        rows.append({"kind": "start", "process": how, "repeat": number // 2, **told})
    return rows[2:]


def order(site: str, words: Sequence[str]) -> bytes:
    """The bytes of a message that asks a site to train the first round."""
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.common.serde import message_to_proto
    from flwr.supercore.task_identity import TaskIdentity

    from server.rounds import initial_weights
    from server.verification import records_of
    from sparsecontrast import payload
    from sparsecontrast.config import compose
    from sparsecontrast.methods import build_method

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    config = compose(list(words))
    method = build_method(config, pretrained=False)
    names = sorted(method.shared_parameters())
    packed = payload.pack(initial_weights(method, names), names, config.federation.payload_dtype)
    orders = ConfigRecord({
        "overrides": overrides.join(words), "site": site, "round": 1, "rounds": config.federation.rounds,
        "run_key": secrets.token_hex(16), "proximal_mu": 0.0,
    })  # fmt: skip
    message = Message(
        RecordDict({**records_of(packed), "config": orders}), dst_node_id=1, message_type="train"
    )
    return message_to_proto(message).SerializeToString()


def rounds(folder: Path, words: Sequence[str], patients: int, warm: bool = True) -> list[Row]:
    """One row a round of a real federation of three sites."""
    with Deployment(folder, patients=patients) as deployment:
        deployment.provision()
        if not warm:
            for name in deployment.sites:
                with open(deployment.kits.site(name) / "settings.env", "a", encoding="utf-8") as settings:
                    settings.write("WARM=no\n")
        deployment.start()
        status = deployment.run(words)
        if status != "finished:completed":
            raise RuntimeError(f"the run is {status}: {deployment.end('superlink')}")
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    rows = []
    for whole in (row for row in told if row["site"] is None):
        mine = [row for row in told if row["round"] == whole["round"] and row["site"] is not None]
        training = max(row["seconds"] for row in mine)
        setup = statistics.median(row["setup_seconds"] for row in mine)
        seconds = {
            "round_s": whole["seconds"], "training_s": training, "overhead_s": whole["seconds"] - training,
            "setup_s": setup,
        }  # fmt: skip
        rows.append({
            "kind": "round", "process": "warm" if warm else "cold", "round": whole["round"],
            "sites": len(mine),
            **{key: round(value, 2) for key, value in seconds.items()},
            "bytes_up": whole["bytes_up"], "bytes_down": whole["bytes_down"],
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
