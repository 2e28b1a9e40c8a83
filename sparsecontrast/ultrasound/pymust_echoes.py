"""Channel data of point scatterers by PyMUST: directivity of the elements, spreading, attenuation.

PyMUST (Cigier et al., "SIMUS: an open-source simulator for medical ultrasound imaging", 2022) is an optional
package: ``pip install 'sparsecontrast[ultrasound]'``. What comes back has the form of ``simulate.echoes``, so
it can be beamformed, mixed with noise and stored (``acquisition.write_channels``) in the same ways.
"""

import importlib
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecontrast.errors import ConfigError
from sparsecontrast.ultrasound.acquisition import Geometry

KERF = 0.1  # of the pitch lies between two elements
BANDWIDTH = 75.0  # of the probe, per cent of fc at half of the amplitude
RF_RATE = 4.0  # times fc at least: of the RF that is demodulated


def pymust_echoes(
    points: NDArray, amplitudes: NDArray, geometry: Geometry, samples: int, attenuation: float = 0.0
) -> NDArray[np.complex64]:
    """Give the IQ channel data of point scatterers, one element transmitting at a time.

    Args:
        points: [N, 2] positions x, z in metres.
        amplitudes: [N] reflection coefficients, real.
        geometry: of the array.
        samples: of a record.
        attenuation: dB/cm/MHz; soft tissue about 0.5.

    Returns:
        complex64 [M, nel, samples], demodulated at ``fc``, linear in the amplitudes; 0 after PyMUST's record.

    Raises:
        ConfigError: PyMUST is not installed.
    """
    try:
        pymust: Any = importlib.import_module("pymust")
    except ImportError as error:
        raise ConfigError("PyMUST is not installed: pip install 'sparsecontrast[ultrasound]'") from error
    points, amplitudes = np.atleast_2d(points), np.atleast_1d(amplitudes)
    step = math.ceil(RF_RATE * geometry.fc / geometry.fs)
    data = np.zeros((len(geometry.tx), geometry.nel, samples), np.complex64)
    for shot, element in enumerate(geometry.tx):
        param = pymust.utils.Param()
        param.fc, param.fs, param.c = geometry.fc, geometry.fs * step, geometry.c
        param.pitch, param.width = geometry.pitch, (1 - KERF) * geometry.pitch
        param.Nelements, param.attenuation = geometry.nel, attenuation
        param.radius, param.bandwidth, param.baffle = math.inf, BANDWIDTH, "soft"
        delays = np.full((1, geometry.nel), np.nan)  # not a number: the element is silent
        delays[0, element] = 0.0
        rf = pymust.simus(points[:, 0], points[:, 1], amplitudes, delays, param)[0]
        # its inverse transform divides by the number of frequencies, which grows with the deepest point
        rf = rf * (2 * len(rf) * param.fc / param.fs)
        iq = pymust.rf2iq(rf, param)[::step][:samples]
        data[shot, :, : len(iq)] = iq.T
    return data
