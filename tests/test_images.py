import csv
import hashlib
import io
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.pixels import apply_windowing
from pydicom.uid import JPEG2000Lossless, RLELossless

from sparsecontrast.data.images import decode_dicom, read_header, read_image, window
from sparsecontrast.errors import ImageReadError
from tests.dicom_files import look_up_table, write_dicom

FOLDER = Path(__file__).parents[1] / ".." / "shared" / "data" / "dicom"
MANIFEST = list(csv.DictReader((FOLDER / "manifest.csv").read_text().splitlines()))
DECODED = [row for row in MANIFEST if row["decode"] == "ok"]
BROKEN = {
    "RG2_JPLY.dcm": "cannot be decoded .JPEG Extended",
    "RG3_JPLY.dcm": "cannot be decoded .JPEG Extended",
    "MR_truncated.dcm": "less than expected .8130 vs 8192",
    "badVR.dcm": "NumberOfFrames is not a number",
    "no_meta.dcm": "no DICM marker",
    "meta_missing_tsyntax.dcm": "no transfer syntax",
    "JPEG2000-embedded-sequence-delimiter.dcm": "cannot be decoded .JPEG 2000",
    "chrJapMulti_CR_chest_nopixels.dcm": "no pixel data",
    "derived_truncated_60pct.dcm": "no pixel data.*cut short",
    "derived_zero_length.dcm": "empty file",
    "derived_html_error_page.dcm": "no DICM marker",
    "derived_header_only.dcm": "no pixel data",
}
RAMP = np.arange(0, 4096, 8, dtype=np.uint16).reshape(16, 32)


@pytest.mark.parametrize("row", DECODED, ids=lambda row: row["file"])
def test_every_real_file_decodes_to_the_pixels_of_the_manifest(row):
    dataset, stored = decode_dicom(FOLDER / row["file"])
    assert "x".join(map(str, stored.shape)) == row["shape"]
    assert str(stored.dtype) == row["dtype"]
    assert (int(stored.min()), int(stored.max())) == (int(float(row["min"])), int(float(row["max"])))
    assert hashlib.sha256(stored.tobytes()).hexdigest().startswith(row["sha256_pixels"])

    image = read_image(FOLDER / row["file"])
    assert image.dtype == np.float32 and image.shape == stored.shape[:2]
    assert image.min() >= 0 and image.max() <= 1
    grey = stored if stored.ndim == 2 else stored @ [0.299, 0.587, 0.114]
    along = np.corrcoef(image[::3, ::3].ravel(), grey[::3, ::3].ravel())[0, 1]
    assert along < -0.9 if dataset.PhotometricInterpretation == "MONOCHROME1" else along > 0.9

    header = read_header(FOLDER / row["file"])
    assert (header.height, header.width) == image.shape


@pytest.mark.parametrize("row", [r for r in MANIFEST if r["decode"] != "ok"], ids=lambda row: row["file"])
def test_every_broken_file_gives_its_reason(row):
    with pytest.raises(ImageReadError, match=BROKEN[row["file"]]) as caught:
        read_image(FOLDER / row["file"])
    assert str(FOLDER) not in str(caught.value) and "1A" not in str(caught.value)


def standard_window(x, c, w, function):
    """PS3.3 C.11.2.1.2.1, C.11.2.1.3.1, C.11.2.1.3.2 for one value, ymin = 0 and ymax = 1."""
    if function == "SIGMOID":
        return 1 / (1 + math.exp(min(-4 * (x - c) / w, 700)))
    if function == "LINEAR_EXACT":
        return 0.0 if x <= c - w / 2 else 1.0 if x > c + w / 2 else (x - c) / w + 0.5
    if x <= c - 0.5 - (w - 1) / 2:  # with a width of 1 this and the next line are all: a step
        return 0.0
    return 1.0 if x > c - 0.5 + (w - 1) / 2 else (x - (c - 0.5)) / (w - 1) + 0.5


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("center", "width"), [(2048, 4096), (1000, 300), (0, 1), (4000.5, 7.25)])
def test_windows_follow_the_standard(function, center, width):
    values = np.linspace(-50, 4200, 977)
    expected = [standard_window(x, center, width, function) for x in values]
    np.testing.assert_allclose(window(values, center, width, function), expected, atol=1e-9)


