"""A denoised picture as DICOM: read back, measured, and filed under the study that it came from."""

import numpy as np
import pydicom
import pytest

from sparsecontrast.cli import main
from sparsecontrast.data.images import read_image
from sparsecontrast.errors import DataError, MissingDataError
from sparsecontrast.ultrasound.acquisition import write_channels
from sparsecontrast.ultrasound.simulate import SMALL, add_noise, inclusion_phantom
from sparsecontrast.ultrasound.us_dicom import write_us_dicom
from tests.dicom_files import write_dicom

PICTURE = np.random.default_rng(0).integers(0, 256, (31, 17)).astype(np.uint8)
X, Z = np.linspace(-2e-3, 1.2e-3, 17), np.linspace(6e-3, 12e-3, 31)


def written(folder, like=None, picture=PICTURE):
    write_us_dicom(folder / "out.dcm", picture, X, Z, like)
    return pydicom.dcmread(folder / "out.dcm")


def test_pixels_and_scale_come_back(tmp_path):
    found = written(tmp_path)
    assert np.array_equal(found.pixel_array, PICTURE)
    assert read_image(tmp_path / "out.dcm").shape == PICTURE.shape
    (region,) = found.SequenceOfUltrasoundRegions
    last = region.ReferencePixelPhysicalValueX + 16 * region.PhysicalDeltaX
    assert (region.PhysicalUnitsXDirection, last) == (3, pytest.approx(0.12))  # centimetres
    assert region.ReferencePixelPhysicalValueY + 30 * region.PhysicalDeltaY == pytest.approx(1.2)
    assert (region.RegionLocationMaxX1, region.RegionLocationMaxY1) == (16, 30)
    assert found.ImageType[0] == "DERIVED" and "not for diagnosis" in found.DerivationDescription


def test_without_an_original_it_is_nobodys_and_without_a_scale_it_has_none(tmp_path):
    write_us_dicom(tmp_path / "out.dcm", PICTURE, None, None, None)
    found = pydicom.dcmread(tmp_path / "out.dcm")
    assert (found.PatientName, found.PatientID) == ("", "") and found.StudyInstanceUID
    assert "SequenceOfUltrasoundRegions" not in found and "SourceImageSequence" not in found


def test_it_is_a_new_series_of_the_originals_study(tmp_path):
    tags = {"PatientName": "Müller^Änne", "SpecificCharacterSet": "ISO_IR 192", "StudyDate": "20260102"}
    like = write_dicom(tmp_path / "like.dcm", np.zeros((4, 4), np.uint8), SeriesInstanceUID="1.2.4", **tags)
    source, found = pydicom.dcmread(like), written(tmp_path, like)
    for name in ("PatientName", "PatientID", "StudyInstanceUID", "StudyDate"):
        assert found[name].value == source[name].value
    assert found.SeriesInstanceUID != source.SeriesInstanceUID
    assert found.SOPInstanceUID not in (source.SOPInstanceUID, written(tmp_path).SOPInstanceUID)
    (reference,) = found.SourceImageSequence
    assert reference.ReferencedSOPInstanceUID == source.SOPInstanceUID
    assert "ViewPosition" not in found and "BodyPartExamined" not in found  # of the original image alone


def test_the_same_input_gives_the_same_bytes_and_another_picture_another_identity(tmp_path):
    one = written(tmp_path)
    first = (tmp_path / "out.dcm").read_bytes()
    written(tmp_path)
    assert (tmp_path / "out.dcm").read_bytes() == first
    assert written(tmp_path, picture=PICTURE[::-1]).SOPInstanceUID != one.SOPInstanceUID


def test_an_original_that_is_none_is_refused_without_a_word_of_it(tmp_path):
    with pytest.raises(MissingDataError, match="no such file"):
        written(tmp_path, tmp_path / "absent.dcm")
    (tmp_path / "text.dcm").write_text("DOE^JANE")
    with pytest.raises(DataError, match="cannot be read as DICOM") as told:
        written(tmp_path, tmp_path / "text.dcm")
    assert "DOE" not in str(told.value)
    like = write_dicom(tmp_path / "like.dcm", np.zeros((4, 4), np.uint8), StudyInstanceUID=None)
    with pytest.raises(DataError, match="names no study"):
        written(tmp_path, like)
    assert not (tmp_path / "out.dcm").exists()


def test_the_command_writes_it_beside_the_picture(tmp_path):
    drawn = np.random.default_rng(0)
    channels, geometry = inclusion_phantom(SMALL, -20, drawn, count=200)
    write_channels(tmp_path / "scan.npz", add_noise(channels, 10, drawn), geometry)
    like = write_dicom(tmp_path / "like.dcm", np.zeros((4, 4), np.uint8))
    told = ["denoise", str(tmp_path / "scan.npz"), "method.steps=2", "--out", str(tmp_path / "out")]
    assert main([*told, "--dicom", str(like)]) == 0
    found = pydicom.dcmread(tmp_path / "out" / "denoised.dcm")
    assert found.PatientID == "p1" and "SequenceOfUltrasoundRegions" in found
    shown = read_image(tmp_path / "out" / "denoised.png")
    assert found.pixel_array / 255 == pytest.approx(shown, abs=1e-6)
    assert main([*told[:-1], str(tmp_path / "plain")]) == 0
    assert not (tmp_path / "plain" / "denoised.dcm").exists()
