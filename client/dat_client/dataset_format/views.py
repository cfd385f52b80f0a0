"""Cuts a view from a picture. `dat precompute` and the reader both use it, so that x is the same bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

BILINEAR = Image.Resampling.BILINEAR


def prepared(picture: Image.Image, settings: Mapping[str, Any]) -> Image.Image:
    """Applies the recipe's `resize` and `crop` to an RGB picture, as torchvision's Resize and CenterCrop do.

    `resize` is the new length of the shorter side in pixels, and `crop` the side of the centre square. A step whose
    setting is None is left out; if both are None, the picture itself is returned. Raises ValueError for a picture
    that is smaller than the crop.

    >>> prepared(Image.new("RGB", (100, 60)), {"resize": 30, "crop": None}).size
    (50, 30)
    """
    resize, crop = settings["resize"], settings["crop"]
    if resize:
        short, long = sorted(picture.size)
        scaled = (resize, int(resize * long / short))
        size = scaled if picture.width <= picture.height else scaled[::-1]
        picture = picture.resize(size, BILINEAR) if size != picture.size else picture
    if crop:
        width, height = picture.size
        if min(width, height) < crop:
            raise ValueError(
                f"picture: {width}x{height} pixels is not usable; expected sides of {crop} or more, the crop; "
                "set resize to scale smaller pictures up"
            )
        left, top = round((width - crop) / 2), round((height - crop) / 2)
        picture = picture.crop((left, top, left + crop, top + crop))
    return picture


def view_of(picture: Image.Image, view: Mapping[str, Any]) -> Image.Image:
    """Cuts the random crop from an RGB picture that `view`, an entry of `views.json`, describes.

    The `box` (left, top, width, height) in pixels is scaled to `size` (height, width). If `flip` is true, the
    result is mirrored left to right.

    >>> view_of(Image.new("RGB", (100, 60)), {"box": [10, 0, 40, 60], "size": [32, 24], "flip": True}).size
    (24, 32)
    """
    left, top, width, height = view["box"]
    rows, columns = view["size"]
    picture = picture.resize((columns, rows), BILINEAR, box=(left, top, left + width, top + height))
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view["flip"] else picture