@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_windowed_file_agrees_with_pydicom(tmp_path, function, photometric):
    path = write_dicom(
        tmp_path / "a", RAMP, BitsStored=12, WindowCenter=[900, 3000], WindowWidth=[700, 50],
        VOILUTFunction=function, PhotometricInterpretation=photometric,
    )  # fmt: skip
    dataset = pydicom.dcmread(path)
    expected = apply_windowing(dataset.pixel_array, dataset, index=0) / 4095
    if photometric == "MONOCHROME1":
        expected = 1 - expected
    np.testing.assert_allclose(read_image(path), expected, atol=1e-6)


def test_slope_and_intercept_come_before_the_window(tmp_path):
    pixels = np.arange(-256, 256, dtype=np.int16).reshape(16, 32)
    path = write_dicom(
        tmp_path / "a", pixels, RescaleSlope=2.5, RescaleIntercept=-100, WindowCenter=0, WindowWidth=500,
        VOILUTFunction="LINEAR_EXACT",
    )  # fmt: skip
    expected = np.clip((pixels * 2.5 - 100) / 500 + 0.5, 0, 1)
    np.testing.assert_allclose(read_image(path), expected, atol=1e-6)


def test_modality_look_up_table_comes_before_the_window(tmp_path):
    pixels = np.array([[-3, -2], [-1, 5]], dtype=np.int16)  # the table starts at -2 and ends at -1
    table = look_up_table([1000, 3000], -2, 16)
    path = write_dicom(
        tmp_path / "a", pixels, ModalityLUTSequence=table, WindowCenter=2000, WindowWidth=4000,
        VOILUTFunction="LINEAR_EXACT",
    )  # fmt: skip
    np.testing.assert_allclose(read_image(path), [[0.25, 0.25], [0.75, 0.75]], atol=1e-6)


@pytest.mark.parametrize("vr", ["US", "OW", "OB"])
def test_voi_look_up_table_goes_before_the_window(tmp_path, vr):
    pixels = np.array([[9, 10, 11], [12, 13, 200]], dtype=np.uint16)
    entries = [0, 20, 50, 200]
    table = look_up_table(entries, 10, 8, vr)
    path = write_dicom(tmp_path / "a", pixels, VOILUTSequence=table, WindowCenter=1, WindowWidth=2)
    np.testing.assert_allclose(read_image(path) * 255, [[0, 0, 20], [50, 200, 200]], atol=1e-4)


def test_short_look_up_table_is_refused(tmp_path):
    table = look_up_table([0, 20, 50, 200], 10, 8)
    table[0].LUTDescriptor = [9, 10, 8]
    with pytest.raises(ImageReadError, match="holds 4 of its 9 entries"):
        read_image(write_dicom(tmp_path / "a", RAMP, VOILUTSequence=table))


@pytest.mark.parametrize("signed", [False, True])
def test_bits_that_are_not_stored_are_ignored(tmp_path, signed):
    clean = np.arange(-1024, 1024, 4, dtype=np.int16).reshape(16, 32) if signed else RAMP
    rng = np.random.Generator(np.random.PCG64(0))
    garbage = rng.integers(0, 16, clean.shape).astype(np.uint16) << 12
    dirty = ((clean.view(np.uint16) & 0x0FFF) | garbage).view(clean.dtype)
    tags = {"BitsStored": 12, "WindowCenter": 100, "WindowWidth": 900}
    stored = decode_dicom(write_dicom(tmp_path / "dirty", dirty, **tags))[1]
    np.testing.assert_array_equal(stored, clean)
    expected = read_image(write_dicom(tmp_path / "clean", clean, **tags))
    np.testing.assert_array_equal(read_image(tmp_path / "dirty"), expected)


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_lossless_compression_changes_nothing(tmp_path, syntax):
    tags = {"BitsStored": 12, "WindowCenter": 2000, "WindowWidth": 1500}
    pixels = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    plain = read_image(write_dicom(tmp_path / "plain", pixels, **tags))
    np.testing.assert_array_equal(read_image(write_dicom(tmp_path / "small", pixels, syntax, **tags)), plain)


def test_without_a_window_the_whole_range_is_kept(tmp_path):
    pixels = np.full((50, 50), 100, dtype=np.uint16)
    pixels[0, :3] = (40, 4000, 70)  # a lone bright pixel is no outlier to be clipped
    image = read_image(write_dicom(tmp_path / "a", pixels))
    np.testing.assert_allclose(image[0, :3], [0, 1, 30 / 3960], atol=1e-6)
    for nonsense in ({"WindowCenter": 50, "WindowWidth": 0}, {"WindowCenter": 50}):
        np.testing.assert_array_equal(read_image(write_dicom(tmp_path / "b", pixels, **nonsense)), image)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("limit", [None, 65535])
