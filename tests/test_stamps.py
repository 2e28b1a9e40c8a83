"""Letters stamped into films: where they land, and which choices they draw."""

import numpy as np
import pytest
import torch

from sparsecontrast.collapse import MARKER_ALARM, alarms
from sparsecontrast.config import compose
from sparsecontrast.data.phantom import render
from sparsecontrast.methods import build_method
from sparsecontrast.models.saliency import excluded_cells
from sparsecontrast.overlays import kept_mask, look
from sparsecontrast.stamps import FILMS, GREYS, HEIGHTS, draw_spots, marker_pull, stamp

SIDE, GRID = 112, (7, 7)
CALM = {"foretold": 0.4, "border_share": 0.3, "excluded_share": 0.0}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def films():
    return np.stack([(render(0, i, i, 0, SIDE).image * 255).round().astype(np.uint8) for i in range(FILMS)])


def flat(count=12, grey=40):
    return np.full((count, SIDE, SIDE), grey, dtype=np.uint8)


def highest(scores, m=7):
    kept = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(kept, np.argsort(-scores, axis=1, kind="stable")[:, :m], True, axis=1)
    return kept


def sharpness(images):
    """Score cells by their steepest edge: what loves letters."""
    x = images.astype(np.float64)
    steep = np.abs(np.diff(x, axis=1, append=x[:, -1:])) + np.abs(np.diff(x, axis=2, append=x[..., -1:]))
    return steep.reshape(len(x), 7, 16, 7, 16).max((2, 4)).reshape(len(x), 49)


def darkness(images):
    """Score cells by how dark they are: a letter makes its cell brighter, so it is kept less."""
    return -images.astype(np.float64).reshape(len(images), 7, 16, 7, 16).mean((2, 4)).reshape(len(images), 49)


@pytest.mark.parametrize("grey", GREYS)
@pytest.mark.parametrize("height", HEIGHTS)
@pytest.mark.parametrize("corner", range(4))
def test_a_letter_lies_in_its_cell_alone_with_its_grey_and_height(grey, height, corner):
    images, spots = flat(), draw_spots(12, corner, seeded())
    changed = stamp(images, spots, GRID, grey, height) != images
    assert (images == 40).all()  # the films themselves stay as they are
    cells = changed.reshape(12, 7, 16, 7, 16).any((2, 4)).reshape(12, 49)
    assert (cells.sum(1) == 1).all() and (cells.argmax(1) == spots.cells(GRID)).all()
    assert changed.any(2).sum(1).tolist() == [round(height * SIDE)] * 12
    brightest = stamp(images, spots, GRID, grey, 0.1).max((1, 2)) / 255
    assert (brightest > 0.75 * grey).all() and (brightest <= grey + 1 / 255).all()


