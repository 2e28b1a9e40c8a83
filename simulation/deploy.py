"""``python -m simulation.deploy``: a real federation on this machine, from nothing to a finished run.

Provisions three sites on phantoms, then does what their people would do: starts the SuperLink and a SuperNode
for each site with the generated scripts (TLS, registered keys, SQLite), waits for ``/health``, submits a run,
and judges it by ``flwr list``, because ``flwr run`` ends with 0 whatever happened. All of it on loopback and
below one folder; when it ends, in whatever way, no process of it is left.
"""

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from simulation.processes import deaf, free_ports, marked, send, wait_until
from sparsecontrast import overrides
from sparsecontrast.errors import FederationError, SparseContrastError, StorageError
from sparsecontrast.provision.health import ask_grpc, ask_http, wait_for
from sparsecontrast.provision.kits import Folders, provision
from sparsecontrast.provision.plan import read_plan

ROOT = Path(__file__).resolve().parents[1]
NAME = "loopback"
TINY = (
    "backbone.img_size=32", "backbone.patch_size=4", "backbone.depth=1", "method.projection_hidden=32",
    "method.projection_dim=16", "train.batch_size=4", "federation.rounds=2",
    "federation.round_timeout=600",
)  # fmt: skip
MARK = "SPARSECONTRAST_DEPLOYMENT"  # in the environment of every process, by which it is found again
LET_IN = "SuperNode ID"  # what a node says once the SuperLink knows it
START_SECONDS = 120
RUN_SECONDS = 1800
STOP_SECONDS = 15


