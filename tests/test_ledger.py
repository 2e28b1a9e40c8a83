"""Charged first, never given back, never more than was promised, whatever happens to the files."""

import json
import resource
import shutil
import signal
import sqlite3
import time

import pytest

from benchmarks.ledger_crashes import POINTS, crash, workers
from sparsecontrast.accounting import Charge, epsilon
from sparsecontrast.cohorts import cohort_of
from sparsecontrast.config import compose
from sparsecontrast.errors import BudgetSpentError, ConfigError, LedgerError, PolicyError, StorageError
from sparsecontrast.ledger import FILE, HEAD, Ledger, ledger_of
from sparsecontrast.policy import Policy

KEY, CHARGE, DELTA = b"k" * 32, Charge(4.0, 1.0, 1), 1e-3
PATIENTS = [f"feed{i:012x}" for i in range(40)]
COHORT = cohort_of(PATIENTS, KEY)


def budget(rounds):
    """A policy under which exactly so many rounds fit."""
    return Policy(epsilon([CHARGE] * rounds, DELTA) + 1e-6, DELTA, 1.0, 4)


@pytest.fixture
def ledger(tmp_path):
    """Five of six rounds are charged."""
    ledger = Ledger(tmp_path / "site")
    for number in range(1, 6):
        ledger.reserve("first", number, COHORT, budget(6), CHARGE)
    return ledger


def spent(ledger, cohort=COHORT):
    return ledger.read().epsilon(cohort.digests, DELTA)


def test_a_round_is_charged_and_receipted(tmp_path):
    ledger = Ledger(tmp_path)
    first = ledger.reserve("run", 1, COHORT, budget(3), CHARGE)
    second = ledger.reserve("run", 2, COHORT, budget(3), Charge(4.0, 1.0, 2))
    assert (first.row, second.row, first.attempt) == (3, 4, 1)  # after the ledger's own row and the cohort's
    assert first.epsilon == epsilon([CHARGE], DELTA) and second.epsilon == epsilon([CHARGE] * 3, DELTA)
    assert ledger.verify().hash == second.hash
    assert [(e.run, e.round, e.charge.steps) for e in ledger.read().entries] == [("run", 1, 1), ("run", 2, 2)]
    assert (tmp_path / FILE).stat().st_mode & 0o077 == 0


def test_the_last_round_fits_and_the_next_does_not(ledger):
    ledger.reserve("first", 6, COHORT, budget(6), CHARGE)
    before = ledger.verify()
    with pytest.raises(BudgetSpentError, match=r"Nothing was charged") as caught:
        ledger.reserve("first", 7, COHORT, budget(6), CHARGE)
    assert ledger.verify() == before and caught.value.code == "budget_spent"
    assert not any(patient in str(caught.value) for patient in PATIENTS)


@pytest.mark.parametrize("run", ["first", "second", "renamed"])
def test_another_run_or_a_restart_or_a_new_name_finds_what_was_spent(ledger, run):
    again = Ledger(ledger.path.parent)
    again.reserve(run, 1, COHORT, budget(6), CHARGE)
    with pytest.raises(BudgetSpentError):
        again.reserve(run, 2, COHORT, budget(6), CHARGE)


def test_the_same_round_again_is_charged_again(ledger):
    assert ledger.reserve("first", 5, COHORT, budget(6), CHARGE).attempt == 2
    assert spent(ledger) == epsilon([CHARGE] * 6, DELTA)


@pytest.mark.parametrize("patients", [
    [*PATIENTS, "new"], PATIENTS[:3], [*PATIENTS[39:], "x", "y", "z", "more"],
], ids=["grown", "shrunk", "one stayed"])  # fmt: skip
def test_a_cohort_that_overlaps_does_not_begin_at_zero(ledger, patients):
    cohort, policy = cohort_of(patients, KEY), budget(6)
    assert spent(ledger, cohort) == epsilon([CHARGE] * 5, DELTA)
    ledger.reserve("other", 1, cohort, policy, CHARGE)
    with pytest.raises(BudgetSpentError):
        ledger.reserve("other", 2, cohort, policy, CHARGE)
    with pytest.raises(BudgetSpentError):  # nor does the first one get away from what the other spent
        ledger.reserve("first", 6, COHORT, policy, CHARGE)


