import numpy as np
import pytest

from sparsecontrast import findings
from sparsecontrast.collapse import alarms, collapse

GRID = (7, 7)
NOTHING = np.zeros((2000, 49), dtype=bool)


def chosen(scores, m=9):
    kept = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(kept, np.argsort(-scores, axis=1)[:, :m], True, axis=1)
    return kept


def random(count=2000):
    return np.random.Generator(np.random.PCG64(0)).random((count, 49))


def test_a_random_choice_is_varied_and_no_alarm():
    found = collapse(chosen(random()), NOTHING, GRID)
    assert found["sameness"] == pytest.approx(1 / 2000, abs=1e-3)
    assert found["border_share"] == pytest.approx(1, abs=0.03) and found["entropy"] > 0.999
    assert alarms(found) == []


@pytest.mark.parametrize("m", [1, 9, 48])
def test_a_fixed_choice_has_sameness_one(m):
    found = collapse(np.tile(chosen(random(1), m), (2000, 1)), NOTHING, GRID)
    assert found["sameness"] == pytest.approx(1, abs=1e-12)
    assert found["entropy"] == pytest.approx(np.log(m) / np.log(49))
    assert "sameness" in alarms(found)


def test_sameness_is_the_overlap_of_pairs_of_images():
    kept = chosen(random(30) + np.linspace(0, 0.6, 49))
    pairs = np.mean([(a & b).sum() / 9 for a in kept for b in kept])
    assert collapse(kept, NOTHING[:30], GRID)["sameness"] == pytest.approx((pairs - 9 / 49) / (1 - 9 / 49))


def test_nothing_but_border_is_an_alarm_even_when_it_varies():
    ring = np.ones(GRID)
    ring[1:-1, 1:-1] = 0
    found = collapse(chosen(random() + ring.ravel()), NOTHING, GRID)
    assert found["border_share"] == pytest.approx(49 / 24) and alarms(found) == ["border_share"]


def test_kept_text_is_an_alarm():
    excluded = random() > 0.9
    found = collapse(chosen(random()[::-1] + 0.5 * excluded), excluded, GRID)
    assert alarms(found) == ["excluded_share"]
    # masked as the method masks it
    assert alarms(collapse(chosen(random()[::-1] - 9 * excluded), excluded, GRID)) == []


def test_an_image_that_is_nearly_all_black_is_no_alarm():
    excluded = np.ones((2000, 49), dtype=bool)
    excluded[:, ::10] = False  # five cells are left, nine are kept
    assert collapse(chosen(random() - 9 * excluded), excluded, GRID)["excluded_share"] == 0


@pytest.mark.parametrize("name", ["sameness", "border_share", "excluded_share"])
def test_every_alarm_has_words_and_silence_is_calm(name):
    spread = {"sameness": 0.91, "border_share": 1.62, "excluded_share": 0.3, "entropy": 0.5, "n_images": 40}
    (said,), calm = findings.selection_words({"selection": {"spread": {**spread, "alarms": [name]}}})
    assert said.startswith("Alarm: ") and "{" not in said and calm == ""
    said, calm = findings.selection_words({"selection": {"spread": {**spread, "alarms": []}}})
    assert said == [] and "40 held-out images" in calm
    assert findings.selection_words({"selection": None}) == findings.selection_words({}) == ([], "")
