"""Client processes forked from a warm one: each fresh, gone with the node, cold where it is dead; haste."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor import subprocess_executor
from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResultStatus
from flwr.supernode import start_client_internal

from client import executor, node

ROOT = Path(__file__).parents[1]
# a client process that tells what it finds and counts in its own memory, forked by a node that reads commands
NODE = """if True:
    import ctypes, json, os, signal, sys, time
    from pathlib import Path
    from types import SimpleNamespace
    from client import executor
    told, folder = sys.argv[1], Path(sys.argv[1]).parent
    seen = []
    def main():
        import numpy
        seen.append(1)
        with open(told, "a") as file:
            print(json.dumps({"argv": sys.argv, "pid": os.getpid(), "seen": len(seen), "parent": os.getppid(),
                "comm": open("/proc/self/comm").read().strip(), "drawn": numpy.random.rand(),
                "int": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
                "child": signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL,
                "main": sys.modules["__main__"] is sys.modules["client.sentinel"],
                "dumpable": ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), "nvml": executor.NVML in os.environ,
                }), file=file)
        if sys.argv[1] == "sleep":
            time.sleep(60)
    def warm():
        import numpy.random
        while (folder / "slow").exists():
            time.sleep(0.02)
    sys.modules["client.sentinel"] = SimpleNamespace(main=main)
    executor.warm, executor.ANSWER_SECONDS = warm, 2.0
    executor.installed = lambda: (folder / "code").exists()
    template = executor.Template()
    print(template.pid, flush=True)
    for line in sys.stdin:
        print(template.start(json.loads(line)), flush=True)
"""


class Node:
    """A process with a template, asked over a pipe."""

    def __init__(self, folder):
        self.told = folder / "told.jsonl"
        self.process = subprocess.Popen(
            [sys.executable, "-c", NODE, str(self.told)], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.template = int(self.process.stdout.readline())

    def start(self, *arguments):
        print(json.dumps(arguments), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline().strip()
        return None if line == "None" else int(line)

    def first(self, *arguments):
        """Start a client as soon as the template is ready."""
        started = []
        until(lambda: started.append(self.start(*arguments)) or started[-1])
        return started[-1]

    def tales(self, count):
        until(lambda: self.told.exists() and len(self.told.read_text().splitlines()) == count)
        return [json.loads(line) for line in self.told.read_text().splitlines()]

    def said(self):
        self.process.stdin.close()
        return self.process.stderr.read()

    def end(self):
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            pipe.close()


@pytest.fixture
def running(tmp_path):
    made = Node(tmp_path)
    yield made
    made.end()


def until(true, seconds=30):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_every_client_process_is_as_fresh_as_the_first(running):
    pids = [running.first("--token", "t0"), *(running.start("--token", f"t{n}") for n in (1, 2))]
    tales = sorted(running.tales(3), key=lambda tale: tale["argv"])
    assert [tale["argv"] for tale in tales] == [["flwr-clientapp", "--token", f"t{n}"] for n in range(3)]
    assert [tale["pid"] for tale in tales] == pids and len(set(pids)) == 3
    assert {tale["seen"] for tale in tales} == {1} and {tale["parent"] for tale in tales} == {
        running.template
    }
    assert len({tale["drawn"] for tale in tales}) == 3  # NumPy's global state is nobody else's
    assert {tale["comm"] for tale in tales} == {"flwr-clientapp"}
    assert all(tale["int"] and tale["child"] and tale["main"] for tale in tales)
    assert not any(tale["nvml"] or tale["dumpable"] for tale in tales)
    until(lambda: not any(map(alive, pids)))
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)  # nobody is left to be waited for


def test_until_the_template_is_ready_clients_start_in_the_cold(tmp_path):
    (tmp_path / "slow").touch()
    node = Node(tmp_path)
    assert node.start("--token", "early") is None
    (tmp_path / "slow").unlink()
    assert node.first("--token", "late") and node.tales(1)[0]["argv"][-1] == "late"
    assert "cold" not in node.said()
    node.end()


def test_the_template_goes_when_its_node_is_killed(running):
    assert alive(running.template)
    running.process.send_signal(signal.SIGKILL)
    until(lambda: not alive(running.template))


def test_a_dead_template_takes_no_client_with_it_and_starts_no_other(running):
    working = running.first("sleep")
    running.tales(1)
    os.kill(running.template, signal.SIGKILL)
    until(lambda: not alive(running.template))
    assert running.start("--token", "next") is None and running.start("--token", "again") is None
    assert alive(working)
    os.kill(working, signal.SIGKILL)
    assert not Path(f"/proc/{running.template}").exists()  # reaped
    assert running.said().count("in the cold from now on: the process to fork from has ended") == 1


def test_a_template_that_does_not_answer_is_ended(running):
    running.first("--token", "first")
    os.kill(running.template, signal.SIGSTOP)
    assert running.start("--token", "next") is None
    assert not Path(f"/proc/{running.template}").exists()
    assert "does not answer" in running.said() and len(running.tales(1)) == 1


def test_code_that_was_installed_anew_is_what_runs(running, tmp_path):
    running.first("--token", "first")
    (tmp_path / "code").touch()
    assert running.start("--token", "next") is None
    assert not Path(f"/proc/{running.template}").exists()
    assert "the installed code has changed; restart the node" in running.said()


def test_an_upgrade_of_a_package_or_of_a_file_of_ours_is_seen(tmp_path, monkeypatch):
    for name in ("client", "sparsecontrast", "flwr"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    told = SimpleNamespace(find_spec=lambda n: SimpleNamespace(origin=str(tmp_path / n / "__init__.py")))
    monkeypatch.setattr(executor.importlib, "util", told)
    first = executor.installed()
    assert executor.installed() == first
    (tmp_path / "client" / "app.py").write_text("new")
    second = executor.installed()
    assert second != first
    (tmp_path / "torch-9.dist-info").mkdir()
    assert executor.installed() != second


@pytest.mark.parametrize("told", ["no", "yes"])
def test_a_site_that_wants_no_template_has_none(told, monkeypatch):
    done = []
    monkeypatch.setenv(executor.VARIABLE, told)
    monkeypatch.setattr(executor, "Template", lambda: done.append("template"))
    monkeypatch.setattr(executor, "start_with", lambda *_: done.append("put in"))
    program = SimpleNamespace(flower_superexec=lambda: done.append("flower"))
    monkeypatch.setattr(executor.importlib, "import_module", lambda _: program)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        executor.main()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == (["flower"] if told == "no" else ["template", "put in", "flower"])


def spec(kind):
    return ExecutionSpec(
        task_type=kind, runtime_api_address="127.0.0.1:1", token="secret", insecure=True,
        root_certificates_path=None, runtime_dependency_install=False, parent_pid=7, suppress_output=False,
        task_id=1, fab_hash=None,
    )  # fmt: skip


@pytest.mark.parametrize("living", [True, False])
def test_flowers_own_executor_forks_clients_and_starts_all_else(living, monkeypatch):
    forked, started = [], []
    template = SimpleNamespace(start=lambda told: forked.append(told) or (5 if living else None))
    cold = SimpleNamespace(Popen=lambda command, **_: started.append(command), DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(subprocess_executor, "subprocess", cold)
    executor.start_with(template, subprocess_executor)
    launcher = subprocess_executor.SubprocessExecutor()
    for kind in (TaskType.CLIENT_APP, TaskType.SERVER_APP):
        assert launcher.launch(spec(kind)).status == LaunchResultStatus.ACCEPTED
    arguments = [
        "--runtime-api-address",
        "127.0.0.1:1",
        "--token",
        "secret",
        "--insecure",
        "--parent-pid",
        "7",
    ]
    assert forked == [arguments]
    assert [command[0] for command in started] == (
        ["flwr-serverapp"] if living else ["flwr-clientapp", "flwr-serverapp"]
    )


WARM = """if True:
    import json, os, sys, time
    from pathlib import Path
    from client import executor
    executor.warm()
    threads, before = len(os.listdir("/proc/self/task")), set(sys.modules)
    from benchmarks import first_step
    status = first_step.main(time.time(), *map(Path, sys.argv[1:]))["status"]
    heavy = ("client", "sparsecontrast", "torch", "torchvision", "timm", "flwr", "hydra", "pandas")
    spared = ("sparsecontrast.data.", "pandas.io.")  # each kind of data has readers of its own
    late = [n for n in set(sys.modules) - before if n.split(".")[0] in heavy and not n.startswith(spared)]
    print(json.dumps([threads, status, sorted(late)]))