def test_other_patients_have_their_own_budget(ledger):
    others = cohort_of([f"other {i}" for i in range(40)], KEY)
    assert ledger.reserve("other", 1, others, budget(2), CHARGE).epsilon == epsilon([CHARGE], DELTA)
    assert spent(ledger) == epsilon([CHARGE] * 5, DELTA)


@pytest.mark.parametrize(("policy", "says"), [
    (budget(60), "target_epsilon was"),
    (Policy(budget(6).target_epsilon, 1e-4, 1.0, 4), r"delta was 0\.001, is 0\.0001"),
    (Policy(budget(6).target_epsilon, DELTA, 2.0, 4), r"max_grad_norm was 1\.0, is 2\.0"),
    (Policy(budget(6).target_epsilon, DELTA, 1.0, 8), "images_per_patient was 4, is 8"),
])  # fmt: skip
def test_a_changed_policy_is_refused_with_what_differs(ledger, policy, says):
    for cohort in (COHORT, cohort_of([*PATIENTS, "new"], KEY)):
        with pytest.raises(PolicyError, match=says):
            ledger.reserve("first", 6, cohort, policy, CHARGE)
    assert len(ledger.read().entries) == 5


def test_a_null_delta_is_the_agreed_one(ledger):
    policy = Policy(budget(6).target_epsilon, None, 1.0, 4)
    assert ledger.reserve("first", 6, COHORT, policy, CHARGE).policy.delta == DELTA


def test_another_key_of_pseudonyms_is_refused(ledger):
    with pytest.raises(LedgerError, match="another key of pseudonyms"):
        ledger.reserve("first", 6, cohort_of(PATIENTS, b"l" * 32), budget(6), CHARGE)


def test_no_pseudonym_is_kept(ledger):
    data = b"".join(path.read_bytes() for path in ledger.path.parent.iterdir())
    assert not any(patient.encode() in data for patient in PATIENTS)


@pytest.mark.parametrize(("run", "number"), [("", 1), ("x" * 201, 1), ("run", 0), ("run", -1)])
def test_a_round_that_cannot_be_is_refused(ledger, run, number):
    with pytest.raises(ConfigError, match="needs a name and a number"):
        ledger.reserve(run, number, COHORT, budget(6), CHARGE)


def test_a_clock_that_goes_backwards_changes_nothing(ledger, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 0.0)
    ledger.reserve("first", 6, COHORT, budget(6), CHARGE)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    with pytest.raises(BudgetSpentError):
        ledger.reserve("first", 7, COHORT, budget(6), CHARGE)
    assert ledger.read().entries[-1].time.startswith("1970-01-01") and ledger.verify()


def test_a_plan_takes_what_is_left_and_a_run_keeps_its_noise(ledger):
    empty = Ledger(ledger.path.parent / "elsewhere")
    policy = budget(6)
    fresh = empty.plan("run", COHORT, policy, 0.5, 20)
    assert not empty.path.exists()
    left = ledger.plan("run", COHORT, policy, 0.5, 20)
    assert left > fresh > 1
    ledger.reserve("run", 1, COHORT, policy, Charge(left, 0.5, 5))
    assert ledger.plan("run", COHORT, policy, 0.5, 20) == left  # goes on
    for number in (2, 3, 4):
        ledger.reserve("run", number, COHORT, policy, Charge(left, 0.5, 5))
    with pytest.raises(BudgetSpentError):
        ledger.reserve("run", 5, COHORT, policy, Charge(left, 0.5, 5))


# what may happen to the files


def edit(ledger, *statements):
    with sqlite3.connect(ledger.path) as db:
        for statement in statements:
            db.execute(statement)
    db.close()


def refused(ledger, says):
    for ask in (ledger.read, ledger.verify, lambda: ledger.reserve("first", 6, COHORT, budget(6), CHARGE)):
        with pytest.raises(LedgerError, match=says) as caught:
            ask()
        assert caught.value.code == "ledger"


