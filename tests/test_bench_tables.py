"""The READMEs hold what the committed results say."""

import pytest

from benchmarks import tables


@pytest.mark.parametrize("path", tables.READMES, ids=lambda path: path.parent.name)
def test_no_table_of_a_readme_is_stale(path):
    text = path.read_text()
    assert tables.MARKED.search(text) and text.count("<!-- table") == text.count("<!-- end -->")
    assert tables.fill(text) == text, "run `python -m benchmarks.tables`"


def test_every_committed_result_of_a_table_is_shown():
    shown = {found["name"] for path in tables.READMES for found in tables.MARKED.finditer(path.read_text())}
    assert shown == {name for name in tables.TABLES if tables.TABLES[name]().count("\n") > 1}


def test_an_unknown_table_is_refused_and_text_around_a_table_stays():
    with pytest.raises(KeyError, match="no_such"):
        tables.fill("<!-- table no_such -->\n<!-- end -->\n")
    filled = tables.fill("before\n<!-- table borders -->\nold\n<!-- end -->\nafter\n")
    assert filled.startswith("before\n<!-- table borders -->\n\n| network |") and "old" not in filled
    assert filled.endswith("|\n\n<!-- end -->\nafter\n") and tables.fill(filled) == filled


def test_differences_are_shown_with_their_intervals():
    row = {"task": "t", "label": "a", "auroc": 0.7, "minus_dense": 0.02, "minus_dense_low": -0.01}
    both = row | {"minus_dense_high": 0.05, "ours_minus": 0.1, "ours_minus_low": 0.09, "ours_minus_high": 0.2}
    assert tables._difference([both], "t", None) == (
        "0.700",
        "+0.020 [-0.010, +0.050]",
        "+0.100 [+0.090, +0.200]",
    )
    assert tables._difference([row], "t", "a") == ("0.700", "–", "–")  # one model: nothing to pair
    other = {"task": "t", "label": "a", "auroc": 0.6, "minus_mae": 0.1, "minus_mae_low": 0.05}
    told = tables._difference([other | {"minus_mae_high": 0.15}], "t", "a", "mae")
    assert told == ("0.600", "+0.100 [+0.050, +0.150]", "–")
    assert tables._difference([row], "t", "b") == ("–", "–", "–")
