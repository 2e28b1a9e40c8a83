"""A picture as a DICOM Ultrasound Image (PS3.3, A.6), for a viewer or an archive beside the original."""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparsecontrast.durable import write_bytes
from sparsecontrast.errors import DataError, MissingDataError

# patient and study of the original, in which the picture is a series of its own
COPIED = (
    "SpecificCharacterSet", "PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex",
    "StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "StudyDescription", "AccessionNumber",
    "ReferringPhysicianName", "Manufacturer", "ManufacturerModelName", "ContentDate", "ContentTime",
)  # fmt: skip
NEEDED = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
          "AccessionNumber", "ReferringPhysicianName", "Manufacturer")  # fmt: skip
TISSUE_2D, CENTIMETRES = 1, 3  # codes of a region's format and data type, and of its units (PS3.3, C.8.5.5)
DERIVATION = "Sub-apertures of one acquisition combined and denoised by A2A; for research, not for diagnosis"


def write_us_dicom(
    path: Path, picture: NDArray[np.uint8], x: NDArray | None, z: NDArray | None, like: Path | None
) -> None:
    """Write a grey picture as a derived ultrasound image; the same input gives the same bytes.

    Args:
        path: of the file.
        picture: [H, W], depth downwards.
        x: lateral positions of the columns [W], metres; None where the scale is unknown.
        z: depths of the rows [H], metres; None likewise.
        like: a DICOM file of the same study, whose patient and study it is given; None for nobody's.

    Raises:
        MissingDataError: ``like`` is not there.
        DataError: ``like`` is not DICOM, or names no study.
        StorageError: the file cannot be written.
    """
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, UltrasoundImageStorage, generate_uid

    source = None if like is None else _read(like)
    entropy = [picture.tobytes().hex(), str(source.SOPInstanceUID) if source else ""]
    image = Dataset()
    for name in COPIED:
        if source is not None and name in source:
            image[name] = source[name]
    for name in NEEDED:
        if name not in image:
            setattr(image, name, "")
    if source is None:
        image.StudyInstanceUID = generate_uid(entropy_srcs=["study", *entropy])
    else:
        image.SourceImageSequence = [_reference(source)]
    image.SOPClassUID = UltrasoundImageStorage
    image.SOPInstanceUID = generate_uid(entropy_srcs=["image", *entropy])
    image.SeriesInstanceUID = generate_uid(entropy_srcs=["series", *entropy])
    image.Modality, image.SeriesNumber, image.InstanceNumber = "US", "", "1"
    image.SeriesDescription = "A2A, research"
    image.ImageType, image.DerivationDescription = ["DERIVED", "PRIMARY"], DERIVATION
    image.BurnedInAnnotation, image.LossyImageCompression = "NO", "00"
    image.PatientOrientation = ""
    if x is not None and z is not None:
        image.SequenceOfUltrasoundRegions = [_region(picture.shape, x, z)]
    _put_pixels(image, picture)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.file_meta = meta
    buffer = io.BytesIO()
    image.save_as(buffer, enforce_file_format=True)
    write_bytes(path, buffer.getvalue())


def _read(path: Path):
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    if not path.is_file():
        raise MissingDataError(f"{path}: no such file; give a DICOM file of the study")
    try:
        found = dcmread(path, stop_before_pixels=True)
    except (InvalidDicomError, OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as DICOM ({type(error).__name__})") from error
    if not found.get("StudyInstanceUID") or not found.get("SOPInstanceUID"):
        raise DataError(f"{path}: names no study (StudyInstanceUID) or no image (SOPInstanceUID)")
    return found


def _reference(source):
    from pydicom.dataset import Dataset

    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = source.SOPClassUID, source.SOPInstanceUID
    return item


def _region(shape: tuple[int, ...], x: NDArray, z: NDArray):
    """Say what a pixel measures; the reference pixel is the first."""
    from pydicom.dataset import Dataset

    region = Dataset()
    region.RegionSpatialFormat, region.RegionDataType, region.RegionFlags = TISSUE_2D, TISSUE_2D, 0
    region.RegionLocationMinX0, region.RegionLocationMinY0 = 0, 0
    region.RegionLocationMaxX1, region.RegionLocationMaxY1 = shape[1] - 1, shape[0] - 1
    region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = CENTIMETRES
    region.PhysicalDeltaX, region.PhysicalDeltaY = (
        100 * float(np.ptp(axis)) / max(len(axis) - 1, 1) for axis in (x, z)
    )
    region.ReferencePixelX0, region.ReferencePixelY0 = 0, 0
    region.ReferencePixelPhysicalValueX = 100 * float(x[0])
    region.ReferencePixelPhysicalValueY = 100 * float(z[0])
    return region


def _put_pixels(image, picture: NDArray[np.uint8]) -> None:
    image.Rows, image.Columns = picture.shape
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated = image.BitsStored = 8
    image.HighBit, image.PixelRepresentation = 7, 0
    data = picture.tobytes()
    image.PixelData = data + b"\0" * (len(data) % 2)
    image["PixelData"].VR = "OB"