@pytest.mark.parametrize(("statement", "row"), [
    ("UPDATE chain SET body = replace(body, '\"steps\":1', '\"steps\":0') WHERE number = 5", 5),
    ("UPDATE chain SET body = body || ' ' WHERE number = 1", 1),
    ("UPDATE chain SET body = x'ff00' WHERE number = 3", 3),
    ("UPDATE chain SET body = cast(x'ff00' AS TEXT) WHERE number = 3", 3),
    ("UPDATE chain SET kind = 'note' WHERE number = 4", 4),
    ("UPDATE chain SET previous = hash WHERE number = 6", 6),
    ("UPDATE chain SET hash = previous WHERE number = 7", 7),
    ("DELETE FROM chain WHERE number = 4", 4),
    ("DELETE FROM chain WHERE number = 1", 1),
    ("UPDATE chain SET number = 9 WHERE number = 3", 3),
    ("INSERT INTO chain SELECT 8, previous, kind, body, hash FROM chain WHERE number = 7", 8),
])  # fmt: skip
def test_a_changed_row_is_named(ledger, statement, row):
    edit(ledger, statement)
    refused(ledger, rf"row {row} is broken")


def test_rows_cut_off_at_the_end_are_missed(ledger):
    edit(ledger, "DELETE FROM chain WHERE number > 5")
    refused(ledger, "5 rows, but there were 7: the ledger was rolled back")


@pytest.mark.parametrize("statement", [
    "DELETE FROM members",
    "UPDATE members SET digests = substr(digests, 17)",
    "UPDATE members SET digests = zeroblob(length(digests))",
])  # fmt: skip
def test_changed_patients_are_missed(ledger, statement):
    edit(ledger, statement)
    refused(ledger, "row 2: the list of its patients was changed or dropped")


def test_patients_put_there_are_seen(ledger):
    edit(ledger, "INSERT INTO members VALUES ('x', zeroblob(16))")
    refused(ledger, r"1 list\(s\) of patients without a row")


def test_a_missing_ledger_is_refused_loudly(ledger):
    ledger.path.unlink()
    refused(ledger, "missing, but it had 7 rows: .* Restore it")
    assert not ledger.path.exists()


