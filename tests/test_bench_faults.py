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
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from benchmarks import faults
from benchmarks.fault_cases import byzantine, crash, inputs, replies, soak
from benchmarks.fault_cases.case import BrokenPromiseError, Case, expect, judge
from benchmarks.fault_cases.hook.sitecustomize import Patch
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


@pytest.mark.parametrize("worth", [0.1, 0.0])
def test_the_bar_of_lying_sites_must_be_missed_by_what_was_never_trained(worth, tmp_path, monkeypatch):
    """Where training is worth nothing, or a defence does nothing, the rows say so."""
    clean, asked = 0.7, set()

    def trained(wire, folder, strategy, count, factor, seed):
        asked.add((strategy, seed))
        harmed = count and ("no norm bound" in strategy or strategy == "krum")
        return clean - (worth if harmed else 0.0), 0

    monkeypatch.setattr(byzantine, "when_used", lambda *_: nullcontext(lambda: None))
    monkeypatch.setattr(byzantine, "trained", trained)
    monkeypatch.setattr(byzantine, "auroc", lambda run, features: clean - worth)
    rows = {row["fault"]: row["held"] for row in faults.run_group("byzantine", tmp_path, quick=False)}
    controls = {fault for fault in rows if fault.startswith("control")}
    assert len(controls) == 9 and {seed for _, seed in asked} == {0, 1, 2}
    assert {rows[fault] for fault in controls} == {worth > byzantine.ALLOWED}
    for fault in set(rows) - controls:
        assert rows[fault] == (not (worth and fault.startswith("krum"))), fault
