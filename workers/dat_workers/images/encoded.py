"""Decodes and encodes pictures; their size is checked before a pixel is decoded."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from dat_client.dataset_format import pictures
from dat_workers.errors import InvalidInput, TooLarge

SERVICE_FORMATS = ("JPEG", "PNG", "WEBP")  # from strangers: fewer decoders are fewer ways to attack
DATA_FORMATS = pictures.FORMATS  # from the user's own folders and shards
FORMAT_NAMES = {"WEBP": "WebP"}
MAX_PIXELS = 1 << 27  # the limit unless the caller sets a different one; Pillow's own limit is a little higher


def open_picture(
    data: bytes,
    *,
    field: str,
    max_pixels: int = MAX_PIXELS,
    upright: bool = False,
    formats: Sequence[str] = SERVICE_FORMATS,
) -> Image.Image:
    """Decodes one picture to RGB by the rule of `dat_client.dataset_format.pictures`.

    `field` names the picture in errors; with `upright`, it is turned by its EXIF orientation; `formats` are those
    that are taken. Raises TooLarge, before decoding, if the header says that the picture has more than `max_pixels`
    pixels, and InvalidInput if the bytes are not a complete picture or its pixels are not of 8 or 16 bits.
    """
    try:
        return pictures.decode(data, formats=formats, max_pixels=max_pixels, upright=upright)
    except pictures.TooManyPixels as error:
        width, height = error.size
        limit = f"at most {max_pixels} pixels"
        raise TooLarge(field, f"{width}x{height} = {width * height} pixels", limit) from error
    except pictures.UnusualPixels as error:
        raise InvalidInput(field, f"mode {error.mode}", "8 or 16 bits a channel, not 32 bits or floats") from error
    except Image.DecompressionBombError as error:  # Pillow's own limit, above MAX_PIXELS
        raise TooLarge(field, f"{len(data)} bytes ({error})", f"at most {max_pixels} pixels") from error
    except Exception as error:  # Pillow's decoders raise many types of exception for damaged files
        fault = f"{type(error).__name__}: {error}"
        if isinstance(error, UnidentifiedImageError):  # it has an address in memory, so every run would differ
            fault = "its first bytes are those of none of these formats"
        reason = f"{len(data)} bytes ({fault})"
        *others, last = (FORMAT_NAMES.get(name, name) for name in formats)
        raise InvalidInput(field, reason, f"a whole {', '.join(others)} or {last} picture") from error


def decode_picture(
    data: bytes,
    *,
    field: str,
    max_pixels: int = MAX_PIXELS,
    upright: bool = False,
    formats: Sequence[str] = SERVICE_FORMATS,
) -> npt.NDArray[np.uint8]:
    """Decodes one picture to uint8 [3,H,W]; raises as `open_picture` does."""
    return pixels(open_picture(data, field=field, max_pixels=max_pixels, upright=upright, formats=formats))


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
    decoded: list[npt.NDArray[np.uint8]] = []
    pixels_left = max_pixels
    for i, data in enumerate(encoded):
        picture = decode_picture(data, max_pixels=min(max_image_pixels, pixels_left), field=f"images[{i}]")
        _, height, width = picture.shape
        if decoded and picture.shape != decoded[0].shape:
            _, first_height, first_width = decoded[0].shape
            limit = f"{first_width}x{first_height}, the size of images[0]"
            raise InvalidInput(f"images[{i}]", f"{width}x{height} pixels", limit)
        pixels_left -= height * width
        decoded.append(picture)
    return np.stack(decoded)


def encode_png(picture: npt.NDArray[Any], orientation: int = 1) -> bytes:
    """Encodes uint8 [3,H,W] as PNG; viewers turn the picture by the EXIF `orientation`."""
    out = io.BytesIO()
    as_image(picture).save(out, "PNG", compress_level=1, exif=pictures.orientation_exif(orientation))
    return out.getvalue()


def encode_webp(picture: npt.NDArray[Any], quality: int, orientation: int = 1) -> bytes:
    """Encodes uint8 [3,H,W] as WebP; viewers turn the picture by the EXIF `orientation`."""
    out = io.BytesIO()
    as_image(picture).save(out, "WEBP", quality=quality, exif=pictures.orientation_exif(orientation) or b"")
    return out.getvalue()


def encode_jpeg(picture: npt.NDArray[Any], quality: int, orientation: int = 1) -> bytes:
    """Encodes uint8 [3,H,W] as JPEG with full colour resolution (4:4:4).

    Viewers turn the picture by the EXIF `orientation`. Pillow writes to a file in memory, because it would hold the
    GIL while it encodes to a BytesIO, and other threads would wait.
    """
    try:
        memory: Any = os.fdopen(os.memfd_create("jpeg"), "w+b")
    except (AttributeError, OSError):  # this system has no memfd_create, or forbids it
        memory = io.BytesIO()
    exif = pictures.orientation_exif(orientation) or b""
    with memory as out:
        as_image(picture).save(out, "JPEG", quality=quality, subsampling=0, exif=exif)
        out.seek(0)
        encoded: bytes = out.read()
    return encoded
