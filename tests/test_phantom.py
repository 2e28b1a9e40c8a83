"""Phantoms: reproducible, truthful about their lesions, and of the hospital that took them."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from sparsecontrast.data.anatomy import body, chest, draw_anatomy, points
from sparsecontrast.data.lesions import KINDS
from sparsecontrast.data.phantom import (
    PATIENTS_PER_HOSPITAL,
    contact_sheet,
    describe,
    parse_path,
    phantom_path,
    render,
)
from sparsecontrast.data.pose import draw_pose
from sparsecontrast.data.scanner import apply_scanner, draw_scanner, expose, smooth
from sparsecontrast.data.vessels import splat
from sparsecontrast.errors import DataError

SIZE = 128


def first_with(kind, count):
    """The first patients, hospital by hospital, who have a lesion of this kind."""
    everyone = ((site, site * PATIENTS_PER_HOSPITAL + number) for number in range(40) for site in range(10))
    return list(islice((who for who in everyone if describe(0, *who, 0).labels[kind]), count))


def pixels_in(boxes, size):
    """Mask of the pixels that boxes touch."""
    mask = np.zeros((size, size), bool)
    for box in boxes:
        rows = slice(int(box["y"]), int(np.ceil(box["y"] + box["h"])))
        mask[rows, int(box["x"]) : int(np.ceil(box["x"] + box["w"]))] = True
    return mask


# --- determinism ---------------------------------------------------------------------------------


def test_the_same_numbers_give_the_same_bits_in_any_order():
    asked = [(3, s, s * PATIENTS_PER_HOSPITAL + p, i) for s in (0, 4) for p in (0, 9) for i in (0, 1)]
    forward = {key: render(*key, SIZE) for key in asked}
    for key in reversed(asked):
        again = render(*key, SIZE)
        assert again.image.tobytes() == forward[key].image.tobytes()
        assert (again.boxes, again.labels, again.view) == (
            forward[key].boxes, forward[key].labels, forward[key].view
        )  # fmt: skip


def test_each_number_of_the_four_changes_the_film():
    base = render(0, 1, 5, 0, SIZE).image
    for other in ((1, 1, 5, 0), (0, 2, 5, 0), (0, 1, 6, 0), (0, 1, 5, 1)):
        assert np.abs(render(*other, SIZE).image - base).mean() > 0.003


def test_another_process_gives_the_same_bits():
    script = (
        "import hashlib; from sparsecontrast.data.phantom import render; "
        "print(hashlib.sha256(render(0, 4, 400_002, 1, 96).image.tobytes()).hexdigest())"
    )
    for size in (64, 96):  # whatever was made before, caches included
        here = render(0, 4, 400_002, 1, size)
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == hashlib.sha256(here.image.tobytes()).hexdigest()


@pytest.mark.parametrize("size", [64, 127, 224])
def test_films_are_float32_in_zero_to_one_at_any_size(size):
    film = render(0, 2, 200_001, 0, size).image
    assert film.shape == (size, size) and film.dtype == np.float32
    assert film.min() >= 0 and film.max() <= 1 and film.std() > 0.1


def test_the_film_is_the_same_picture_at_every_size():
    """A film at twice the size, averaged down, shows what the small one shows (noise aside)."""
    small, large = render(0, 5, 500_003, 0, 112).image, render(0, 5, 500_003, 0, 224).image
    halved = large.reshape(112, 2, 112, 2).mean((1, 3))
    assert np.corrcoef(small[10:-10, 10:-10].ravel(), halved[10:-10, 10:-10].ravel())[0, 1] > 0.97


def test_paths_name_films():
    assert parse_path(phantom_path(1, 2, 300_007, 4)) == {
        "seed": 1,
        "site": 2,
        "patient": 300_007,
        "image": 4,
    }
    for wrong in ("phantom:1:2:3", "phantom:1:2:3:x", "phantom:-1:2:3:4", "/a/b.png"):
        with pytest.raises(DataError, match="phantom:<seed>"):
            parse_path(wrong)


# --- lesions, boxes and labels -------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_trace_of_a_lesion_lies_in_its_boxes(kind):
    """Against a render without it: nine tenths of the difference, and its peak, lie inside."""
    cases = first_with(kind, 6)
    assert len(cases) == 6, f"{kind} hardly occurs"
    for site, patient in cases:
        whole = render(0, site, patient, 0, 224)
        bare = render(0, site, patient, 0, 224, without=(kind,))
        own = [box for box in whole.boxes if box["label"] == kind]
        trace = np.abs(whole.image - bare.image)
        inside = pixels_in(own, 224)
        assert trace[inside].sum() >= 0.9 * trace.sum()
        assert trace.max() == trace[inside].max() >= 0.03
        assert [b for b in whole.boxes if b["label"] != kind] == bare.boxes or kind == "cardiomegaly"
        assert bare.labels[kind] == 0


@pytest.mark.parametrize("kind", ["nodule", "mass", "consolidation", "effusion", "pneumothorax"])
def test_boxes_are_tight(kind):
    """No side is off by more than a tenth of the box, blur aside."""
    for site, patient in first_with(kind, 5):
        whole = render(0, site, patient, 0, 224)
        own = [box for box in whole.boxes if box["label"] == kind]
        if len(own) > 1:
            continue
        trace = np.abs(whole.image - render(0, site, patient, 0, 224, without=(kind,)).image)
        rows, columns = np.nonzero(trace > 0.12 * trace.max())
        box = own[0]
        slack = 0.1 * min(box["w"], box["h"]) + 1.5
        found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        stated = np.array([box["x"], box["y"], box["x"] + box["w"], box["y"] + box["h"]])
        assert np.abs(found - stated).max() <= slack


def test_a_lesion_is_brighter_and_free_air_darker():
    signs = {"nodule": 1, "mass": 1, "consolidation": 1, "effusion": 1, "cardiomegaly": 1, "pneumothorax": -1}
    for kind, sign in signs.items():
        site, patient = first_with(kind, 1)[0]
        trace = (
            render(0, site, patient, 0, SIZE).image - render(0, site, patient, 0, SIZE, without=(kind,)).image
        )
        assert sign * trace.sum() > 0, kind


def test_findings_are_known_without_pixels_and_boxes_match_labels():
    for patient in range(60):
        known, film = describe(0, 7, 700_000 + patient, 1, size=64), None
        assert {box["label"] for box in known.boxes} == {
            kind for kind, there in known.labels.items() if there
        }
        for box in known.boxes:
            assert box["w"] > 1 and box["h"] > 1
            assert box["x"] >= 0 and box["x"] + box["w"] <= 64.02
            assert box["y"] >= 0 and box["y"] + box["h"] <= 64.02
        if patient < 5:
            film = render(0, 7, 700_000 + patient, 1, 64)
            assert (film.boxes, film.labels, film.view) == (known.boxes, known.labels, known.view)


def test_nodules_are_a_few_percent_of_the_width_and_contrasts_span_subtle_to_obvious():
    cases = first_with("nodule", 25)
    widths, peaks = [], []
    for site, patient in cases:
        found = describe(0, site, patient, 0, size=1000)
        widths += [box["w"] / 1000 for box in found.boxes if box["label"] == "nodule"]
        trace = render(0, site, patient, 0, SIZE).image - render(0, site, patient, 0, SIZE, ("nodule",)).image
        peaks.append(trace.max())
    assert min(widths) > 0.02 and max(widths) < 0.09
    assert max(peaks) > 2.5 * min(peaks)


def test_a_patient_keeps_anatomy_and_lesions_over_films_and_hospitals():
    site, patient = first_with("mass", 1)[0]
    films = [describe(0, s, patient, i) for s in (site, (site + 1) % 10) for i in (0, 1)]
    assert len({tuple(sorted(f.labels.items())) for f in films}) == 1
    assert len({json.dumps(f.boxes) for f in films}) == 4, "positioning differs"
    same = render(0, site, patient, 0, SIZE).image, render(0, site, patient, 1, SIZE).image
    other = render(0, site, patient + 1, 0, SIZE).image
    core = slice(SIZE // 4, 3 * SIZE // 4)

    def likeness(a, b):
        return np.corrcoef(a[core, core].ravel(), b[core, core].ravel())[0, 1]

    assert likeness(*same) > likeness(same[0], other)


def test_anatomy_is_where_it_belongs():
    """Bone and heart are brighter than lung, air around the body is black, the heart points left."""
    images = [render(0, 1, 100_000 + p, 0, SIZE, without=KINDS).image for p in range(8)]
    middle = np.mean(images, axis=0)
    lungs = middle[45:65, 28:45].mean(), middle[45:65, 85:100].mean()
    heart, belly, corner = (
        middle[75:90, 66:74].mean(),
        middle[108:116, 40:90].mean(),
        middle[75:110, 1:3].mean(),
    )
    assert max(lungs) < heart and max(lungs) < belly and corner < min(lungs)
    right, left = middle[75:88, 44:54].mean(), middle[75:88, 74:84].mean()
    assert left > right, "the left side of the patient, right in the picture, holds most of the heart"


# --- scanners ------------------------------------------------------------------------------------


def test_two_hospitals_differ_measurably_and_one_is_like_itself():
    """Histograms of one hospital's films lie closer together than those of two hospitals."""

    def greys(site, patients):
        films = [render(0, site, p, 0, 96).image[20:-20, 20:-20] for p in patients]
        return np.histogram(np.stack(films), bins=24, range=(0, 1), density=True)[0] / 24

    patients = list(range(10)), list(range(10, 20))
    halves = [[greys(site, half) for half in patients] for site in range(4)]
    within = np.mean([np.abs(a - b).sum() for a, b in halves])
    between = np.mean(
        [np.abs(halves[i][0] - halves[j][1]).sum() for i in range(4) for j in range(4) if i != j]
    )
    assert between > 1.5 * within


