"""Decodes and encodes pictures (JPEG, PNG, WebP); their size is checked before a pixel is decoded."""

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
MAX_PIXELS = 1 << 27  # the limit unless the caller sets a different one; Pillow's own limit is a little higher


def open_picture(data: bytes, *, field: str, max_pixels: int = MAX_PIXELS, upright: bool = False) -> Image.Image:
    """Decodes one picture to RGB; if `upright` is set, rotates it by its EXIF orientation.

    `field` names the picture in errors. Raises TooLarge, before decoding, if the header says that the picture has
    more than `max_pixels` pixels, and InvalidInput if the bytes are not a complete picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures; the limit below is stricter
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
    except Image.DecompressionBombError as error:  # Pillow's own limit, above MAX_PIXELS
        raise TooLarge(field, f"{len(data)} bytes ({error})", f"at most {max_pixels} pixels") from error
    except Exception as error:  # Pillow's decoders raise many types of exception for damaged files
        reason = f"{len(data)} bytes ({type(error).__name__}: {error})"
        raise InvalidInput(field, reason, "a whole JPEG, PNG or WebP picture") from error


def decode_picture(
    data: bytes, *, field: str, max_pixels: int = MAX_PIXELS, upright: bool = False
) -> npt.NDArray[np.uint8]:
    """Decodes one picture to uint8 [3,H,W]; raises as `open_picture` does."""
    return pixels(open_picture(data, field=field, max_pixels=max_pixels, upright=upright))


def pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Returns an RGB picture as uint8 [3,H,W]."""
    return np.stack([np.asarray(band) for band in image.split()])


def as_image(picture: npt.NDArray[Any]) -> Image.Image:
    """Returns uint8 [3,H,W] as an RGB picture. Pillow merges channels 17 times as fast as numpy transposes them."""
    return Image.merge("RGB", [Image.fromarray(channel) for channel in picture])


def decode_pictures(encoded: Iterable[bytes], *, max_image_pixels: int, max_pixels: int) -> npt.NDArray[np.uint8]:
    """Decodes N pictures of equal size to uint8 [N,3,H,W].

    Raises TooLarge for more than `max_image_pixels` in a picture or `max_pixels` in all together, and InvalidInput
    if the sizes differ.
    """
    pictures: list[npt.NDArray[np.uint8]] = []
    pixels_left = max_pixels
    for i, data in enumerate(encoded):
        picture = decode_picture(data, max_pixels=min(max_image_pixels, pixels_left), field=f"images[{i}]")
        _, height, width = picture.shape
        if pictures and picture.shape != pictures[0].shape:
            _, first_height, first_width = pictures[0].shape
            limit = f"{first_width}x{first_height}, the size of images[0]"
            raise InvalidInput(f"images[{i}]", f"{width}x{height} pixels", limit)
        pixels_left -= height * width
        pictures.append(picture)
    return np.stack(pictures)


def encode_png(picture: npt.NDArray[Any]) -> bytes:
    """Encodes uint8 [3,H,W] as PNG."""
    out = io.BytesIO()
    as_image(picture).save(out, "PNG", compress_level=1)
    return out.getvalue()


def encode_jpeg(picture: npt.NDArray[Any], quality: int) -> bytes:
    """Encodes uint8 [3,H,W] as JPEG with full colour resolution (4:4:4).

    Pillow writes to a file in memory, because it would hold the GIL while it encodes to a BytesIO, and other
    threads would wait.
    """
    try:
        memory: Any = os.fdopen(os.memfd_create("jpeg"), "w+b")
    except (AttributeError, OSError):  # this system has no memfd_create, or forbids it
        memory = io.BytesIO()
    with memory as out:
        as_image(picture).save(out, "JPEG", quality=quality, subsampling=0)
        out.seek(0)
        encoded: bytes = out.read()
    return encoded