class Deployment:
    """The processes of one federation on loopback; leaving the ``with`` block stops them all.

    Args:
        folder: new, or empty; holds kits, logs, states and runs.
        sites: names.
        patients: of each site; it has phantoms of its own.
    """

    host = "127.0.0.1"  # where the sites find the SuperLink

    def __init__(self, folder: Path, sites: Sequence[str] = ("north", "south", "west"), patients: int = 16):
        self.folder, self.sites, self.patients = folder.resolve(), tuple(sites), patients
        self.kits = Folders(self.folder / "federation")
        self.mark = secrets.token_hex(16)
        self.started: dict[str, subprocess.Popen[bytes]] = {}
        self.sessions: set[int] = set()  # of all that were ever started
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("FLWR_", "RAY_", "SPARSECONTRAST_"))},
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            MARK: self.mark,
        }

    def __enter__(self) -> "Deployment":
        return self

    def __exit__(self, *_: object) -> None:
        with deaf():  # a second Ctrl-C must not leave half of it running
            self.stop()

    def provision(self) -> None:
        """Write ``sites.yaml`` with free ports, and make everything of it."""
        bind, health, *ports = (f"127.0.0.1:{port}" for port in free_ports(2 + 2 * len(self.sites)))
        told: dict[str, Any] = {
            "federation": NAME,
            "server": {
                "address": bind.replace("127.0.0.1", self.host), "bind": bind, "health": health,
            },
            "install": {"venv": sys.prefix},
            "sites": [
                {
                    "name": name,
                    "state_dir": str(self.folder / "states" / name),
                    "overrides": [
                        "data=phantom", "data.phantom.sites=1", f"data.phantom.seed={i + 1}",
                        f"data.phantom.patients_per_site={self.patients}", "data.min_images=2",
                    ],
                    "bind": ports[2 * i], "health": ports[2 * i + 1],
                }
                for i, name in enumerate(self.sites)
            ],
        }  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "sites.yaml"
        path.write_text(yaml.safe_dump(told, sort_keys=False), encoding="utf-8")
        self.plan = read_plan(path)
        provision(self.plan, path.read_bytes(), self.kits.root)

    def start(self, sites: Sequence[str] | None = None) -> None:
        """Start the SuperLink, register all keys, start these nodes, or all; return when they are healthy."""
        self.start_superlink()
        self.tell("register.sh")
        for name in self.sites if sites is None else sites:
            self.start_node(name)
        for name in self.sites if sites is None else sites:
            self.await_node(name)

    def start_superlink(self) -> None:
        """Start the SuperLink, and return when it answers."""
        self.launch("superlink", self.kits.server / "superlink.sh")
        server = self.plan.server
        self.await_health("superlink", lambda: ask_http(server.bind, self.kits.server / "ca.crt"))
        self.await_health("superlink", lambda: ask_grpc(server.health))

    def start_node(self, name: str) -> subprocess.Popen[bytes]:
        """Start a site's SuperNode."""
        return self.launch(name, self.kits.site(name) / "supernode.sh")

    def let_in(self, name: str, script: Path | None = None) -> subprocess.Popen[bytes]:
        """Start a SuperNode, by default the site's of this name, until the server lets it in.

        The SuperLink turns a node away (exit 305) that it believes to be there still: one that could not say
        goodbye, for the minute in which two of its heartbeats are missing. A unit's ``Restart=always`` comes
        back as well.

        Raises:
            FederationError: it is turned away for longer, or neither that nor let in.
        """
        deadline = time.monotonic() + START_SECONDS

        def decided() -> bool:
            return node.poll() is not None or LET_IN in self.log(name).read_text(errors="replace")[before:]

        while True:
            before = len(self.log(name).read_text(errors="replace")) if self.log(name).exists() else 0
            node = self.launch(name, script or self.kits.site(name) / "supernode.sh")
            wait_until(decided, START_SECONDS)
            if node.poll() is None and decided():
                return node
            if node.poll() is None or time.monotonic() > deadline:
                raise FederationError(f"{name}: not let in: {self.end(name)}")

    def await_node(self, name: str) -> None:
        """Return when a node answers on its own machine; whether the server let it in, its log says."""
        site = self.plan.site(name)
        self.await_health(name, lambda: ask_http(site.bind, None))
        self.await_health(name, lambda: ask_grpc(site.health))

    def command(self, name: str, script: Path) -> list[str]:
        """How a script is run for the ``superlink``, or for what is started under another name."""
        return ["sh", str(script)]

    def launch(self, name: str, script: Path) -> subprocess.Popen[bytes]:
        """Start a script apart from this terminal, its words in ``NAME.log``."""
        with open(self.log(name), "ab") as log:
            self.started[name] = subprocess.Popen(
                self.command(name, script), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=self.environment, start_new_session=True,
            )  # fmt: skip
        self.sessions.add(self.started[name].pid)
        return self.started[name]

    def await_health(self, name: str, ask: Any) -> None:
        """Wait for an answer, but not longer than the process lives.

        Raises:
            FederationError: it ended, or said nothing in time.
        """

        def alive() -> None:
            if self.started[name].poll() is not None:
                raise FederationError(f"{name}: ended with {self.started[name].returncode}: {self.end(name)}")
            ask()

        wait_for(alive, START_SECONDS)

    def tell(self, script: str, *arguments: str, show: bool = False) -> str:
        """Run a script of the server's kit; returns what it printed.

        Raises:
            FederationError: it failed, or did not end.
        """
        command = self.command("superlink", self.kits.server / script)
        try:
            done = subprocess.run(
                [*command, *arguments], stdin=subprocess.DEVNULL, text=True,
                stdout=None if show else subprocess.PIPE, stderr=subprocess.STDOUT, env=self.environment,
                start_new_session=True, check=False, timeout=RUN_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise FederationError(f"{script} {' '.join(arguments[:2])}: no end in {RUN_SECONDS} s") from error
        if done.returncode:
            raise FederationError(f"{script} {' '.join(arguments[:2])}: {done.stdout or done.returncode}")
        return done.stdout or ""

    def run(self, words: Sequence[str], show: bool = False, base: Sequence[str] = TINY) -> str:
        """Submit a run of all sites and wait for its end; returns Flower's status of it.

        Args:
            words: overrides of the run.
            show: what Flower prints.
            base: overrides before them, by default of pretraining; ``experiment=cells`` knows other keys.
        """
        told = [f"federation.sites={len(self.sites)}", overrides.assign("output_dir", self.folder / "run")]
        text = overrides.join(overrides.merge([*base, *told], list(words)))
        self.tell(
            "flower.sh", "run", str(ROOT), NAME, "--stream", "--run-config", f'overrides="{text}"', show=show
        )
        return self.status()

    def status(self) -> str:
        """Return the newest run's status when it has ended; the stream of its log may end before it."""
        deadline = time.monotonic() + RUN_SECONDS
        while True:
            printed = self.tell("flower.sh", "list", NAME, "--format", "json")
            status = str(json.loads(printed)["runs"][0]["status"])
            if status.startswith("finished") or time.monotonic() > deadline:
                return status
            time.sleep(1)

    def stop(self) -> None:
        """End every process: asked first, in the order nodes, SuperLink; then whatever is left of them."""
        for name in sorted(self.started, key=lambda name: name == "superlink"):
            self.end_one(name)
        for sent in (signal.SIGTERM, signal.SIGKILL):
            for pid in self.processes():
                send(pid, sent)
            wait_until(lambda: not self.processes(), STOP_SECONDS)

    def end_one(self, name: str) -> None:
        """End one process as its service manager would."""
        process = self.started.pop(name)
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def processes(self) -> list[int]:
        """Everything that was started by a process of this deployment, or has its mark in the environment.

        Neither is enough: Flower hides the environment of its SuperExec, and a process may leave its session.
        """
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                # pid (name) state parent group session; the name may hold anything
                state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                ours = int(session) in self.sessions or marked(folder, f"{MARK}={self.mark}")
                if ours and state != "Z":
                    found.append(int(folder.name))
        return found

    def log(self, name: str) -> Path:
        """Where a process writes."""
        return self.folder / f"{name}.log"

    def end(self, name: str) -> str:
        """The last lines of a process."""
        return "\n".join(self.log(name).read_text(encoding="utf-8", errors="replace").splitlines()[-15:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a federation from nothing; returns 0 where it completed, 1 where not, 2 for a user's error."""
    parser = argparse.ArgumentParser(prog="python -m simulation.deploy", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the run, such as seed=1")
    parser.add_argument("--out", type=Path, default=Path("outputs/federation"), metavar="DIR")
    parser.add_argument("--fresh", action="store_true", help="delete an earlier deployment in DIR")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)  # ends like Ctrl-C: everything is stopped
    began = time.monotonic()
    try:
        _clear(options.out, options.fresh)
        with Deployment(options.out) as deployment:
            return _federate(deployment, options.overrides, began)
    except SparseContrastError as error:
        print(f"error [{error.code}]: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped, no process is left", file=sys.stderr)
        return 130


def _federate(deployment: Deployment, words: Sequence[str], began: float) -> int:
    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.1f} s] {text}", flush=True)

    deployment.provision()
    say(f"provisioned: {deployment.kits.root} (read RUNBOOK.md)")
    deployment.start()
    say(f"SuperLink at {deployment.plan.server.address}, {len(deployment.sites)} registered nodes: healthy")
    status = deployment.run(words, show=True)
    say(f"the run is {status}: {deployment.folder / 'run'}")
    deployment.stop()
    left = len(deployment.processes())
    say(f"stopped, {left} processes left")
    return 0 if status == "finished:completed" and not left else 1


def _clear(out: Path, fresh: bool) -> None:
    """Make room for a deployment; deletes nothing but an earlier one.

    Raises:
        StorageError: the folder holds something.
    """
    if not out.exists() or not any(out.iterdir()):
        return
    if not (fresh and (out / "federation" / "ca" / "ca.key").exists()):
        raise StorageError(f"{out}: not empty; give another --out, or --fresh over an earlier deployment")
    shutil.rmtree(out)


def _interrupt(_: int, __: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
