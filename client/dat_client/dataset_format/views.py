"""Cuts a view from a picture; the reader repeats it to make x from the source, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

BILINEAR = Image.Resampling.BILINEAR


def prepared(picture: Image.Image, settings: Mapping[str, Any]) -> Image.Image:
    """Applies the recipe's `resize` and `crop` to an RGB picture: torchvision's Resize and CenterCrop.

    `resize` is the length of the shorter side and `crop` the side of the centre square, in pixels; None leaves the
    step out. Without either the picture itself is returned. Raises ValueError for a picture smaller than the crop.

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
                "a resize scales smaller ones up"
            )
        left, top = round((width - crop) / 2), round((height - crop) / 2)
        picture = picture.crop((left, top, left + crop, top + crop))
    return picture


def view_of(picture: Image.Image, view: Mapping[str, Any]) -> Image.Image:
    """Cuts one of the random crops from an RGB picture, as an entry of `views.json` describes it.

    The `box` (left, top, width, height) is scaled to `size` (height, width) and, with `flip`, mirrored.

    >>> view_of(Image.new("RGB", (100, 60)), {"box": [10, 0, 40, 60], "size": [32, 24], "flip": True}).size
    (24, 32)
    """
    left, top, width, height = view["box"]
    rows, columns = view["size"]
    picture = picture.resize((columns, rows), BILINEAR, box=(left, top, left + width, top + height))
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view["flip"] else picture
