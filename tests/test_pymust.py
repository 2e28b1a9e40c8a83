"""PyMUST's echoes in our form: where a point lies, how they add, what tissue takes, a phantom's file."""

import sys

import numpy as np
import pytest

from sparsecontrast.errors import ConfigError
from sparsecontrast.ultrasound.acquisition import read_acquisition, write_channels
from sparsecontrast.ultrasound.beamform import delay_and_sum, grid
from sparsecontrast.ultrasound.pymust_echoes import pymust_echoes
from sparsecontrast.ultrasound.simulate import SMALL, inclusion_phantom

SAMPLES = 220
POINTS = np.array([[0.5e-3, 9e-3], [-1.2e-3, 7.5e-3]])


def brightest(channels):
    x, z = grid(SMALL)
    image = np.abs(delay_and_sum(channels, SMALL, x, z).mean(0))
    row, column = np.unravel_index(image.argmax(), image.shape)
    return x[column], z[row]


@pytest.mark.parametrize("point", POINTS)
def test_a_point_is_found_where_it_lies(point):
    channels = pymust_echoes(point, np.ones(1), SMALL, SAMPLES)
    assert channels.shape == (len(SMALL.tx), SMALL.nel, SAMPLES) and channels.dtype == np.complex64
    wavelength = SMALL.c / SMALL.fc
    assert np.abs(np.subtract(brightest(channels), point)).max() < 0.3 * wavelength


def test_echoes_add_and_carry_their_sign():
    amplitudes = np.array([1.0, -0.5])
    both = pymust_echoes(POINTS, amplitudes, SMALL, SAMPLES)
    apart = [pymust_echoes(p, a, SMALL, SAMPLES) for p, a in zip(POINTS, amplitudes, strict=True)]
    assert np.abs(both - sum(apart)).max() < 2e-3 * np.abs(both).max()


def test_tissue_weakens_what_lies_deep():
    near, deep = (np.array([[0.0, z]]) for z in (6e-3, 11e-3))
    loss = [
        np.abs(pymust_echoes(p, np.ones(1), SMALL, SAMPLES, attenuation=1.0)).max()
        / np.abs(pymust_echoes(p, np.ones(1), SMALL, SAMPLES)).max()
        for p in (near, deep)
    ]
    # 1 dB/cm/MHz at 5 MHz over there and back, and a centre frequency that sinks on the way
    assert loss[1] < loss[0] < 1
    assert 20 * np.log10(loss) == pytest.approx([-6.0, -11.0], abs=1.5)


def test_a_phantom_is_written_and_read(tmp_path):
    told = np.random.default_rng(0)
    channels, geometry = inclusion_phantom(SMALL, -30, told, count=40, simulator=pymust_echoes)
    write_channels(tmp_path / "phantom.npz", channels, geometry)
    found = read_acquisition(tmp_path / "phantom.npz")
    assert found.geometry == geometry and geometry.inclusion is not None
    assert found.channels is not None and np.array_equal(found.channels, channels)


def test_without_pymust_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymust", None)
    with pytest.raises(ConfigError, match=r"pip install 'sparsecontrast\[ultrasound\]'"):
        pymust_echoes(POINTS, np.ones(2), SMALL, SAMPLES)