"""


def test_a_warm_process_has_one_thread_and_leaves_nothing_to_import(tmp_path):
    from benchmarks.deployment import order
    from simulation.deploy import TINY, Deployment

    deployment = Deployment(tmp_path / "d", ("north",), 4)
    deployment.provision()
    (tmp_path / "message").write_bytes(order("north", TINY))
    site = deployment.kits.site("north") / "site.yaml"
    command = [sys.executable, "-P", "-c", WARM, tmp_path / "message", site]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for _ in range(2):  # the first time, the phantoms are made and cached
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    threads, status, late = json.loads(done.stdout.splitlines()[-1])
    assert threads == 1 and status == "ok"
    assert late == []


def test_flowers_supernode_sleeps_by_the_name_that_is_replaced(monkeypatch):
    """It asks the module's own ``time`` to wait for a reply, and three seconds where there is no work."""
    slept, answers = [], iter([[]])
    monkeypatch.setattr(start_client_internal, "time", start_client_internal.time)  # undone at the end
    now = [1000.0]
    monkeypatch.setattr(node.time, "sleep", slept.append)
    monkeypatch.setattr(node.time, "monotonic", lambda: now[0])
    node.hurry(start_client_internal)
    with pytest.raises(StopIteration):
        start_client_internal._push_messages(
            state=SimpleNamespace(get_messages_legacy=lambda **_: next(answers)),
            object_store=None, send=None, push_object=None,
        )  # fmt: skip
    start_client_internal.time.sleep(3)  # an answer was just given
    now[0] += node.SOON_FOR
    start_client_internal.time.sleep(3)
    assert slept == [node.LOOK_SECONDS, node.SOON_SECONDS, node.POLL_SECONDS]
    assert f"time.sleep({node.FLOWERS_LOOK})" in inspect.getsource(start_client_internal._push_messages)
    assert "time.sleep(3)" in inspect.getsource(start_client_internal.start_client_internal)
    assert start_client_internal.time.time is time.time
