"""Image quality metrics against brute force and against cases with a known answer."""

import numpy as np
import pytest

from sparsecontrast.errors import DataError, EvaluationError
from sparsecontrast.ultrasound import metrics
from sparsecontrast.ultrasound.looks import as_apertures, noise_map, noise_power, to_baseband

RNG = np.random.default_rng


def field(rng, shape, smooth=1.5):
    from scipy.ndimage import gaussian_filter

    raw = rng.standard_normal((2, *shape))
    out = gaussian_filter(raw[0], smooth) + 1j * gaussian_filter(raw[1], smooth)
    return out / out.std()


def test_gcnr_equals_a_count_pixel_by_pixel():
    rng = RNG(0)
    a, b = rng.rayleigh(1, 400), rng.rayleigh(3, 700)
    low, high = np.log(min(a.min(), b.min())), np.log(max(a.max(), b.max()))
    overlap = 0.0
    for k in range(100):
        left, right = low + (high - low) * k / 100, low + (high - low) * (k + 1) / 100
        shares = []
        for values in (a, b):
            last = k == 99
            inside = [v for v in np.log(values) if left <= v < right or (last and v >= left)]
            shares.append(len(inside) / len(values))
        overlap += min(shares)
    assert metrics.gcnr(a, b) == pytest.approx(1 - overlap, abs=2e-3)


def test_gcnr_of_rayleigh_speckle_is_what_the_densities_say():
    """Powers are exponential: with ratio k the densities cross once, at power k ln k / (k - 1)."""
    rng, ratio = RNG(1), 8.0
    crossing = ratio * np.log(ratio) / (ratio - 1)
    expected = np.exp(-crossing / ratio) - np.exp(-crossing)
    a, b = np.sqrt(rng.exponential(1, 60_000)), np.sqrt(rng.exponential(ratio, 60_000))
    assert metrics.gcnr(a, b) == pytest.approx(expected, abs=0.01)


def test_gcnr_has_its_ends_and_does_not_care_for_scale():
    a = RNG(2).rayleigh(1, 500)
    assert metrics.gcnr(a, a) == 0
    assert metrics.gcnr(a, 1e3 + a) == 1
    assert metrics.gcnr(np.zeros(30), np.zeros(30)) == 0
    assert metrics.gcnr(5 * a, 5 * a[:250] + 1) == pytest.approx(metrics.gcnr(a, a[:250] + 0.2), abs=1e-12)


def test_cnr_snr_and_bias_equal_sums():
    a, b = RNG(3).rayleigh(1, 300), RNG(4).rayleigh(2, 200)
    mean = [sum(v) / len(v) for v in (a, b)]
    var = [sum((x - m) ** 2 for x in v) / len(v) for v, m in zip((a, b), mean, strict=True)]
    assert metrics.cnr(a, b) == pytest.approx(abs(mean[0] - mean[1]) / (var[0] + var[1]) ** 0.5)
    assert metrics.speckle_snr(a) == pytest.approx(mean[0] / var[0] ** 0.5)
    assert metrics.bias_db(2 * a, a) == pytest.approx(20 * np.log10(2))
    error = sum((x - y) ** 2 for x, y in zip(a[:200], b, strict=True))
    assert metrics.snr_db(a[:200], b) == pytest.approx(10 * np.log10(sum(y * y for y in b) / error))


def test_fully_developed_speckle_has_an_snr_of_1_91():
    assert metrics.speckle_snr(RNG(5).rayleigh(1, 200_000)) == pytest.approx(1.91, abs=0.02)


def test_fwhm_of_a_gaussian_and_of_a_plateau():
    x = np.arange(-30, 31) * 0.1
    assert metrics.fwhm(np.exp(-(x**2) / 2), 0.1) == pytest.approx(2 * np.sqrt(2 * np.log(2)), abs=0.01)
    assert np.isnan(metrics.fwhm(np.ones(9)))
    assert metrics.fwhm(np.array([0, 0, 1.0, 0, 0])) == pytest.approx(1.0)


def test_point_fwhm_finds_the_points():
    x, z = np.arange(60) * 1.0, np.arange(80) * 1.0
    points = np.array([[20.0, 30.0], [42.0, 55.0]])
    image = sum(np.exp(-((x[None] - px) ** 2) / 8 - ((z[:, None] - pz - 1) ** 2) / 2) for px, pz in points)
    lateral, axial = metrics.point_fwhm(np.asarray(image), x, z, points)
    assert lateral == pytest.approx(2 * 2.355, rel=0.02)
    assert axial == pytest.approx(2.355, rel=0.05)