def test_padding_is_background_and_sets_no_range(tmp_path, photometric, limit):
    pixels = np.linspace(100, 200, 512).astype(np.uint16).reshape(16, 32)
    bare = read_image(write_dicom(tmp_path / "a", pixels, PhotometricInterpretation=photometric))
    padded = pixels.copy()
    padded[:, 20:] = 65000
    path = write_dicom(
        tmp_path / "b", padded, PhotometricInterpretation=photometric, PixelPaddingValue=65000,
        PixelPaddingRangeLimit=limit,
    )  # fmt: skip
    image = read_image(path)
    assert (image[:, 20:] == 0).all()
    seen = pixels[:, :20].astype(float)
    expected = (seen - seen.min()) / np.ptp(seen)
    np.testing.assert_allclose(
        image[:, :20], expected if photometric == "MONOCHROME2" else 1 - expected, atol=1e-6
    )
    assert bare[0, 0] == (photometric == "MONOCHROME1")


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"PixelData": RAMP.tobytes() * 2, "NumberOfFrames": 2}, "several frames"),
        ({"PixelData": bytes(1024)}, "constant"),
        ({"PixelPaddingValue": 0, "PixelPaddingRangeLimit": 65535}, "constant"),
        ({"PixelData": RAMP.tobytes()[:-20]}, "less than expected"),
        ({"PixelData": None}, "no pixel data"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "neither MONOCHROME1"),
        ({"WindowCenter": 1, "WindowWidth": 9, "VOILUTFunction": "CUBIC"}, "none of LINEAR"),
    ],
)
def test_what_is_no_radiograph_is_refused(tmp_path, tags, reason):
    with pytest.raises(ImageReadError, match=reason):
        read_image(write_dicom(tmp_path / "a", RAMP, **tags))


def test_jpeg_inside_dicom_and_bare_give_the_same_pixels(tmp_path):
    dataset, stored = decode_dicom(FOLDER / "rsna_cxr_mono2_jpeg.dcm")
    from pydicom.encaps import get_frame

    bare = tmp_path / "bare.jpg"
    bare.write_bytes(get_frame(dataset.PixelData, 0, number_of_frames=1))
    np.testing.assert_allclose(read_image(bare) * 255, stored, atol=1e-4)


def saved(tmp_path, image, name, **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_png_of_8_and_16_bit(tmp_path):
    small = np.arange(256, dtype=np.uint8).reshape(16, 16)
    deep = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    np.testing.assert_allclose(
        read_image(saved(tmp_path, Image.fromarray(small), "a.png")) * 255, small, atol=1e-4
    )
    np.testing.assert_allclose(
        read_image(saved(tmp_path, Image.fromarray(deep), "b.png")) * 65535, deep, atol=0.01
    )


def test_colour_becomes_luminance_and_alpha_is_dropped(tmp_path):
    rng = np.random.Generator(np.random.PCG64(1))
    colour = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    expected = np.asarray(colour, dtype=float) @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(read_image(saved(tmp_path, colour, "c.png")) * 255, expected, atol=1)
    see_through = colour.copy()
    see_through.putalpha(Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)))
    np.testing.assert_allclose(read_image(saved(tmp_path, see_through, "d.png")) * 255, expected, atol=1)
    grey = colour.convert("L")
    for mode in ("LA", "P"):
        path = saved(tmp_path, grey.convert(mode), f"{mode}.png")
        np.testing.assert_allclose(read_image(path) * 255, np.asarray(grey), atol=1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_a_photo_is_honoured_and_told_by_the_header(tmp_path, orientation):
    upright = np.zeros((24, 16), dtype=np.uint8)
    upright[:8, :8] = 255  # bright at the top left
    undo = {1: 0, 2: "h", 3: 2, 4: "v", 5: "t", 6: 1, 7: "a", 8: 3}[orientation]
    turned = {
        "h": upright[:, ::-1], "v": upright[::-1], "t": upright.T, "a": upright[::-1, ::-1].T,
    }.get(undo, np.rot90(upright, undo if isinstance(undo, int) else 0))  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.fromarray(np.ascontiguousarray(turned)), "a.jpg", exif=exif, quality=95)
    image, header = read_image(path), read_header(path)
    assert image.shape == (24, 16) == (header.height, header.width)
    np.testing.assert_allclose(image, upright / 255, atol=0.03)


