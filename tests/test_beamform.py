"""Delay and sum against a loop over pixels, and against the physics that it inverts."""

import dataclasses
import json

import numpy as np
import pytest

from sparsecontrast.errors import DataError, MissingDataError
from sparsecontrast.ultrasound.acquisition import Acquisition, Geometry, read_acquisition
from sparsecontrast.ultrasound.beamform import delay_and_sum, grid, sub_apertures
from sparsecontrast.ultrasound.metrics import point_fwhm
from sparsecontrast.ultrasound.simulate import SMALL, add_noise, echoes, inclusion_phantom

POINT = np.array([[0.4e-3, 9e-3]])


def brute_force(channels, geometry: Geometry, x, z):
    """One pixel, one transmission, one element at a time; band-limited interpolation by its sum."""
    count, _, samples = channels.shape
    spectrum = np.fft.fft(channels, axis=-1)
    frequency = np.fft.fftfreq(samples)
    image = np.zeros((count, len(z), len(x)), complex)
    for shot, tx in enumerate(geometry.tx):
        for i, depth in enumerate(z):
            for j, side in enumerate(x):
                for rx in range(geometry.nel):
                    there = np.hypot(side - geometry.elements[tx], depth)
                    back = np.hypot(side - geometry.elements[rx], depth)
                    time = (there + back) / geometry.c
                    wave = np.exp(2j * np.pi * frequency * time * geometry.fs)
                    echo = (spectrum[shot, rx] * wave).mean()
                    turn = 2 * np.pi * geometry.fc * (time - 2 * depth / geometry.c)
                    image[shot, i, j] += echo * np.exp(1j * turn) / geometry.nel
    return image


def test_equals_a_loop_over_pixels_and_elements():
    channels = echoes(POINT, np.ones(1), SMALL, 220)
    x, z = np.linspace(-0.5e-3, 1e-3, 7), np.linspace(8.6e-3, 9.4e-3, 9)
    expected = brute_force(channels, SMALL, x, z)
    found = delay_and_sum(channels, SMALL, x, z)
    # what is left is the linear interpolation of a four times upsampled record
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_a_point_stands_where_it_is_as_high_in_every_aperture_and_in_phase():
    x, z = np.arange(-2e-3, 2e-3, 0.05e-3), np.arange(7e-3, 11e-3, 0.05e-3)
    images = delay_and_sum(echoes(POINT, np.ones(1), SMALL, 220), SMALL, x, z)
    i, j = np.unravel_index(np.abs(images.mean(0)).argmax(), images[0].shape)
    assert abs(x[j] - POINT[0, 0]) <= 0.05e-3
    assert abs(z[i] - POINT[0, 1]) <= 0.05e-3
    assert np.abs(images[:, i, j]) == pytest.approx(1, abs=0.06)
    assert np.abs(np.angle(images[:, i, j] * images[0, i, j].conj())).max() < 0.1


def test_more_apertures_resolve_better_laterally():
    x, z = np.arange(-2e-3, 2e-3, 0.03e-3), np.arange(8.5e-3, 9.5e-3, 0.03e-3)
    images = delay_and_sum(echoes(POINT, np.ones(1), SMALL, 220), SMALL, x, z)
    one = point_fwhm(np.abs(images[0]), x, z, POINT)[0]
    assert point_fwhm(np.abs(images.mean(0)), x, z, POINT)[0] < 0.85 * one


def test_halves_of_the_receivers_average_to_the_whole():
    x, z = grid(SMALL)
    channels, _ = inclusion_phantom(SMALL, -20, np.random.default_rng(0), 50)
    whole = delay_and_sum(channels, SMALL, x, z)
    halves = delay_and_sum(channels, SMALL, x, z, halves=True)
    assert halves.shape[0] == 2 * whole.shape[0]
    np.testing.assert_allclose((halves[0::2] + halves[1::2]) / 2, whole, atol=1e-5 * np.abs(whole).max())


