"""Lines that are cut: nothing passes until they are mended, and a real federation gets over it."""

import contextlib
import shutil
import subprocess
import sys

import pytest

from benchmarks import faults
from benchmarks.fault_cases.case import Case, NotHereError, judge, row_file, withstood
from benchmarks.fault_cases.namespaces import ADDRESS, Machines
from benchmarks.fault_cases.network import TRAINING, Lines

SERVER = f"""if True:
    import socket
    server = socket.create_server(("{ADDRESS}", 5000))
    print("up", flush=True)
    line, _ = server.accept()
    for word in line.makefile():
        print(word, end="", flush=True)
"""
CLIENT = f"""if True:
    import socket, sys
    line = socket.create_connection(("{ADDRESS}", 5000), 60)
    for word in sys.stdin:
        line.sendall(word.encode())
        print("sent", flush=True)
"""
CALL = f"import socket; socket.create_connection(('{ADDRESS}', 5000), 3)"


@pytest.fixture
def machines():
    with contextlib.ExitStack() as stack:
        try:
            yield stack.enter_context(Machines(("north", "south")))
        except NotHereError as lacking:
            pytest.skip(f"no network namespaces: {lacking}")


def started(words, code):
    return subprocess.Popen(
        [*words, sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def call(machines, site):
    return subprocess.run(
        [*machines.within(site), sys.executable, "-c", CALL], capture_output=True, text=True
    )


def test_a_cut_line_loses_what_is_sent_without_a_word_and_a_mended_one_brings_it(machines):
    with started(machines.within(), SERVER) as server, started(machines.within("north"), CLIENT) as client:
        assert server.stdin and server.stdout and client.stdin and client.stdout

        def send(word):
            print(word, file=client.stdin, flush=True)
            assert client.stdout.readline() == "sent\n"  # its own machine took it

        assert server.stdout.readline() == "up\n"
        send("before")
        assert server.stdout.readline() == "before\n"
        machines.cut("north")
        send("within")
        assert "timed out" in call(machines, "north").stderr  # neither refused nor "no route"
        assert call(machines, "south").returncode == 0  # its line is another one
        machines.mend("north")
        assert server.stdout.readline() == "within\n"
        client.stdin.close()
        assert client.wait(60) == 0 and server.wait(60) == 0


def test_a_machine_in_a_namespace_has_nothing_of_the_real_one_and_leaves_nothing(machines):
    def links(*words):
        told = subprocess.run([*words, "ip", "-brief", "link"], capture_output=True, text=True, check=True)
        return {line.split()[0].split("@")[0] for line in told.stdout.splitlines()}

    assert links(*machines.within("north")) == {"lo", "line"}
    assert links(*machines.within()) == {"lo", "to1", "to2"}
    assert not links() & {"line", "to1", "to2"}
    pid = machines.within("north")[2]
    machines.__exit__()
    assert subprocess.run(["nsenter", "--target", pid, "--net", "true"], capture_output=True).returncode


def test_where_namespaces_are_not_allowed_the_cases_are_told_as_not_done(tmp_path, monkeypatch, capsys):
    """Neither withstood nor failed, not kept, and no reason to exit with 1; a failure is."""
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "unshare" else name)
    command = ["--only", "network", "--out", str(tmp_path), "--json", str(tmp_path / "rows.json")]
    assert faults.main(command) == 0
    told = capsys.readouterr().out
    assert "not done here: no program unshare" in told and "FAILED" not in told
    assert "network: 0 of 0, 8 not done" in told
    assert not list((tmp_path / "rows").rglob("*.json"))


def test_what_was_not_done_counts_neither_way(tmp_path):
    def lacking(_):
        raise NotHereError("no namespaces")

    case = Case("network", "a cut", lacking)
    row = judge(case, tmp_path)
    assert row["held"] is None and not row_file(case, tmp_path).exists()
    held, failed = {"held": True}, {"held": False}
    assert withstood([row, held, failed]) == "1 of 2, 1 not done" and withstood([held]) == "1 of 1"
    assert judge(Case("network", "a cut", lambda _: {"found": "mended"}), tmp_path)["held"]


@pytest.mark.e2e
def test_a_hospital_whose_line_is_cut_while_it_trains_gives_the_same_answer(tmp_path):
    """A SuperLink and two SuperNodes, each in its own namespace: the weights are bit for bit the same."""
    with contextlib.ExitStack() as stack:
        try:
            lines = Lines(tmp_path, stack, rounds=2)
        except NotHereError as lacking:
            pytest.skip(f"no network namespaces: {lacking}")
        assert "rounds 1 to 2 as undisturbed" in lines.judge(lambda one: one.in_time(TRAINING, 5))["found"]
        deployment = lines.deployment
    assert not deployment.processes()
