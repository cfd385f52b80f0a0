"""Images as JPEG files, for thin links: a fifth of the bytes at 95; some tokens change (docs/thin-links.md)."""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from ._checks import whole
from .errors import InvalidRequest


def encoded(images: npt.NDArray[Any], quality: int) -> npt.NDArray[Any]:
    """uint8 [N,3,H,W] as N JPEG files (an object array of bytes), 4:4:4, of a quality from 1 to 100.

    Raises InvalidRequest for other images, ImportError without Pillow.
    """
    whole("jpeg_quality", quality, 1, 100)
    if images.dtype != np.uint8:
        found, limit = str(images.dtype), "uint8 [N,3,H,W] where jpeg_quality is given"
        raise InvalidRequest(f"images: must be {limit}, got {found}", field="images", value=found, limit=limit)
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("jpeg_quality needs Pillow: pip install 'dat-client[jpeg]'") from error

    def encode(image: npt.NDArray[Any]) -> bytes:
        picture = Image.merge("RGB", [Image.fromarray(channel) for channel in image])
        # a file without a disk: into a BytesIO Pillow encodes with the GIL held, one picture at a time
        try:
            memory: Any = os.fdopen(os.memfd_create("jpeg"), "w+b")
        except (AttributeError, OSError):  # not every system has it, or lets it be used
            memory = io.BytesIO()
        with memory as file:
            # subsampling=0: colour at half the resolution costs more tokens than the bytes are worth
            picture.save(file, "JPEG", quality=quality, subsampling=0)
            file.seek(0)
            data: bytes = file.read()
        return data

    files = np.empty(len(images), object)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        files[:] = list(threads.map(encode, images))
    return files