@pytest.mark.parametrize("harm", ["emptied", "torn", "garbled", "another"])
def test_a_damaged_file_is_refused(ledger, harm, tmp_path):
    data = ledger.path.read_bytes()
    if harm == "another":
        other = Ledger(tmp_path / "other")
        for number in range(1, 9):
            other.reserve("first", number, COHORT, budget(20), CHARGE)
        data = other.path.read_bytes()
    with open(ledger.path, "r+b") as file:
        file.truncate({"emptied": 0, "torn": len(data) // 2}.get(harm, len(data)))
        if harm == "garbled":
            file.seek(4096)
            file.write(b"\x5a" * (len(data) - 4096))
        if harm == "another":
            file.write(data)
    refused(ledger, "restore it|Restore")


def test_a_missing_or_torn_head_is_refused(ledger):
    whole = ledger.head.read_bytes()
    ledger.head.write_bytes(whole[: len(whole) // 2])
    refused(ledger, "damaged; restore it")
    ledger.head.unlink()
    refused(ledger, "missing")
    ledger.head.write_bytes(whole)
    assert ledger.verify().count == 7


def test_a_ledger_made_anew_under_the_old_head_is_refused(ledger, tmp_path):
    ledger.path.unlink()
    head = ledger.head.read_bytes()
    ledger.head.unlink()
    for number in range(1, 7):
        ledger.reserve("first", number, COHORT, budget(6), CHARGE)
    ledger.head.write_bytes(head)
    refused(ledger, "another ledger was put in its place")


def test_an_old_copy_put_back_is_refused(ledger, tmp_path):
    shutil.copytree(ledger.path.parent, tmp_path / "backup")
    ledger.reserve("first", 6, COHORT, budget(6), CHARGE)
    ledger.path.write_bytes((tmp_path / "backup" / FILE).read_bytes())  # the same file, the same number
    refused(ledger, "7 rows, but there were 8: the ledger was rolled back")


def test_a_copied_folder_cannot_spend(ledger, tmp_path):
    copy = Ledger(shutil.copytree(ledger.path.parent, tmp_path / "copy"))
    refused(copy, "is a copy of the ledger")
    ledger.reserve("first", 6, COHORT, budget(6), CHARGE)  # the original goes on


def test_a_moved_folder_goes_on(ledger, tmp_path):
    moved = Ledger(ledger.path.parent.rename(tmp_path / "moved"))
    moved.reserve("first", 6, COHORT, budget(6), CHARGE)
    with pytest.raises(BudgetSpentError):
        moved.reserve("first", 7, COHORT, budget(6), CHARGE)


def test_a_copy_can_be_adopted_with_a_reason_and_keeps_what_was_spent(ledger, tmp_path):
    copy = Ledger(shutil.copytree(ledger.path.parent, tmp_path / "copy"))
    with pytest.raises(ConfigError, match="say why"):
        copy.adopt(" ")
    copy.adopt("new server, old disk destroyed")
    rows = copy.read().rows
    assert (rows[-1].kind, rows[-1].content["reason"]) == ("adopted", "new server, old disk destroyed")
    copy.reserve("first", 6, COHORT, budget(6), CHARGE)
    with pytest.raises(BudgetSpentError):
        copy.reserve("first", 7, COHORT, budget(6), CHARGE)


def test_what_is_missing_cannot_be_adopted(ledger):
    edit(ledger, "DELETE FROM chain WHERE number > 5")
    with pytest.raises(LedgerError, match="rolled back"):
        ledger.adopt("it will be fine")
    ledger.path.unlink()
    with pytest.raises(LedgerError, match="missing"):
        ledger.adopt("it will be fine")


def test_a_crash_between_row_and_head_is_no_rollback(ledger):
    head = ledger.head.read_bytes()
    ledger.reserve("first", 6, COHORT, budget(6), CHARGE)
    ledger.head.write_bytes(head)  # as if killed before the head was written
    assert ledger.verify().count == 8
    with pytest.raises(BudgetSpentError):
        ledger.reserve("first", 6, COHORT, budget(6), CHARGE)


def test_the_budget_of_real_patients_has_no_home_in_a_run(tmp_path):
    real = compose(f"data=csv data.root={tmp_path}")
    with pytest.raises(ConfigError, match="set site.state_dir to a folder that stays"):
        ledger_of(real, tmp_path)
    kept = compose(f"data=csv data.root={tmp_path} site.state_dir={tmp_path}")
    assert ledger_of(kept, tmp_path).path == tmp_path / FILE == ledger_of(compose(), tmp_path).path


def test_nobody_has_a_ledger_yet(tmp_path):
    with pytest.raises(LedgerError, match="no ledger; it is made by the first private round"):
        Ledger(tmp_path).read()
    assert not list(tmp_path.iterdir())


# a disk that is full, processes that race, kill -9


def fill(folder, room):
    """Charge rounds with ``room`` bytes at most in any file; then say how it ended."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    ledger, done = Ledger(folder), 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        for number in range(1, 10):
            ledger.reserve("full", number, COHORT, budget(90), CHARGE)
            done += 1
    except StorageError as error:
        (folder / "told").symlink_to(f"{done} {error.code}")  # a link needs no room


@pytest.mark.parametrize("room", [1, 5_000, 30_000])
def test_a_full_disk_is_refused_and_what_was_charged_stays(tmp_path, room):
    context = workers()
    process = context.Process(target=fill, args=(tmp_path, room))
    process.start()
    process.join()
    done, code = (tmp_path / "told").readlink().name.split()
    assert process.exitcode == 0 and code == "storage"
    ledger = Ledger(tmp_path)
    ledger.reserve("then", 1, COHORT, budget(90), CHARGE)  # room again
    assert sum(e.run == "full" for e in ledger.read().entries) >= int(done)


def test_a_full_disk_under_the_head_charges_and_does_not_allow(ledger, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(StorageError, match="stays charged but must not be run"):
            ledger.reserve("first", 6, COHORT, budget(6), CHARGE)
    assert spent(ledger) == epsilon([CHARGE] * 6, DELTA) and ledger.verify().count == 8


def race(folder, name, start):
    start.wait()
    won = 0
    try:
        for number in range(1, 100):
            Ledger(folder).reserve(name, number, COHORT, budget(9), CHARGE)
            won += 1
    except BudgetSpentError:
        (folder / f"{name}.won").write_text(str(won))


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_that_race_for_the_last_of_the_budget_share_it(tmp_path, processes):
    context = workers()
    start = context.Barrier(processes)
    runs = [context.Process(target=race, args=(tmp_path, f"run{i}", start)) for i in range(processes)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    won = [int((tmp_path / f"run{i}.won").read_text()) for i in range(processes)]
    assert sum(won) == 9 == len(Ledger(tmp_path).read().entries) and Ledger(tmp_path).verify()
    assert json.loads((tmp_path / HEAD).read_text())["count"] == 11


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_point_never_less_is_charged_than_was_released(tmp_path, point):
    row = crash(point, 2, tmp_path, seed=1)
    assert row["crashes"] >= 2 and row["held"] == row["crashes"] and row["charged"] >= row["released"]
