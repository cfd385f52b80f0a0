"""Pictures in files and shards, and as bytes: JPEG, PNG, WebP, their size checked before a pixel is decoded."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from dat_workers.errors import InvalidInput, TooLarge

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 1 << 27  # where the caller sets no limit; Pillow has its own a little above


def open_picture(data: bytes, *, field: str, max_pixels: int = MAX_PIXELS, upright: bool = False) -> Image.Image:
    """One encoded picture as RGB; `upright` obeys the EXIF orientation.

    Raises TooLarge from the header alone where it announces more than `max_pixels`, InvalidInput where the
    bytes are no whole picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures; the limit below is ours
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > max_pixels:
                raise TooLarge(field, f"{width}x{height} = {width * height} pixels", f"at most {max_pixels} pixels")
            if image.mode in ("I", "F") or image.mode.startswith("I;"):
                raise InvalidInput(field, f"mode {image.mode}", "8 bits a channel")
            if upright:
                image = ImageOps.exif_transpose(image)
            return image.convert("RGB")
    except InvalidInput:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, far above ours
        raise TooLarge(field, f"{len(data)} bytes ({error})", f"at most {max_pixels} pixels") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        reason = f"{len(data)} bytes ({type(error).__name__}: {error})"
        raise InvalidInput(field, reason, "a whole JPEG, PNG or WebP picture") from error


def decode_picture(
    data: bytes, *, field: str, max_pixels: int = MAX_PIXELS, upright: bool = False
) -> npt.NDArray[np.uint8]:
    """uint8 [3,H,W] of one encoded picture; as `open_picture`."""
    return pixels(open_picture(data, field=field, max_pixels=max_pixels, upright=upright))


def pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    """uint8 [3,H,W] of an RGB picture."""
    return np.stack([np.asarray(band) for band in image.split()])


def as_image(picture: npt.NDArray[Any]) -> Image.Image:
    """An RGB picture of uint8 [3,H,W]. Pillow joins channels 17 times as fast as numpy turns the axes."""
    return Image.merge("RGB", [Image.fromarray(channel) for channel in picture])


def decode_pictures(encoded: Iterable[bytes], *, max_image_pixels: int, max_pixels: int) -> npt.NDArray[np.uint8]:
    """uint8 [N,3,H,W] of N encoded pictures of one size. Raises InvalidInput where sizes differ."""
    pictures: list[npt.NDArray[np.uint8]] = []
    left = max_pixels
    for i, data in enumerate(encoded):
        picture = decode_picture(data, max_pixels=min(max_image_pixels, left), field=f"images[{i}]")
        if pictures and picture.shape != pictures[0].shape:
            first, other = pictures[0].shape, picture.shape
            raise InvalidInput(
                f"images[{i}]",
                f"{other[2]}x{other[1]} pixels",
                f"{first[2]}x{first[1]}, the size of images[0]",
            )
        left -= picture.shape[1] * picture.shape[2]
        pictures.append(picture)
    return np.stack(pictures)


def encode_png(picture: npt.NDArray[Any]) -> bytes:
    """PNG bytes of uint8 [3,H,W]."""
    out = io.BytesIO()
    as_image(picture).save(out, "PNG", compress_level=1)
    return out.getvalue()


def encode_jpeg(picture: npt.NDArray[Any], quality: int) -> bytes:
    """JPEG bytes of uint8 [3,H,W], in 4:4:4.

    Through a file without a disk: into a BytesIO Pillow encodes with the GIL held, and other threads would wait.
    """
    try:
        memory: Any = os.fdopen(os.memfd_create("jpeg"), "w+b")
    except (AttributeError, OSError):  # not every system has it, or lets it be used
        memory = io.BytesIO()
    with memory as out:
        as_image(picture).save(out, "JPEG", quality=quality, subsampling=0)
        out.seek(0)
        encoded: bytes = out.read()
    return encoded