def test_noise_and_blur_follow_the_scanner():
    flat = np.full((96, 96), 2.0, np.float32)
    edge = np.where(np.arange(96) < 48, 1.0, 3.0).astype(np.float32) * np.ones((96, 1), np.float32)
    plain = replace(draw_scanner(0, 0), sharpen=0.0, blur=0.0, electronic=0.0, photons=1e9)

    def shown(image, **changes):
        return expose(image, replace(plain, **changes), np.random.Generator(np.random.PCG64(0)))

    assert shown(flat, photons=1e4).std() == pytest.approx(
        np.sqrt(10) * shown(flat, photons=1e5).std(), rel=0.1
    )
    assert shown(flat, photons=1e4, electronic=60.0).std() > 1.2 * shown(flat, photons=1e4).std()
    sharp, soft = (np.abs(np.diff(shown(edge, blur=b), axis=1)).max() for b in (0.0, 0.02))
    assert soft < 0.5 * sharp
    assert shown(flat, gamma=1.5).mean() < shown(flat, gamma=0.8).mean()


def test_thick_and_dense_is_brighter():
    rising = np.tile(np.linspace(0, 4, 64, dtype=np.float32), (64, 1))
    quiet = replace(draw_scanner(0, 3), photons=1e9, electronic=0.0, sharpen=0.0)
    columns = expose(rising, quiet, np.random.Generator(np.random.PCG64(0))).mean(0)
    assert (np.diff(columns) >= -1e-3).all() and columns[-1] - columns[0] > 0.6


