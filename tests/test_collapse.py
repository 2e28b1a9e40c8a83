import numpy as np
import pytest

from sparsecontrast import looked
from sparsecontrast.collapse import MARKER_ALARM, alarms, collapse

GRID = (7, 7)
# no cell is excluded
NOTHING = np.zeros((2000, 49), dtype=bool)


def chosen(scores, m=9):
    kept = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(kept, np.argsort(-scores, axis=1, kind="stable")[:, :m], True, axis=1)
    return kept


def random(count=2000):
    return np.random.Generator(np.random.PCG64(0)).random((count, 49))


def measured(scores, excluded=NOTHING, m=9):
    """Choose from scores as they are: the mask is not at work."""
    return collapse(chosen(scores, m), scores, excluded[: len(scores)], GRID)


def masked(scores, excluded, m=9):
    """Choose as the method does, excluded cells last."""
    return measured(scores - 1e4 * excluded, excluded, m)


def test_a_random_choice_is_varied_and_no_alarm():
    found = measured(random())
    assert found["sameness"] == pytest.approx(1 / 2000, abs=1e-3)
    assert found["border_share"] == pytest.approx(1, abs=0.03) and found["entropy"] > 0.999
    assert found["foretold"] == pytest.approx(0, abs=0.03)
    assert alarms(found) == []


@pytest.mark.parametrize("m", [1, 9, 48])
def test_a_fixed_choice_has_sameness_one(m):
    found = measured(np.tile(random(1), (2000, 1)), m=m)
    assert found["foretold"] == 1 and found["sameness"] == pytest.approx(1, abs=1e-12)
    assert found["entropy"] == pytest.approx(np.log(m) / np.log(49))
    assert "foretold" in alarms(found)


@pytest.mark.parametrize("m", [5, 9, 25])
def test_a_fixed_map_is_found_out_whatever_the_borders(m):
    fixed = np.tile(random(1), (2000, 1)).round(1)  # with ties
    excluded = random()[::-1] > 0.6
    found = masked(fixed, excluded, m)
    assert found["sameness"] < 0.8 and found["foretold"] == 1 and alarms(found) == ["foretold"]


def test_sameness_is_the_overlap_of_pairs_of_images():
    scores = random(30) + np.linspace(0, 0.6, 49)
    kept = chosen(scores)
    pairs = np.mean([(a & b).sum() / 9 for a in kept for b in kept])
    assert measured(scores)["sameness"] == pytest.approx((pairs - 9 / 49) / (1 - 9 / 49))


def test_nothing_but_border_is_an_alarm_even_when_it_varies():
    ring = np.ones(GRID)
    ring[1:-1, 1:-1] = 0
    found = measured(random() + ring.ravel())
    assert found["border_share"] == pytest.approx(49 / 24) and alarms(found) == ["border_share"]


def test_kept_text_is_an_alarm():
    excluded = random() > 0.9
    assert alarms(measured(random()[::-1] + 0.5 * excluded, excluded)) == ["excluded_share"]
    assert alarms(masked(random()[::-1], excluded)) == []


def test_an_image_that_is_nearly_all_black_is_no_alarm():
    excluded = np.ones((2000, 49), dtype=bool)
    excluded[:, ::10] = False  # five cells are left, nine are kept
    found = masked(random(), excluded)
    assert found["excluded_share"] == 0 and found["foretold"] == 0


MARKERS = {"marker_pull": 0.41, "marker_base": 0.06, "marker_grey": 0.8, "marker_films": 32}


@pytest.mark.parametrize("name", ["foretold", "border_share", "excluded_share", "marker_pull"])
def test_every_alarm_has_words_and_silence_is_calm(name):
    spread = {"foretold": 0.97, "border_share": 1.62, "excluded_share": 0.3, "n_images": 40, **MARKERS}
    (said,), calm = looked.selection_words({"selection": {"spread": {**spread, "alarms": [name]}}})
    assert said.startswith("Alarm: ") and "{" not in said and calm == ""
    said, calm = looked.selection_words({"selection": {"spread": {**spread, "alarms": []}}})
    assert said == [] and "40 held-out images" in calm
    assert looked.selection_words({"selection": None}) == looked.selection_words({}) == ([], "")


def test_calm_says_of_burnt_in_text_what_was_measured_and_no_more():
    spread = {"foretold": 0.4, "border_share": 0.3, "excluded_share": 0.0, "n_images": 40, "alarms": []}
    before = looked.selection_words({"selection": {"spread": spread}})[1]
    assert "letter" not in before and "text" not in before and "{" not in before
    calm = looked.selection_words({"selection": {"spread": {**spread, **MARKERS}}})[1]
    assert calm.startswith(before) and "{" not in calm
    assert "32 of the images: 47 % of the regions with a letter" in calm and "6 % of the same" in calm


def test_the_bound_of_markers_is_asked_only_where_it_was_measured():
    calm = {"foretold": 0.4, "border_share": 0.3, "excluded_share": 0.0}
    assert alarms(calm) == [] and alarms({**calm, "marker_pull": MARKER_ALARM}) == []
    assert alarms({**calm, "marker_pull": MARKER_ALARM + 0.01}) == ["marker_pull"]