def test_letters_stand_near_their_corner_and_on_every_grid_in_one_cell():
    for corner, (down, right) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        row, column = draw_spots(500, corner, seeded(corner)).centres.T
        for share, far in ((row, down), (column, right)):
            share = 1 - share if far else share
            assert share.min() < 0.11 and share.max() > 0.29 and (share >= 0.1).all() and (share <= 0.3).all()
    for grid in ((1, 1), (3, 3), (4, 7), (28, 28)):
        spots = draw_spots(12, 3, seeded())
        changed = stamp(flat(), spots, grid, 1.0, 0.1) != flat()
        where = [np.argwhere(one) * grid // SIDE for one in changed]
        assert [np.unique(w[:, 0] * grid[1] + w[:, 1]).tolist() for w in where] == [
            [c] for c in spots.cells(grid)
        ]


def test_both_letters_are_drawn_and_readable():
    spots = draw_spots(12, 0, seeded())
    assert set(spots.letters.tolist()) == {0, 1}
    ink = stamp(flat(grey=0), spots, (1, 1), 1.0, 0.5) / 255
    for one, letter in zip(ink, spots.letters, strict=True):
        rows, columns = (np.flatnonzero(one.any(axis)) for axis in (1, 0))
        part = one[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert part.shape == (56, 40)
        dots = part.reshape(7, 8, 5, 8).mean((1, 3)) > 0.5
        assert dots[:, 0].all() and dots[0, 1:4].all() == (letter == 1) and dots[6].all() == (letter == 0)


def test_the_pull_is_the_worst_share_kept_with_a_letter_less_the_share_without(films):
    def choose(images):
        """Keep all cells of a film with a light letter; of one without, and of darker letters, the first."""
        kept = np.tile(np.arange(49) == 0, (len(images), 1))
        return kept | (images.max((1, 2)) >= 160)[:, None]

    found = marker_pull(choose, np.minimum(films, 100), GRID, seeded())
    kept = {(one["grey"], one["height"]): one["kept"] for one in found["stamps"]}
    assert set(kept) == {(g, h) for g in GREYS for h in HEIGHTS}
    dark, base = kept.pop((0.6, 0.05)), found["marker_base"]
    assert 0 < base == dark == kept.pop((0.6, 0.1)) < 0.1 and set(kept.values()) == {1.0}
    assert found["marker_pull"] == 1 - base and found["marker_grey"] == 0.7  # the first of the worst
    assert found["marker_films"] == FILMS


def test_the_alarm_fires_on_a_choice_that_loves_letters_and_keeps_silent_on_others(films):
    found = marker_pull(lambda x: highest(sharpness(x)), films, GRID, seeded())
    assert found["marker_pull"] > 0.3 and alarms(CALM | found) == ["marker_pull"]
    for score in (darkness, lambda x: np.tile(np.arange(49.0), (len(x), 1))):
        found = marker_pull(lambda x, s=score: highest(s(x)), films, GRID, seeded())
        assert found["marker_pull"] <= 0.05 < MARKER_ALARM and alarms(CALM | found) == []


def test_the_same_seed_gives_the_same_numbers(films):
    def choose(images):
        return highest(sharpness(images))

    one = marker_pull(choose, films[:8], GRID, seeded())
    assert one == marker_pull(choose, films[:8], GRID, seeded()) and one["marker_films"] == 8
    assert one != marker_pull(choose, films[:8], GRID, seeded(1))


@pytest.mark.parametrize("words", ["backbone.patch_size=8", "backbone=convnext_atto backbone.tiles=7"])
def test_the_mask_is_what_keeps_letters_out_of_any_backbone(films, words, monkeypatch):
    size = 112 if "patch" in words else 224
    method = build_method(
        compose(f"backbone.img_size={size} selection=energy {words} method.keep=0.4")
    ).eval()

    def choose(images):
        scores, kept, grid = look(method, images)
        assert grid == GRID
        return np.stack([kept_mask(cells, grid).ravel() for cells in kept])

    masked = marker_pull(choose, films[:12], GRID, seeded())["marker_pull"]
    monkeypatch.setattr("sparsecontrast.methods.looking.excluded_cells", lambda x, g: torch.zeros(len(x), 49))
    bare = marker_pull(choose, films[:12], GRID, seeded())
    assert bare["marker_pull"] > masked + 0.1


def burnt(films, grey):
    """Write a bold L of strokes of 2 pixels into cell (1, 1)."""
    films = films.copy()
    films[:, 20:30, 20:22] = films[:, 28:30, 20:28] = round(255 * grey)
    return films


@pytest.mark.parametrize(("grey", "least"), [(1.0, 0.95), (0.9, 0.85), (0.8, 0.45), (0.7, 0.1), (0.6, 0.0)])
def test_the_mask_finds_letters_as_far_as_they_stand_out(films, grey, least):
    def text(images):
        return excluded_cells(torch.from_numpy(images)[:, None].float(), GRID)[:, 8].float().mean()

    assert text(films) == 0 and text(burnt(films, grey)) >= least


def test_the_mask_leaves_phantom_lungs_and_their_lesions_alone(films):
    inner = torch.zeros(7, 7, dtype=torch.bool)
    inner[2:6, 1:6] = True  # written on films is above and beside the lungs
    excluded = excluded_cells(torch.from_numpy(films)[:, None].float(), GRID)
    assert excluded[:, inner.flatten()].float().mean() <= 0.005
    assert excluded.float().mean() > 0.02  # and yet it is at work


def test_windows_of_text_follow_cells_of_any_size():
    images = torch.full((1, 1, 42, 60), 0.2)
    images[..., 15:21, 31] = images[..., 20, 31:34] = 1.0  # cells of 14 x 12: row 1, column 2
    images[..., 0, 0] = 0.0
    assert excluded_cells(images, (3, 5)).nonzero().tolist() == [[0, 7]]


def test_where_all_is_noise_nothing_is_text():
    noise = torch.randn(4, 1, SIDE, SIDE, generator=seeded())
    assert not excluded_cells(noise, GRID).any()
    noise[:, :, 20:30, 20:22] = noise[:, :, 28:30, 20:28] = 30.0  # far out of the noise
    assert excluded_cells(noise, GRID).nonzero().tolist() == [[i, 8] for i in range(4)]
