"""Files of one acquisition: what is refused says what, where and what to do, in one line of the command."""

import sys

import numpy as np
import pytest

from sparsecontrast.cli import main
from sparsecontrast.errors import DataError
from sparsecontrast.ultrasound.acquisition import read_acquisition
from tests.acquisitions import acquisition
from tests.test_beamform import meta

FEW = ["method.steps=2", "method.anatomy=[4,4]", "method.noise=[4,4]", "method.phases=1"]
IMAGES = acquisition(count=4)[0]
IQ = np.random.default_rng(0).standard_normal((4, 16, 64, 2)).astype(np.float32)
AXIS = 1e-4 * np.arange(64)
NAN, INF = float("nan"), float("inf")


def changed(index, value, images=IMAGES):
    images = images.copy()
    images[index] = value
    return images


def command(tmp_path, capsys, name, *words):
    code = main(["denoise", str(tmp_path / name), "--out", str(tmp_path / "out"), *FEW, *words])
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"images": IMAGES, "x": AXIS, "z": 0 * AXIS}, "z goes from 0 to 0; it must grow or fall"),
        ({"images": IMAGES, "x": AXIS, "z": 1000 * AXIS}, "in metres, within 1"),
        ({"images": IMAGES, "x": AXIS + NAN, "z": AXIS}, "x must be finite numbers"),
        ({"images": IMAGES, "x": np.array(["a"] * 64), "z": AXIS}, "x must be finite numbers"),
        ({"images": np.float32(1)}, "need [M, H, W]"),
        ({"images": changed(2, 0)}, "aperture 2 is empty beside the others"),
        ({"images": changed(1, 1e-6)}, "aperture 1 is empty beside the others"),
        ({"images": changed((1, 3, 3), NAN)}, "aperture 1 holds values that are not finite"),
        ({"images": np.abs(IMAGES)}, "envelopes or log-images, not RF"),
        ({"images": np.abs(IMAGES).astype(np.complex64)}, "imaginary part is 0 everywhere"),
        ({"images": 20 * np.log10(np.abs(IMAGES) / np.abs(IMAGES).max())}, "envelopes or log-images"),
        ({"images": IMAGES.astype(complex) * 1e60}, "scale them to within 1e-30 to 1e+30"),
        ({"images": 0 * IMAGES}, "add up to zero"),
        ({"iq": IQ, "meta": meta(fc=NAN)}, "fc=nan is not within 100000 to 1e+08 hertz"),
        ({"iq": IQ, "meta": meta(fc=1e308)}, "fc=1e+308 is not within"),
        ({"iq": IQ, "meta": meta(pitch=0.3)}, "pitch=0.3 is not within 1e-06 to 0.01 metres"),
        ({"iq": IQ, "meta": meta(nel=INF)}, "meta cannot be used"),
        ({"iq": IQ, "meta": meta(tx=[0.5, 5, 10, 15])}, "0.5 is not a whole number"),
        ({"iq": IQ, "meta": meta(x_extent=[NAN, 1])}, "must be numbers within 1 metre"),
        ({"iq": IQ, "meta": meta(x_extent=[-50, 50], z_extent=[0, 100])}, "must be numbers within 1 metre"),
        ({"iq": IQ, "meta": meta(x_extent=[-1, 1], z_extent=[0, 1])}, "is too large; make x_extent"),
        ({"iq": IQ, "meta": meta(r=NAN)}, "must be numbers within 1 metre"),
        ({"iq": IQ, "meta": meta(r=0.0)}, "radius 0 must be above 0"),
        ({"iq": IQ[:, :, :0], "meta": meta()}, "iq has 0 samples a record"),
        ({"iq": IQ, "scale": np.ones(2), "meta": meta()}, "scale must be one number"),
        ({"iq": IQ, "scale": np.float64(NAN), "meta": meta()}, "scale must be one number"),
        ({"iq": changed((2, 7, 5), NAN, IQ), "meta": meta()}, "not finite in transmission 2, element 7"),
        ({"iq": 1e60 * IQ.astype(float), "meta": meta()}, "scale it to within 1e-30 to 1e+30"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_in_one_line(tmp_path, capsys, arrays, told):
    np.savez(tmp_path / "bad.npz", **arrays)
    code, said = command(tmp_path, capsys, "bad.npz")
    assert code == 2 and said.count("\n") == 1 and said.startswith("error [data]")
    assert told in said
    assert not (tmp_path / "out").exists()


def test_a_floor_that_is_none_is_refused(tmp_path, capsys):
    np.savez(tmp_path / "good.npz", images=IMAGES)
    code, said = command(tmp_path, capsys, "good.npz", "method.floor_db=1e9")
    assert code == 2 and "method.floor_db=1000000000.0: must be in" in said


def test_an_axis_may_fall_and_axes_come_back_as_they_are(tmp_path):
    np.savez(tmp_path / "a.npz", images=IMAGES, x=AXIS[::-1], z=AXIS)
    read = read_acquisition(tmp_path / "a.npz")
    np.testing.assert_array_equal(read.x, AXIS[::-1])


def hdf5(path, **arrays):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for name, value in arrays.items():
            file[name.replace("__", "/")] = value
    return path


def test_hdf5_holds_the_same_as_npz(tmp_path):
    parts = {"images__real": IMAGES.real, "images__imag": IMAGES.imag}
    for number, arrays in enumerate(({"images": IMAGES}, parts)):
        read = read_acquisition(hdf5(tmp_path / f"{number}.h5", **arrays, x=AXIS, z=AXIS))
        np.testing.assert_array_equal(read.images, IMAGES)
        np.testing.assert_array_equal(read.z, AXIS)
    channels = IQ[..., 0] + 1j * IQ[..., 1]
    read = read_acquisition(hdf5(tmp_path / "iq.hdf5", iq=channels, meta=meta().item()))
    np.testing.assert_array_equal(read.channels, channels)
    assert read.geometry is not None and read.geometry.nel == 16


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"channel_data__data__real": IQ, "channel_data__data__imag": IQ}, "is of UFF layout"),
        ({"channel_data__data": IQ, "channel_data__sound_speed": 1540.0}, "is of UFF layout"),
        ({"images__left": IQ}, "is a group of ['left']"),
        ({"images__real": IQ, "images__imag": IQ[:2]}, "real and imag must be numbers of one shape"),
        ({"other": IQ}, "holds ['other']; need images"),
    ],
)
def test_other_layouts_of_hdf5_are_named(tmp_path, capsys, arrays, told):
    hdf5(tmp_path / "a.uff", **arrays)
    code, said = command(tmp_path, capsys, "a.uff")
    assert code == 2 and said.count("\n") == 1 and told in said


def test_a_torn_hdf5_is_told(tmp_path):
    whole = hdf5(tmp_path / "whole.h5", images=IMAGES).read_bytes()
    (tmp_path / "torn.h5").write_bytes(whole[:3000])
    with pytest.raises(DataError, match="cannot be read as HDF5"):
        read_acquisition(tmp_path / "torn.h5")


def test_hdf5_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.h5").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError, match="pip install h5py"):
        read_acquisition(tmp_path / "a.h5")