def test_smooth_keeps_the_mean_and_matches_scipy():
    from scipy.ndimage import gaussian_filter

    image = np.random.Generator(np.random.PCG64(0)).standard_normal((40, 50)).astype(np.float32)
    reference = gaussian_filter(image, 1.7, mode="nearest", radius=5)
    np.testing.assert_allclose(smooth(image, 1.7), reference, atol=2e-5)
    assert smooth(image, 0.1) is image


def test_apply_scanner_changes_the_look_not_the_content(shared_data):
    from PIL import Image

    file = sorted((shared_data / "cxr_multisite" / "images" / "nih_chexnet621").glob("*.jpg"))[0]
    real = np.asarray(Image.open(file).convert("L"), dtype=np.float32) / 255
    before = real.copy()
    shown = [apply_scanner(real, scanner, seed=7) for scanner in range(3)]
    assert (real == before).all()
    for image in shown:
        assert image.shape == real.shape and image.dtype == np.float32
        assert image.min() >= 0 and image.max() <= 1
        assert np.corrcoef(image.ravel(), real.ravel())[0, 1] > 0.9
    assert min(np.abs(shown[i] - shown[j]).mean() for i, j in ((0, 1), (0, 2), (1, 2))) > 0.01
    assert (apply_scanner(real, 1, seed=7) == shown[1]).all()
    assert (apply_scanner(real, 1, seed=8) != shown[1]).any()