def test_regions_leave_the_edge_out_and_refuse_an_inclusion_that_is_not_there():
    x, z = np.linspace(-5, 5, 101), np.linspace(0, 10, 101)
    inside, outside = metrics.regions(x, z, (0, 5, 2))
    distance = np.hypot(x[None], z[:, None] - 5)
    assert distance[inside].max() < 2 < distance[outside].min()
    with pytest.raises(EvaluationError, match="fewer than 20 pixels"):
        metrics.regions(x, z, (90, 5, 2))


def test_the_noise_floor_is_what_apertures_do_not_share():
    """Echoes of aperture m mix two fields, so that their covariance falls linearly; noise is added."""
    rng, count, sigma2 = RNG(6), 8, 0.7
    fields = [field(rng, (96, 96)) for _ in range(2 * count)]
    echoes = np.stack([sum(fields[m : m + count]) for m in range(count)]) / np.sqrt(count)
    noise = np.stack([field(rng, (96, 96), 0.5) for _ in range(count)]) * np.sqrt(sigma2)
    assert noise_power((echoes + noise).astype(np.complex64)) == pytest.approx(sigma2, rel=0.1)
    assert noise_power(noise.astype(np.complex64)) == pytest.approx(sigma2, rel=0.05)
    assert noise_power(echoes.astype(np.complex64)) < 0.1


def test_side_lobes_of_loud_places_do_not_count_as_noise():
    """Loud above, where half of the power is one aperture's own; quiet below, where there is noise alone."""
    rng, count, sigma2 = RNG(9), 6, 0.01
    shared = field(rng, (96, 96))
    own = np.stack([shared + field(rng, (96, 96)) for _ in range(count)])
    own[:, 48:] = 0
    noise = np.stack([field(rng, (96, 96), 0.5) for _ in range(count)]) * np.sqrt(sigma2)
    assert noise_power((own + noise).astype(np.complex64)) == pytest.approx(sigma2, rel=0.3)


def test_the_noise_map_leaves_out_what_the_apertures_share():
    rng, count, sigma2 = RNG(10), 6, 0.05
    shared = field(rng, (96, 96))
    noise = np.stack([field(rng, (96, 96), 0.5) for _ in range(count)]) * np.sqrt(sigma2)
    found = noise_map((shared + noise).astype(np.complex64))
    assert np.sqrt((found**2).mean()) == pytest.approx(np.sqrt(sigma2 / count), rel=0.25)


def test_the_noise_map_shows_where_the_noise_is():
    rng = RNG(7)
    noise = np.stack([field(rng, (96, 96), 0.5) for _ in range(6)])
    noise[:, 48:] *= 3
    found = noise_map(noise.astype(np.complex64))
    assert found[60:].mean() / found[:36].mean() == pytest.approx(3, rel=0.2)


def test_baseband_makes_quadratures_independent_at_every_lag_and_keeps_magnitudes():
    rng = RNG(8)
    flat = np.stack([field(rng, (128, 96), (1.5, 2.5))] * 2)
    z, x = np.mgrid[:128, :96]
    carried = (flat * np.exp(1j * (2.2 * z + 0.004 * (x - 48) ** 2))).astype(np.complex64)
    base = to_baseband(carried)
    np.testing.assert_allclose(np.abs(base), np.abs(carried), rtol=1e-4)

    def leak(images, axis):
        a = np.moveaxis(images[0], axis, 0)
        product = a[1:] * a[:-1].conj()
        return abs(product.mean().imag) / (np.abs(a) ** 2).mean()

    assert leak(carried, 0) > 0.4
    assert leak(base, 0) < 0.03
    assert leak(base, 1) < 0.03


def test_what_is_no_acquisition_is_refused_and_rf_becomes_analytic():
    for bad, told in (
        (np.zeros((1, 20, 20)), "at least 2 apertures"),
        (np.zeros((3, 20, 4)), "16 pixels a side"),
        (np.zeros((2, 20, 20)), "add up to zero"),
        (np.full((2, 20, 20), "a"), "need complex or real"),
    ):
        with pytest.raises(DataError, match=told):
            as_apertures(bad)
    torn = np.ones((3, 20, 20))
    torn[1, 3, 3] = np.nan
    with pytest.raises(DataError, match="aperture 1 holds values"):
        as_apertures(torn)
    depth = np.arange(64)
    rf = np.cos(2 * np.pi * depth / 8)[None, :, None] * np.ones((2, 1, 20))
    np.testing.assert_allclose(np.abs(as_apertures(rf)), 1, atol=1e-5)