def lossless_jpeg(pixels, precision):
    """Encode [H, W] as lossless JPEG (ITU-T T.81 annex H): predictor 1, codes of 5 bits."""
    differences = pixels.astype(int).copy()
    differences[1:, 0] = pixels[1:, 0].astype(int) - pixels[:-1, 0]
    differences[0, 0] -= 1 << (precision - 1)
    differences[:, 1:] = np.diff(pixels.astype(int), axis=1)
    bits = ""
    for d in (differences.ravel() + 32768) % 65536 - 32768:
        size = int(abs(d)).bit_length()
        value = d if d > 0 else d + (1 << size) - 1
        bits += f"{size:05b}" + (f"{value:0{size}b}" if 0 < size < 16 else "")
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")
    height, width = (n.to_bytes(2, "big") for n in pixels.shape)
    frame = bytes([precision]) + height + width + bytes([1, 1, 0x11, 0])
    codes = bytes([0, 0, 0, 0, 0, 17, *[0] * 11, *range(17)])
    segments = ((0xC3, frame), (0xC4, codes), (0xDA, bytes([1, 1, 0, 1, 0, 0])))
    body = b"".join(bytes([0xFF, m]) + (len(s) + 2).to_bytes(2, "big") + s for m, s in segments)
    return b"\xff\xd8" + body + scan + b"\xff\xd9"


@pytest.mark.parametrize("precision", [12, 16])
def test_jpeg_of_more_than_8_bit(tmp_path, precision):
    rng = np.random.Generator(np.random.PCG64(2))
    pixels = rng.integers(0, 2**precision, (12, 20), dtype=np.uint16)
    path = tmp_path / "deep.jpg"
    path.write_bytes(lossless_jpeg(pixels, precision))
    np.testing.assert_allclose(read_image(path) * (2**precision - 1), pixels, atol=0.01)
    assert (read_header(path).height, read_header(path).width) == (12, 20)
    path.write_bytes(lossless_jpeg(pixels, precision)[:-200])
    with pytest.raises(ImageReadError, match="truncated"):
        read_image(path)


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_photo_cut_short_is_refused(tmp_path, format):
    rng = np.random.Generator(np.random.PCG64(3))
    whole = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (64, 64), dtype=np.uint8)).save(whole, format)
    path = tmp_path / "torn"
    path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    with pytest.raises(ImageReadError, match="truncated") as caught:
        read_image(path)
    assert str(tmp_path) not in str(caught.value)


def test_missing_and_forbidden_files_are_told_apart_from_broken_ones(tmp_path):
    with pytest.raises(ImageReadError, match="no such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ImageReadError, match="directory"):
        read_image(tmp_path)


def test_reading_in_threads_leaves_the_warning_filters_as_they_were():
    names = ["derived_header_only.dcm", "badVR.dcm", "dicomdirtests_77654033_CR1_6154", "vlut_04.dcm"]

    def attempt(name):
        try:
            return read_image(os.path.join(FOLDER, name)).shape
        except ImageReadError:
            return None

    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        shapes = list(pool.map(attempt, names * 12))
    assert warnings.filters == before
    assert shapes == [None, None, (16, 16), (512, 512)] * 12


def test_a_decoder_that_panics_is_a_file_that_cannot_be_read(tmp_path):
    """pylibjpeg's RLE decoder is written in Rust: its panic is no Exception."""
    data, columns = (FOLDER / "RG3_RLE.dcm").read_bytes(), b"\x28\x00\x11\x00US\x02\x00"
    at = data.index(columns) + len(columns)
    (tmp_path / "a").write_bytes(data[:at] + b"\x03\x00" + data[at + 2 :])
    with pytest.raises(ImageReadError, match="cannot be decoded .RLE Lossless.: index out of bounds"):
        read_image(tmp_path / "a")


def test_bytes_that_do_not_fit_the_header_are_no_image(tmp_path):
    """Three columns of twelve: pydicom would take the rest for more frames, and those for rows."""
    with pytest.raises(ImageReadError, match=r"the header says 12 x 3"):
        read_image(write_dicom(tmp_path / "a", np.arange(144, dtype=np.uint8).reshape(12, 12), Columns=3))
