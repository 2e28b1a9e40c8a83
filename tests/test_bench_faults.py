"""The fault matrix: it sees what is not withstood, goes on where it stopped, and its fast part holds."""

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from benchmarks import faults
from benchmarks.fault_cases import (
    byzantine,
    crash,
    growth,
    inputs,
    replies,
    soak,
    soak_processes,
    ten_labs,
)  # fmt: skip
from benchmarks.fault_cases.case import BrokenPromiseError, Case, expect, judge
from benchmarks.fault_cases.hook.sitecustomize import Patch
from simulation.deploy import Deployment
from simulation.processes import wait_until
from sparsecontrast import checkpoint, payload
from sparsecontrast.egress import EgressLog
from tests.ledgers import charged


def case(work):
    return Case("group", "a fault, 1e6!", work)


def test_a_case_is_judged_once_and_a_failed_one_again_when_asked(tmp_path):
    calls = []

    def flaky(folder):
        assert folder.is_dir() and not list(folder.iterdir())
        calls.append(folder)
        expect(len(calls) > 1, "lost  a\nsite")
        return {"found": "named", "sites": 9}

    row = judge(case(flaky), tmp_path)
    assert (row["held"], row["found"], row["fault"]) == (False, "lost a site", "a fault, 1e6!")
    assert judge(case(flaky), tmp_path) == row and len(calls) == 1
    row = judge(case(flaky), tmp_path, again=True)
    assert (row["held"], row["sites"]) == (True, 9)
    assert judge(case(flaky), tmp_path, again=True) == row and len(calls) == 2


def test_an_exception_that_nobody_foresaw_is_a_failed_case(tmp_path):
    row = judge(case(lambda folder: {}["no"]), tmp_path)
    assert not row["held"] and row["found"] == "KeyError: 'no'"


def test_replies_are_refused_and_an_honest_one_would_be_seen_to_pass(tmp_path, monkeypatch):
    monkeypatch.setitem(replies.LIES, "harmless", ("weights", lambda told: None, "payload_norm"))
    chosen = ("the answer of the round before", "harmless")
    monkeypatch.setattr(replies, "QUICK", chosen)
    rows = {row["fault"]: row for row in faults.run_group("replies", tmp_path, quick=True)}
    assert set(rows) == {*chosen, replies.PICKLED}
    assert not rows["harmless"]["held"] and "refused: {}" in rows.pop("harmless")["found"]
    assert all(row["held"] for row in rows.values()), rows


def test_the_fast_groups_hold_and_the_rows_are_written(tmp_path, capsys):
    file = tmp_path / "faults.json"
    assert faults.main(["--quick", "--only", "inputs", "--json", str(file)]) == 0
    told = json.loads(file.read_text())
    assert told["command"] == "python -m benchmarks.faults --quick --only inputs"
    assert f"inputs: {len(told['rows'])} of {len(told['rows'])}" in capsys.readouterr().out


def test_a_sound_file_among_the_broken_ones_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "BROKEN", {"nothing": lambda data: data})
    with pytest.raises(BrokenPromiseError, match="taken for sound.*nothing, mlut_18.dcm"):
        inputs.broken(tmp_path, 2)


HOOKED = """if True:
    import sys
    from pathlib import Path
    from sparsecontrast import egress
    log = egress.EgressLog(Path(sys.argv[1]))
    for number in range(3):
        log.append("train", {"round": number})
"""
# client.executor's, which has imported all of it before it forks a process that is to die
FORKED = f"""if True:  # client.executor
    import os, sys, types
    from sparsecontrast import egress
    sys.modules["client.sentinel"] = types.ModuleType("client.sentinel")
    if pid := os.fork():
        status = os.waitpid(pid, 0)[1]
        os.kill(os.getpid(), status) if status else sys.exit(0)
{HOOKED.removeprefix("if True:")}"""


@pytest.mark.parametrize("code", [HOOKED, FORKED], ids=["started", "forked"])
@pytest.mark.parametrize(
    ("when", "rows", "torn"), [("enter", 1, False), ("half", 1, True), ("leave", 2, False)]
)
def test_a_process_dies_once_where_the_plan_says(tmp_path, code, when, rows, torn):
    plan, hook = tmp_path / "plan.json", Path(faults.__file__).parent / "fault_cases" / "hook"
    at = {"module": "sparsecontrast.egress", "function": "_write", "when": when, "call": 2, "after": ""}
    victim = "itself" if code is FORKED else [str(tmp_path), "FAULTS_PLAN"]
    plan.write_text(json.dumps(at | {"process": [str(tmp_path)], "victim": victim}))
    environment = {**os.environ, "FAULTS_PLAN": str(plan), "PYTHONPATH": f"{hook}:{Path(hook).parents[2]}"}
    command = [sys.executable, "-c", code, str(tmp_path / "site")]
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    assert len(json.loads((tmp_path / "plan.json.killed").read_text())) == 1
    log = EgressLog(tmp_path / "site")
    assert len(log.rows()) == rows and log.path.read_bytes().endswith(b"\n") != torn
    assert not plan.exists()
    assert subprocess.run(command, env=environment).returncode == 0
    assert len(log.rows()) == rows + 3 + torn and log.verify()


