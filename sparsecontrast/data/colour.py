"""PNG and JPEG files in colour, at the size of training: pictures of stained cells."""

import os

import numpy as np
from PIL import Image, ImageOps

from sparsecontrast.data.photos import FORMATS
from sparsecontrast.errors import ImageReadError


def read_colour(path: str | os.PathLike[str], size: int) -> np.ndarray:
    """Decode one picture, 8 bit, as uint8 [size, size, 3]: red, green, blue.

    A picture that is not square is stretched: crops around one cell are nearly so. Reduction is by area.
    Alpha is dropped, EXIF orientation is honoured.

    Raises:
        ImageReadError: missing, damaged, or not a picture in 8 bit; the message holds no path.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode.startswith(("I", "F")):
                raise ImageReadError("16 bit; stained cells are 8 bit in colour")
            upright = ImageOps.exif_transpose(image).convert("RGB")
        grows = min(upright.size) < size
        way = Image.Resampling.BICUBIC if grows else Image.Resampling.BOX
        return np.asarray(upright.resize((size, size), way))
    except ImageReadError:
        raise
    except FileNotFoundError:
        raise ImageReadError("no such file") from None
    except Exception as error:  # decoders raise anything
        raise ImageReadError(f"damaged file ({type(error).__name__})") from error
