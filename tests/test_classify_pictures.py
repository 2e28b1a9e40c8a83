"""What was read can be seen in the picture of it, on dark nuclei and on bright ground."""

import numpy as np
import pytest

from sparsecontrast.classify.pictures import SIDE, _read

WORD = SIDE // 16


@pytest.fixture
def mask():
    found = np.zeros((16, 16), dtype=bool)
    found[5, 7] = True
    return found


@pytest.mark.parametrize("level", [0, 60, 128, 200])
def test_a_square_that_was_read_is_shown_as_it_is_with_an_outline_that_stands_out(mask, level):
    drawn = _read(np.full((64, 64, 3), level, dtype=np.uint8), mask).astype(int)
    top, left = 5 * WORD, 7 * WORD
    assert (drawn[top : top + WORD, left : left + WORD] == level).all()
    outline = drawn[top - 1, left - 1 : left + WORD + 1]
    ground = drawn[top - 3, left - 1 : left + WORD + 1]
    assert (outline - level >= 50).all() and (outline - ground >= 100).all()
    assert (drawn == 255).all(axis=2).sum() == (WORD + 2) ** 2 - WORD**2  # one pixel all round, no more


def test_a_white_square_stands_out_from_white_ground_that_was_not_read(mask):
    drawn = _read(np.full((64, 64, 3), 255, dtype=np.uint8), mask).astype(int)
    assert drawn[5 * WORD, 7 * WORD].min() - drawn[0, 0].max() >= 100


def test_an_unread_nucleus_is_no_black_on_which_a_dark_square_is_lost(mask):
    drawn = _read(np.zeros((64, 64, 3), dtype=np.uint8), mask).astype(int)
    assert drawn[0, 0].min() >= 60