def test_a_process_stands_where_the_plan_says_until_it_is_let_go(tmp_path):
    plan, hook = tmp_path / "plan.json", Path(faults.__file__).parent / "fault_cases" / "hook"
    at = {"module": "sparsecontrast.egress", "function": "_write", "when": "leave", "call": 0, "after": ""}
    told = at | {"process": [str(tmp_path)], "victim": "nobody"}
    plan.write_text(json.dumps(told))
    environment = {**os.environ, "FAULTS_PLAN": str(plan), "PYTHONPATH": f"{hook}:{Path(hook).parents[2]}"}
    command = [sys.executable, "-c", HOOKED, str(tmp_path / "site")]
    done, log = Path(f"{plan}.done"), EgressLog(tmp_path / "site")
    with subprocess.Popen(command, env=environment) as process:
        wait_until(done.exists, 120)
        assert len(log.rows()) == 1 and process.poll() is None
        done.unlink()
    assert process.returncode == 0 and len(log.rows()) == 3 and not plan.exists()
    plan.write_text(json.dumps(told | {"call": 1}))  # another's: who waits for its own leaves it alone
    Patch(told, str(plan)).kill()
    assert plan.exists() and not done.exists()


def test_what_is_released_and_not_charged_is_seen(tmp_path):
    """The ledger's check of the crash group, on a site that answered once more than it was charged."""
    state = tmp_path / "states" / crash.VICTIM
    charged(state / crash.INSECURE)
    struck = object.__new__(crash.Struck)
    struck.deployment = SimpleNamespace(folder=tmp_path)  # type: ignore[assignment]
    log = EgressLog(state)
    log.append("train", {"status": "ok", "run_key": "first", "round": 1})
    assert struck.charged() == 5
    log.append("train", {"status": "ok", "run_key": "first", "round": 1})
    with pytest.raises(BrokenPromiseError, match="charged 1, released 2"):
        struck.charged()


def test_memory_that_grows_is_told_from_noise():
    noise = np.random.Generator(np.random.PCG64(0)).normal(size=16)
    found, error = soak.slope(list(500 + noise))
    assert abs(found) < 3 * error and found * soak.ROUNDS < soak.GROWTH
    found, error = soak.slope([500 + 2 * i + noise[i] for i in range(16)])
    assert abs(found - 2) < 3 * error and found * soak.ROUNDS > soak.GROWTH


