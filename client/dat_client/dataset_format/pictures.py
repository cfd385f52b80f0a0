"""Decodes a picture to RGB by the one rule of all readers, so that x is the same wherever it is read.

- 16 bits a channel become 8 by leaving out the low byte, as libpng's `png_set_strip_16` does. (Only colour PPM is
  rounded instead: Pillow does so.) Pictures of 32-bit integers and of floats have no usual range and are refused.
- Pixels come as they are stored, as torchvision's and timm's loaders return them; `upright` turns them by the EXIF
  orientation. Pillow itself always turns TIFF. `orientation` is the tag that a viewer of the pixels must obey.
- Text and colour profiles of a PNG do not count. Pillow refuses more than 1 MB of each, so such chunks are dropped.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Sequence

from PIL import Image, ImageOps

from dat_client.errors import shown

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")  # Pillow's names for PICTURE_SUFFIXES
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
ORIENTATION = 0x0112  # the EXIF tag
ORIENTATION_PLACES = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}  # in Pillow's Image.info
TURNED = range(2, 9)  # its values that ask for a turn or a mirror image


class TooManyPixels(ValueError):
    """A picture has more pixels than the caller takes; `size` is its width and height."""

    def __init__(self, size: tuple[int, int], max_pixels: int) -> None:
        self.size = size
        super().__init__(f"{size[0]}x{size[1]} = {size[0] * size[1]} pixels, at most {max_pixels} are taken")


class UnusualPixels(ValueError):
    """A picture has channels of 32 bits or of floats; `mode` is Pillow's name of the type."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        super().__init__(f"its pixels are {shown(mode)}, 32-bit numbers; save it with 8 or 16 bits a channel")


def decode(
    data: bytes, *, formats: Sequence[str] = FORMATS, max_pixels: int | None = None, upright: bool = False
) -> Image.Image:
    """Decodes one picture to RGB; the module's docstring has the rule.

    >>> decode(open("cat.jpg", "rb").read()).mode                                 # doctest: +SKIP
    'RGB'

    `formats` are those that are tried, by Pillow's names. Raises TooManyPixels before a pixel is decoded,
    UnusualPixels, and almost any other exception for damaged files, as Pillow does.
    """
    try:
        return _decode(data, formats, max_pixels, upright)
    except (TooManyPixels, UnusualPixels):
        raise
    except ValueError:
        shorter = without_texts(data)
        if len(shorter) == len(data):
            raise
        return _decode(shorter, formats, max_pixels, upright)


def _decode(data: bytes, formats: Sequence[str], max_pixels: int | None, upright: bool) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of many pixels and of odd tags; whatever matters is checked here
        image: Image.Image = Image.open(io.BytesIO(data), formats=tuple(formats))
        width, height = image.size
        if max_pixels is not None and width * height > max_pixels:
            raise TooManyPixels(image.size, max_pixels)
        sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
        if image.mode in ("I", "F") and not sixteen_bits:
            raise UnusualPixels(image.mode)
        rgb = _high_bytes(image) if sixteen_bits else image.convert("RGB")
        return turned_upright(rgb) if upright else rgb


def _high_bytes(image: Image.Image) -> Image.Image:
    """Returns a 16-bit grey picture as RGB: the high byte of each value."""
    import numpy as np

    values = np.asarray(image).astype(np.int32)  # Pillow's modes I;16, I;16B and I have three different types
    rgb = Image.fromarray((values >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    rgb.info = image.info
    return rgb


def orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation that a viewer must apply to a picture of `decode`: 1 (none) to 8."""
    if not ORIENTATION_PLACES & image.info.keys():  # the usual case, and getexif() is slow
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF data is no reason to refuse a picture, and viewers ignore it too
        return 1
    return value if value in TURNED else 1


def turned_upright(image: Image.Image) -> Image.Image:
    """Returns a picture of `decode`, turned by its EXIF orientation and without the tag."""
    return ImageOps.exif_transpose(image) if orientation(image) > 1 else image


def orientation_exif(value: int) -> bytes | None:
    """Returns EXIF data with this orientation alone, for Pillow's `save(exif=...)`; None if it asks for no turn.

    A picture that is stored beside the one that it was made from gets its orientation, so that viewers turn both.
    """
    if value not in TURNED:
        return None
    exif = Image.Exif()
    exif[ORIENTATION] = value
    return exif.tobytes()


def without_texts(data: bytes) -> bytes:
    """Returns a PNG without its texts and its colour profile; other data are returned as they are.

    Nothing is decompressed: the chunks are copied (PNG specification, section 5).
    """
    if not data.startswith(PNG_SIGNATURE):
        return data
    copied = [PNG_SIGNATURE]
    at = len(PNG_SIGNATURE)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind not in PNG_TEXTS:
            copied.append(data[at : at + length + 12])
        at += length + 12
    return b"".join([*copied, data[at:]])
