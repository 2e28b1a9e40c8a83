"""PNG and JPEG files, 8 to 16 bit, as one grey channel; ``images.read_image`` is the door to them."""

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG")
_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)


def read_photo(path: str | os.PathLike[str]) -> np.ndarray:
    """Decode one PNG or JPEG file.

    PNG: 8 bit divides by 255, 16 bit by 65535. JPEG: by the full range of its own precision. Colour
    becomes luminance, alpha is dropped, EXIF orientation is honoured.

    Returns:
        float32 [H, W] in [0, 1].

    Raises:
        OSError: and others, as the decoders please.
    """
    if deep := _deep_jpeg(path):
        from libjpeg.utils import decode  # Pillow stops at 8 bit

        data = Path(path).read_bytes()
        if not data.rstrip(b"\0").endswith(b"\xff\xd9"):  # libjpeg would fill what is missing, in silence
            raise OSError("image file is truncated: no end marker")
        return luminance(decode(data)) / np.float32(2 ** deep["precision"] - 1)
    with Image.open(path, formats=FORMATS) as image:
        if image.mode.startswith("I"):
            return np.asarray(ImageOps.exif_transpose(image)).astype(np.float32) / np.float32(65535)
        return np.asarray(_grey(ImageOps.exif_transpose(image))).astype(np.float32) / np.float32(255)


def photo_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return height and width as shown, from the file's header alone."""
    if deep := _deep_jpeg(path):
        return deep["rows"], deep["columns"]
    with Image.open(path, formats=FORMATS) as image:
        width, height = image.size
        return (width, height) if image.getexif().get(_ORIENTATION) in _SIDEWAYS else (height, width)


def luminance(pixels: np.ndarray) -> np.ndarray:
    """Weigh red, green, blue [H, W, 3] as ITU-R 601 does, in float32; [H, W] passes."""
    values = pixels.astype(np.float32)
    return values if values.ndim == 2 else values[..., :3] @ np.array([0.299, 0.587, 0.114], dtype=np.float32)


def _grey(image: Image.Image) -> Image.Image:
    """Make an 8-bit image one grey channel; alpha is dropped, not blended onto a made-up background."""
    if image.mode in ("1", "L"):
        return image.convert("L")
    if image.mode == "LA":
        return image.getchannel("L")
    return image.convert("RGB").convert("L")


def _deep_jpeg(path: str | os.PathLike[str]) -> dict[str, int] | None:
    """Return rows, columns and precision of a JPEG file of more than 8 bit, else None."""
    with open(path, "rb") as file:
        if file.read(2) != b"\xff\xd8":
            return None
        if _precision(file.read(1 << 16)) <= 8:
            return None
    from libjpeg.utils import get_parameters

    return get_parameters(Path(path).read_bytes())


def _precision(segments: bytes) -> int:
    """Find the bits a sample of a JPEG file in its frame header; 8 where there is none so early."""
    at = 0
    while at + 5 <= len(segments) and segments[at] == 0xFF:
        marker, length = segments[at + 1], int.from_bytes(segments[at + 2 : at + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # SOF0 to SOF15, no DHT, JPG, DAC
            return segments[at + 4]
        at += 2 + length
    return 8