def test_an_update_is_multiplied_and_passes_every_check_of_form(tmp_path):
    shapes = {"backbone.w": (2, 3), "saliency.b": (1,)}
    weights = {name: torch.ones(shape) for name, shape in shapes.items()}
    checkpoint.write_round(tmp_path, 0, weights, {})
    sent = payload.pack({name: tensor + 0.5 for name, tensor in weights.items()}, list(shapes), "fp32")
    content = RecordDict(
        {"arrays": ArrayRecord({"flat": Array(sent.flat)}), "manifest": ConfigRecord(sent.manifest)}
    )
    reply = SimpleNamespace(content=content)
    lying = byzantine.Liars(tmp_path, ("a",), -10.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(byzantine, "copy", lambda message: message)
        ((at_once, told),) = lying.deliver("a", 1, reply)  # type: ignore[arg-type]
    flat = told.content.array_records["arrays"]["flat"].numpy()
    assert at_once and (flat == 1 - 5).all()
    payload.verify(payload.Payload(flat, dict(told.content.config_records["manifest"])), shapes)
    ((_, honest),) = lying.deliver("b", 1, reply)  # type: ignore[arg-type]
    assert honest is reply


def test_cells_are_dealt_whole_groups_at_a_time_and_evenly(shared_data, tmp_path):
    source = shared_data / "wbc"
    folder = ten_labs.deal(10, tmp_path / "cells", source)
    dealt, real = (pd.read_csv(f / "index.csv", dtype=str, keep_default_na=False) for f in (folder, source))
    assert sorted(dealt["path"]) == sorted(real["path"]) and (folder / dealt["path"][0]).is_file()
    assert dealt.groupby("group_id")["site"].nunique().tolist() == [1] * dealt["group_id"].nunique()
    assert dealt["group_id"].nunique() == real.groupby(["site", "group_id"]).ngroups
    assert len(set(dealt.loc[dealt["label"] == "lymphocyte", "site"])) == 10
    assert ten_labs.deal(10, tmp_path / "cells", source) == folder


@pytest.mark.parametrize("worth", [0.1, 0.0])
def test_the_bar_of_lying_sites_must_be_missed_by_what_was_never_trained(worth, tmp_path, monkeypatch):
    """Where training is worth nothing, or a defence does nothing, the rows say so."""
    clean, asked = 0.7, set()

    def trained(wire, folder, strategy, told, factor):
        asked.add((strategy, told[-1]))
        harmed = factor != 1 and ("no norm bound" in strategy or strategy == "krum")
        return clean - (worth if harmed else 0.0), 0

    monkeypatch.setattr(byzantine, "when_used", lambda *_: nullcontext(lambda: None))
    monkeypatch.setattr(byzantine, "trained", trained)
    monkeypatch.setattr(byzantine, "score", lambda run, number: clean - worth)
    monkeypatch.setattr(byzantine, "deal", lambda count, folder: folder)
    rows = {row["fault"]: row["held"] for row in faults.run_group("byzantine", tmp_path, quick=False)}
    controls = {fault for fault in rows if fault.startswith("control")}
    assert len(controls) == 6 and {seed for _, seed in asked} == {"seed=0", "seed=1", "seed=2"}
    assert {rows[fault] for fault in controls} == {worth > byzantine.ALLOWED}
    for fault in set(rows) - controls:
        assert rows[fault] == (not (worth and fault.startswith("krum"))), fault


def watched(rounds=12):
    """What a look at two processes gives that do not grow, after each round."""
    flat = [100.0 + 0.1 * (i % 2) for i in range(rounds)]
    return soak_processes.Seen(
        rounds=[*range(1, rounds + 1)],
        memory={"superlink program 7": [*flat], "a template 8": [*flat]},
        files={"superlink program 7": [9.0, 12.0] * (rounds // 2), "a template 8": [5.0] * rounds},
        ports=[4.0] * rounds,
        zombies=[0.0, 1.0] * (rounds // 2),
        disk={"tmp": [8.0] * rounds, "run": [float(i) for i in range(rounds)], "states": [*flat]},
    )


def ramp(series, step):
    return [value + step * i for i, value in enumerate(series)]


GROWN = {
    "memory of a template": lambda seen: seen.memory.update({"a template 8": ramp([100.0] * 12, 1.5)}),
    "files of superlink": lambda seen: seen.files.update({"superlink program 7": ramp([9.0] * 12, 1)}),
    "zombies": lambda seen: setattr(seen, "zombies", ramp([0.0] * 12, 1)),
    "ports": lambda seen: setattr(seen, "ports", [4.0] * 11 + [5.0]),
    "tmp grows": lambda seen: seen.disk.update(tmp=ramp([8.0] * 12, 0.25)),
    "states grows": lambda seen: seen.disk.update(states=ramp([8.0] * 12, 200)),
    "still there a round later": lambda seen: seen.stale.append("client 9 after round 3"),
    "not there for the whole run": lambda seen: seen.memory.update({"a template 10": [100.0] * 6}),
    "looked after 9 of 12 rounds": lambda seen: setattr(seen, "rounds", [*range(1, 10)]),
}


def test_a_long_run_of_processes_that_do_not_grow_is_withstood():
    found = soak_processes.judged(watched(), 12, 4)
    assert found["a_round"]["run_kib"] == 1.0 and abs(found["a_round"]["template_memory"]) < 0.02


@pytest.mark.parametrize("what", GROWN)
def test_whatever_grows_from_round_to_round_is_named(what):
    seen = watched()
    GROWN[what](seen)
    with pytest.raises(BrokenPromiseError, match=what):
        soak_processes.judged(seen, 12, 4)


def test_processes_are_told_apart_and_their_ports_and_files_counted(tmp_path):
    code = "import socket, time; s = socket.create_server(('127.0.0.1', 0)); print(1, flush=True)"
    code += "; time.sleep(60)"
    with Deployment(tmp_path / "d", ("north",)) as deployment:
        deployment.folder.mkdir()
        script = tmp_path / "run.sh"
        script.write_text(f'{sys.executable} -c "{code}" flwr-clientapp &\nwait\n')
        program = deployment.launch("north", script)
        wait_until(lambda: deployment.log("north").exists() and deployment.log("north").read_text(), 60)
        found = {p.name: p for p in soak_processes.family(deployment)}
        assert set(found) == {"north program", "north client"} and found["north program"].pid == program.pid
        client = found["north client"]
        assert client.parent == program.pid and not client.zombie
        assert len(growth.ports(client.pid)) == 1 and not growth.ports(program.pid)
        assert growth.proportional(client.pid) > 1
        (deployment.folder / "tmp" / "empty").mkdir(parents=True)
        (deployment.folder / "tmp" / "file").write_bytes(bytes(2048))
        assert soak_processes.sizes(deployment)["tmp"] == 2 + 0.5