def test_marker_side_and_view_of_a_hospital():
    """The marker's corner of the picture holds the brightest grey that the empty corner lacks."""
    for site in range(6):
        scanner = draw_scanner(0, site)
        films = [render(0, site, p, 0, SIZE).image for p in range(6)]
        top = np.stack(films)[:, 6 : SIZE // 5, 8:-8]
        left, right = top[:, :, : SIZE // 6].max((1, 2)), top[:, :, -SIZE // 6 :].max((1, 2))
        marked = right if scanner.marker == "L" else left
        # a pose may push the marker partly out of this window, never in most films
        assert np.median(marked) >= scanner.marker_shade - 0.01
    shares = [np.mean([describe(0, s, p, 0).view == "AP" for p in range(60)]) for s in range(10)]
    assert max(shares) - min(shares) > 0.3


def test_ap_films_show_a_larger_heart():
    pose = draw_pose(0, 0, 0, 0)
    anatomy = draw_anatomy(np.random.Generator(np.random.PCG64(0)))
    grid = np.linspace(0, 1, 80, dtype=np.float32)
    at = points(anatomy, *pose.to_body(*np.meshgrid(grid, grid)))
    air = [chest(anatomy, at, body(anatomy, at), magnify).air.sum() for magnify in (1.0, 1.12)]
    assert air[1] < air[0]


def test_pose_maps_there_and_back():
    pose = draw_pose(0, 3, 4, 5)
    u, v = np.array([-0.3, 0.0, 0.25], np.float32), np.array([0.1, 0.5, 0.9], np.float32)
    back = pose.to_body(*pose.to_image(u, v))
    np.testing.assert_allclose(back, (u, v), atol=1e-6)


def test_splat_keeps_the_weight_of_each_dot_and_its_place():
    x, y = np.array([10.3, 30.0], np.float32), np.array([12.8, 20.5], np.float32)
    image = splat(x, y, np.full(2, 1.0, np.float32), np.array([1.0, 3.0], np.float32), (40, 50))
    assert image.sum() == pytest.approx(4.0, rel=0.1)
    for column, row, part in ((10.3, 12.8, image[:, :20]), (30.0, 20.5, image)):
        peak = np.unravel_index(part.argmax(), part.shape)
        assert abs(peak[1] + 0.5 - column) <= 0.6 and abs(peak[0] + 0.5 - row) <= 0.6


# --- the index -----------------------------------------------------------------------------------


def test_contact_sheet_shows_the_films():
    sheet = contact_sheet(seed=0, sites=3, patients=2, size=64)
    assert sheet.shape == (128, 192, 3) and sheet.dtype == np.uint8
    film = render(0, 2, 2 * PATIENTS_PER_HOSPITAL + 1, 0, 64).image
    assert (sheet[64:, 128:, 0] == np.rint(film * 255)).all()
    marked = contact_sheet(seed=0, sites=3, patients=2, size=64, boxes=True)
    assert (marked[..., 0] != marked[..., 2]).any() and (sheet[..., 0] == sheet[..., 2]).all()
