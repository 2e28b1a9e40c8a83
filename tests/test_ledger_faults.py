"""What may happen to a ledger's files and processes: seen, refused, and never less charged than released."""

import json
import resource
import shutil
import signal
import sqlite3

import pytest

from benchmarks.ledger_crashes import POINTS, crash, workers
from sparsecontrast.accounting import epsilon
from sparsecontrast.config import compose
from sparsecontrast.errors import BudgetSpentError, ConfigError, LedgerError, StorageError
from sparsecontrast.ledger import FILE, HEAD, Ledger, ledger_of
from tests.ledgers import CHARGE, COHORT, DELTA, budget, charged, spent


@pytest.fixture
def ledger(tmp_path):
    return charged(tmp_path / "site")


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
