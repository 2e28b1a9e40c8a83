"""``sparsecontrast budget``: what was spent, what is left, and plans; scripts go by its exit status."""

import json
import shutil

import pytest

from sparsecontrast import cli
from sparsecontrast.accounting import Charge, epsilon
from sparsecontrast.cohorts import cohort_of
from sparsecontrast.ledger import Ledger
from sparsecontrast.policy import Policy

CHARGE, DELTA = Charge(4.0, 0.5, 2), 1e-3
COHORT = cohort_of((f"feed{i:012x}" for i in range(40)), b"k" * 32)
POLICY = Policy(epsilon([CHARGE] * 6, DELTA) + 1e-6, DELTA, 1.0, 4)


@pytest.fixture
def site(tmp_path):
    """Of six rounds, two runs have charged four, one of them twice."""
    ledger = Ledger(tmp_path / "run/sites/north")
    for run, number in (("a", 1), ("a", 2), ("a", 2), ("b", 1)):
        ledger.reserve(run, number, COHORT, POLICY, CHARGE)
    return ledger


def budget(capsys, *words, status=0):
    assert cli.main(["budget", *map(str, words)]) == status
    return capsys.readouterr()


@pytest.mark.parametrize("above", ["run/sites/north", "run/sites", "run"])
def test_a_ledger_is_found_and_told(site, above, tmp_path, capsys):
    (told,) = json.loads(budget(capsys, tmp_path / above, "--json").out)["ledgers"]
    (cohort,) = told["cohorts"]
    assert (cohort["patients"], cohort["delta"], cohort["rounds_left"]) == (40, DELTA, 2)
    assert cohort["epsilon"] == epsilon([CHARGE] * 4, DELTA)
    assert cohort["next_round"] == pytest.approx(epsilon([CHARGE] * 5, DELTA) - cohort["epsilon"])
    assert cohort["left"] == pytest.approx(POLICY.target_epsilon - cohort["epsilon"]) and cohort["next_fits"]
    assert [(r["run"], r["rounds"], r["charged"], r["steps"]) for r in told["runs"]] == [
        ("a", 2, 3, 6),
        ("b", 1, 1, 2),
    ]
    assert told["runs"][0]["epsilon_alone"] == epsilon([CHARGE] * 3, DELTA)
    assert told["hash"] == site.verify().hash and told["rows"] == 6


def test_the_table_for_people(site, tmp_path, capsys):
    printed = budget(capsys, site.path.parent).out
    assert f"head 6:{site.verify().hash[:16]}" in printed
    assert f"{epsilon([CHARGE] * 4, DELTA):.3f}" in printed and "rounds left" in printed
    assert not any(f"feed{i:012x}" in printed for i in range(40))


def test_status_3_when_no_further_round_fits(site, capsys):
    for number in (2, 3):
        site.reserve("b", number, COHORT, POLICY, CHARGE)
    out = budget(capsys, site.path.parent, "--json", status=3).out
    assert json.loads(out)["ledgers"][0]["cohorts"][0]["rounds_left"] == 0


def test_verify_proves_the_chain_and_what_was_noted(site, tmp_path, capsys):
    noted = budget(capsys, site.path.parent, "--verify").out.split()[-1]
    assert noted == f"6:{site.verify().hash}"
    site.reserve("b", 2, COHORT, POLICY, CHARGE)
    assert "whole" in budget(capsys, site.path.parent, "--noted", noted).out
    for wrong in ("6:0000000000000000", "9:" + noted[2:], "x", "6:", "0:aaaaaaaa"):
        assert "rolled back past it" in budget(capsys, site.path.parent, "--noted", wrong, status=2).err


def test_a_broken_ledger_is_one_line_and_status_2(site, capsys):
    site.path.unlink()
    for words in ([], ["--verify"], ["--json"], ["--plan", 3, 10, 0.1]):
        error = budget(capsys, site.path.parent, *words, status=2).err
        assert error.startswith("error [ledger]") and "had 6 rows" in error and error.count("\n") == 1


def test_a_plan_without_a_ledger(capsys):
    (plan,) = json.loads(budget(capsys, "--plan", 8, 100, 0.05, "--steps", 5, "--json").out)["plans"]
    assert plan["spent"] == 0 and plan["delta"] == 1e-5
    sigma = plan["noise_multiplier"]
    assert plan["epsilon"] == epsilon([Charge(sigma, 0.05, 500)], 1e-5) <= 8
    assert epsilon([Charge(sigma / 1.002, 0.05, 500)], 1e-5) > 8
    assert (
        f"noise_multiplier {sigma:g}: 100 rounds x 5 steps"
        in budget(capsys, "--plan", 8, 100, 0.05, "--steps", 5).out
    )


def test_a_plan_on_top_of_what_was_spent(site, capsys):
    target = POLICY.target_epsilon
    (plan,) = json.loads(budget(capsys, site.path.parent, "--plan", target, 3, 0.5, "--json").out)["plans"]
    assert plan["spent"] == epsilon([CHARGE] * 4, DELTA) and plan["delta"] == DELTA
    assert plan["epsilon"] <= target
    error = budget(capsys, site.path.parent, "--plan", target + 1, 3, 0.5, status=2).err
    assert "was promised and cannot change" in error
    assert (
        "is spent: no noise can undo it"
        in budget(capsys, site.path.parent, "--plan", 0.1, 3, 0.5, status=2).err
    )


@pytest.mark.parametrize(("words", "said"), [
    ([], "give a site's state folder"),
    (["--plan", 8, 1.5, 0.1], "ROUNDS=1.5 must be a whole number"),
    (["--plan", 8, 0, 0.1], "rounds=0: must be in"),
    (["--plan", 8, 10, 1.5], "sample_rate=1.5: must be in"),
    (["--plan", 0, 10, 0.5], "epsilon=0: must be in"),
    (["--plan", "nan", 10, 0.5], "epsilon=nan"),
    (["--plan", 8, 10, 0.5, "--delta", 2], "delta=2.0: must be in"),
    (["--plan", 8, 10**7, 0.5, "--steps", 10], "rounds x steps=100000000"),
    (["nowhere"], "no ledger.sqlite here"),
])  # fmt: skip
def test_an_error_is_one_line_and_status_2(words, said, capsys):
    error = budget(capsys, *words, status=2).err
    assert said in error and error.count("\n") == 1


def test_a_moved_ledger_is_adopted_with_its_reason(site, tmp_path, capsys):
    copy = shutil.copytree(site.path.parent, tmp_path / "new")
    assert "is a copy of the ledger" in budget(capsys, copy, status=2).err
    printed = budget(capsys, copy, "--adopt", "disk replaced").out
    assert "disk replaced" in printed and "rounds left" in printed
    assert len(Ledger(copy).read().entries) == 4
