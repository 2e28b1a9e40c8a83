"""Small DICOM files that tests write."""

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid


def write_dicom(path, pixels, compress=None, **tags):
    """Write ``pixels`` as one radiograph; ``tags`` override the header, None removes."""
    pixels = np.asarray(pixels)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = Dataset()
    dataset.file_meta = meta
    bits = pixels.dtype.itemsize * 8
    header = {
        "SOPClassUID": meta.MediaStorageSOPClassUID, "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "PatientID": "p1", "StudyInstanceUID": "1.2.3", "Modality": "CR", "BodyPartExamined": "CHEST",
        "ViewPosition": "PA", "Rows": pixels.shape[0], "Columns": pixels.shape[1], "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": bits, "BitsStored": bits,
        "HighBit": bits - 1, "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "PixelData": pixels.tobytes(), **tags,
    }  # fmt: skip
    if "BitsStored" in tags:
        header["HighBit"] = tags["BitsStored"] - 1
    for name, value in header.items():
        if value is not None:
            setattr(dataset, name, value)
    if "PixelData" in dataset:
        dataset["PixelData"].VR = "OB" if bits == 8 else "OW"
    if compress is not None:
        dataset.compress(compress)
    dataset.save_as(path, enforce_file_format=True)
    return path


def look_up_table(entries, first, bits, vr="US"):
    """One item of a modality or VOI LUT sequence."""
    item = Dataset()
    item.add_new("LUTDescriptor", "US" if first >= 0 else "SS", [len(entries), first, bits])
    data = list(entries) if vr == "US" else np.asarray(entries, dtype="u1" if vr == "OB" else "<u2").tobytes()
    item.add_new("LUTData", "US" if vr == "US" else "OW", data)
    return [item]
