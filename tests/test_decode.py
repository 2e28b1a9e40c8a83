import os

import numpy as np
import pytest
from PIL import Image

from sparsecontrast.data import decode
from sparsecontrast.data.decode import Task
from sparsecontrast.data.store import open_pixels
from tests.image_files import SIZE, expected, make_files, reading, tasks_of


@pytest.mark.parametrize(("height", "width"), [(64, 128), (128, 64), (100, 100), (20, 9), (3, 300), (32, 32)])
def test_fit_keeps_the_aspect_centres_and_pads_with_zero(height, width):
    square = decode.fit(np.ones((height, width), dtype=np.float32), SIZE)
    left, top, w, h = decode.placement(height, width, SIZE)
    assert max(w, h) == SIZE
    short = SIZE * min(height, width) / max(height, width)
    assert abs(min(w, h) - short) <= 0.5 or (short < 1 and min(w, h) == 1)
    assert abs(2 * left + w - SIZE) <= 1 and abs(2 * top + h - SIZE) <= 1
    inside = np.zeros((SIZE, SIZE), dtype=bool)
    inside[top : top + h, left : left + w] = True
    assert (square[inside] == 255).all() and (square[~inside] == 0).all()


def test_fit_averages_what_it_shrinks():
    rng = np.random.Generator(np.random.PCG64(0))
    noise = rng.random((512, 512), dtype=np.float32)
    square = decode.fit(noise, SIZE).astype(float) / 255
    assert abs(square.mean() - 0.5) < 0.01 and square.std() < 0.05  # 256 pixels each, not one of them
    stripes = np.tile(np.array([0, 1], dtype=np.float32), (512, 256))
    assert np.ptp(decode.fit(stripes, SIZE)[2:-2, 2:-2].astype(int)) <= 2


def test_scanner_is_simulated_on_what_was_read(tmp_path):
    from sparsecontrast.data.scanner import apply_scanner

    files = make_files(tmp_path / "in", 1)
    task = Task(str(files[0]), scanner=3, seed=5)
    image = np.asarray(Image.open(files[0]), dtype=np.float32) / 255
    assert (
        decode.decode(task, SIZE).pixels == decode.fit(apply_scanner(image, scanner=3, seed=5), SIZE)
    ).all()
    plain = open_pixels(tasks_of(files), SIZE, tmp_path / "cache")
    shown = open_pixels([task], SIZE, tmp_path / "cache")
    assert (plain.images != shown.images).any()


def test_phantoms_are_rendered_at_the_cached_size(tmp_path):
    from sparsecontrast.data.phantom import render

    found = open_pixels([Task("phantom:1:2:3:0")], SIZE, tmp_path)
    assert (found.images[0] == np.rint(render(1, 2, 3, 0, SIZE).image * 255)).all()


def test_processes_give_what_one_process_gives_and_survive_a_decoder_that_dies(tmp_path):
    files = make_files(tmp_path / "in", 40)
    files[17] = files[17].rename(tmp_path / "in" / "crash.png")
    files[30] = files[30].rename(tmp_path / "in" / "broken.png")
    found = open_pixels(tasks_of(files), SIZE, tmp_path / "cache", reading, workers=2)
    assert found.failures == [(17, decode.CRASHED), (30, "broken on purpose")]
    rest = [f for i, f in enumerate(files) if i not in (17, 30)]
    assert (found.images == expected(rest)).all()
    assert {line.split()[1] for line in (tmp_path / "in" / "reads.log").read_text().splitlines()}.isdisjoint(
        {str(os.getpid())}
    )