def test_noise_power_hardly_depends_on_the_place():
    x, z = grid(SMALL)
    noise = add_noise(np.zeros((4, 16, 230), np.complex64) + 1e-9, -180, np.random.default_rng(1))
    power = (np.abs(delay_and_sum(noise, SMALL, x, z)) ** 2).mean((0, 2))
    top, bottom = np.array_split(power, 2)
    assert top.mean() == pytest.approx(bottom.mean(), rel=0.15)


def test_what_comes_after_the_record_is_zero():
    channels = np.ones((4, 16, 20), np.complex64)
    assert not delay_and_sum(channels, SMALL, np.zeros(1), np.full(1, 30e-3)).any()


def test_channels_that_do_not_fit_the_geometry_are_refused():
    with pytest.raises(DataError, match="4 transmissions and 16 elements"):
        delay_and_sum(np.zeros((4, 8, 20)), SMALL, np.zeros(1), np.ones(1))
    with pytest.raises(DataError, match="names elements outside"):
        dataclasses.replace(SMALL, tx=(0, 16))
    with pytest.raises(DataError, match="neither images nor channel data"):
        sub_apertures(Acquisition())


def meta(**changes) -> np.ndarray:
    fields = dataclasses.asdict(SMALL) | {"cx": 0.0, "cz": 9e-3, "r": 1e-3} | changes
    return np.array(json.dumps({k: v for k, v in fields.items() if v is not None}))


def test_channel_data_and_images_are_read_as_they_were_written(tmp_path):
    channels = echoes(POINT, np.ones(1), SMALL, 160)
    scale = np.abs(channels).max() / 32000
    whole = np.stack([channels.real, channels.imag], -1) / scale
    np.savez(tmp_path / "iq.npz", iq=whole.round().astype(np.int16), scale=np.float32(scale), meta=meta())
    found = read_acquisition(tmp_path / "iq.npz")
    assert found.channels is not None and found.geometry is not None
    np.testing.assert_allclose(found.channels, channels, atol=scale)
    assert found.geometry.inclusion == (0.0, 9e-3, 1e-3)
    images = np.zeros((2, 20, 30), np.complex64)
    np.savez(tmp_path / "images.npz", images=images, x=1e-4 * np.arange(30), z=1e-4 * np.arange(20))
    read = read_acquisition(tmp_path / "images.npz")
    assert read.images is not None and read.x is not None
    assert read.images.shape == (2, 20, 30)


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"a": np.zeros(2)}, r"holds \['a'\]; need images"),
        ({"iq": np.zeros((4, 16, 9)), "meta": meta()}, r"need complex \[M, nel, T\]"),
        ({"iq": np.zeros((4, 9, 9), complex), "meta": meta()}, "4 transmissions and 16 elements"),
        ({"iq": np.zeros((4, 16, 9), complex), "meta": np.array("{")}, "meta is not JSON"),
        ({"iq": np.zeros((4, 16, 9), complex), "meta": meta(pitch=None)}, "meta lacks pitch"),
        ({"iq": np.zeros((4, 16, 9), complex), "meta": meta(tx="none")}, "meta cannot be used"),
        ({"images": np.zeros((2, 20, 30)), "x": np.zeros(3)}, "x has shape"),
    ],
)
def test_files_that_hold_something_else_say_what(tmp_path, arrays, told):
    np.savez(tmp_path / "f.npz", **arrays)
    with pytest.raises(DataError, match=told):
        read_acquisition(tmp_path / "f.npz")


def test_torn_absent_and_nameless_files_are_told(tmp_path):
    with pytest.raises(MissingDataError, match="no such file"):
        read_acquisition(tmp_path / "none.npz")
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(DataError, match="cannot be read"):
        read_acquisition(tmp_path / "torn.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(DataError, match="without a name"):
        read_acquisition(tmp_path / "one.npz")
