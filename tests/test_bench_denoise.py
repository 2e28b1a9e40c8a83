"""The denoising benchmark: its cells, its comparison at equal resolution, and its rivals."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest

from benchmarks import denoise as bench
from benchmarks.denoisers import coherence_factor, compound, has, noise2noise, smoother
from sparsecontrast.errors import MissingDataError
from sparsecontrast.methods.a2a import A2AConfig
from sparsecontrast.ultrasound.simulate import SMALL, inclusion_phantom
from tests.acquisitions import acquisition, disc, field
from tests.test_beamform import meta

FEW = A2AConfig(steps=40, lr=0.01, anatomy=(6, 8), noise=(4, 4), crop=48, phases=1)


@pytest.fixture
def folder(tmp_path):
    lines = ["path,site,label"]
    for site in "AB":
        for number, label in enumerate(("none", "cyst", "hyper", "cyst")):
            lines.append(f"{site}{number}.npz,sim{site},{label}")
    (tmp_path / "index.csv").write_text("\n".join(lines))
    channels, geometry = inclusion_phantom(SMALL, -30, np.random.default_rng(0), 200)
    assert geometry.inclusion is not None
    place = dict(zip(("cx", "cz", "r"), geometry.inclusion, strict=True))
    np.savez(tmp_path / "A1.npz", iq=channels, meta=meta(inclusion=None, **place))
    return tmp_path


def test_cells_are_the_noises_then_the_counts_then_noise_alone(folder):
    cells = list(bench.cells(folder, None))
    assert [c for c in cells if "0.npz" in c.file] == []  # nothing to contrast in them
    assert len(cells) == len(set(cells)) == 4 * 2 * 3 + 3 * 2 * 2 + 2 * 2
    assert {c.noise_db for c in cells if c.apertures == 8 and not c.noise_alone} == set(bench.NOISES)
    assert sum(c.noise_alone for c in cells) == 4
    with pytest.raises(MissingDataError, match="no index.csv"):
        list(bench.cells(folder / "none", None))


def test_a_scene_has_the_noise_that_was_asked_for_and_repeats(folder):
    scenes = [bench.scene(folder, bench.Cell("A1.npz", noise, 4)) for noise in (0.0, 20.0)]
    power = [float((np.abs(s.images - s.clean) ** 2).mean()) for s in scenes]
    assert power[0] / power[1] == pytest.approx(100, rel=0.1)
    np.testing.assert_array_equal(scenes[0].clean, scenes[1].clean)
    again = bench.scene(folder, bench.Cell("A1.npz", 0.0, 4))
    np.testing.assert_array_equal(again.images, scenes[0].images)
    alone = bench.scene(folder, bench.Cell("A1.npz", 0.0, 4, noise_alone=True))
    assert not alone.clean.any() and alone.images.any()


@pytest.mark.parametrize("count", [2, 4, 8])
def test_apertures_are_as_many_as_asked_for_and_eight_are_halves_of_four(folder, count):
    found = bench.scene(folder, bench.Cell("A1.npz", 20.0, count))
    assert len(found.images) == count
    whole = bench.scene(folder, bench.Cell("A1.npz", 20.0, 4)).clean.mean(0)
    if count == 8:
        np.testing.assert_allclose(found.clean.mean(0), whole, atol=1e-5 * np.abs(whole).max())


def row(method, phantom, gcnr, lateral=1.0, axial=1.0):
    return {"method": method, "phantom": phantom, "gcnr": gcnr, "fwhm_lateral_mm": lateral,
            "fwhm_axial_mm": axial}  # fmt: skip


def test_at_equal_resolution_the_best_that_is_as_sharp_counts():
    rows = [
        row("a2a", "p", 0.8), row("a2a anatomy", "p", 0.9, 2), row("compound", "p", 0.5),
        row("nlm 0.25", "p", 0.6), row("nlm 0.5", "p", 0.7, 1.04), row("nlm 1", "p", 0.95, 1.0, 1.2),
        row("bm3d 1", "p", 0.99, 3.0),
    ]  # fmt: skip
    told = {r["against"]: (r["phantoms"], r["difference"]) for r in bench.at_equal_resolution(rows)}
    assert told["nlm"] == (1, pytest.approx(0.1))
    assert told["compound"] == (1, pytest.approx(0.3))
    assert told["bm3d"] == (0, None)
    blurred = {k: v for k, v in row("nlm 2", "p", 1.0).items() if k != "fwhm_axial_mm"}
    again = {r["against"]: r["difference"] for r in bench.at_equal_resolution([*rows, blurred])}
    assert again["nlm"] == pytest.approx(0.1)  # no width is no sharp point


def test_the_interval_holds_the_mean_and_shrinks_with_the_number():
    values = list(np.random.default_rng(0).normal(1, 1, 200))
    mean, low, high = bench.interval(values)
    assert mean is not None and low is not None and high is not None
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * np.std(values) / np.sqrt(200), rel=0.15)
    assert bench.interval([]) == (None, None, None)


def test_the_coherence_factor_equals_sums_pixel_by_pixel():
    images, _ = acquisition(count=3, shape=(16, 16))
    for i, j in ((0, 0), (7, 3), (15, 15)):
        values = [images[m, i, j] for m in range(3)]
        factor = abs(sum(values)) ** 2 / (3 * sum(abs(v) ** 2 for v in values))
        assert coherence_factor(images)[i, j] == pytest.approx(abs(sum(values)) / 3 * factor, rel=1e-5)


def test_noise2noise_learns_and_repeats():
    images, clean = acquisition(count=4, sigma=1.5)
    found = noise2noise(images, FEW)
    np.testing.assert_array_equal(found, noise2noise(images, FEW))
    level = np.log(np.abs(clean.mean(0)) + 1e-3)
    outside = ~disc(radius=17)
    assert np.log(found)[outside].std() < 0.7 * np.log(compound(images))[outside].std()
    assert np.corrcoef(np.log(found).ravel(), level.ravel())[0, 1] > 0.3


def test_noise2noise_learns_from_the_other_half_and_not_to_copy_its_own():
    rng = np.random.default_rng(3)
    noise = np.stack([field(rng, (64, 64), 0.6) for _ in range(4)]).astype(np.complex64)
    found = noise2noise(noise, dataclasses.replace(FEW, steps=80, crop=64))
    # the halves share nothing, so nothing can be foretold: the image is flat
    assert np.log(found).std() < 0.15 * np.log(compound(noise)).std()


@pytest.mark.parametrize("name", ["nlm", "bm3d"])
def test_smoothers_smooth_and_keep_the_scale(name):
    if not has(name):
        pytest.skip(f"the package of {name} is not installed")
    images, _ = acquisition(count=2)
    plain, smooth = compound(images), smoother(name, 1.0)(images)
    outside = ~disc(radius=17)
    assert np.log(smooth)[outside].std() < np.log(plain)[outside].std()
    assert smooth[outside].mean() == pytest.approx(plain[outside].mean(), rel=0.25)


def measured(monkeypatch, folder, *words):
    """Run with a stand-in for the measurement, and give the cells that it was asked for."""
    asked = []

    def measure(scene, cell, config, quick):
        asked.append(cell)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return [{**cell.key(), "method": "compound", "gcnr": 0.5}]

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "scene", lambda data, cell: None)
    with contextlib.suppress(KeyboardInterrupt):
        bench.main(["--data", str(folder), "--json", str(folder / "out.json"), *words])
    return asked


def test_a_killed_run_goes_on_where_it_was(folder, monkeypatch):
    first = measured(monkeypatch, folder, "--quick")
    assert json.loads((folder / "out.json.partial").read_text())["command"].endswith("--quick")
    again = measured(monkeypatch, folder, "--quick")
    assert again == first[1:]  # the first cell is not measured twice
    assert len(json.loads((folder / "out.json").read_text())["rows"]) == 2
    assert not (folder / "out.json.partial").exists()


@pytest.mark.parametrize(("before", "after"), [(["--quick"], []), ([], ["--phantoms", "1"])])
def test_rows_of_another_command_are_not_taken_over(folder, monkeypatch, before, after):
    measured(monkeypatch, folder, *before)
    kept = (folder / "out.json.partial").read_bytes()
    with pytest.raises(ValueError, match="kept by 'python -m benchmarks.denoise"):
        measured(monkeypatch, folder, *after)
    assert (folder / "out.json.partial").read_bytes() == kept
