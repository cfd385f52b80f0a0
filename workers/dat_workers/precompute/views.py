"""Crops the views of a picture, and replaces tokens at random; the sample's key decides every random draw."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from dat_client.dataset_format.views import prepared, view_of
from dat_client.wire.tensors import Array
from dat_workers.images.encoded import encode_jpeg, encode_png, encode_webp
from dat_workers.perturbation import swaps
from dat_workers.precompute.recipe import Recipe

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # those of torchvision's RandomResizedCrop, used to train on ImageNet


def random_of(recipe: Recipe, key: str, *purpose: object) -> np.random.Generator:
    """Returns a random generator that depends only on the recipe's seed, the sample's key and the purpose."""
    text = "/".join(map(str, (recipe.seed, *purpose, key)))
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def random_crop(recipe: Recipe, key: str, view: int, width: int, height: int) -> dict[str, Any]:
    """Draws crop `view` of a sample: 8 to 100 % of the picture's area, sides 3:4 to 4:3, mirrored half the time.

    The crop is drawn like torchvision's RandomResizedCrop and RandomHorizontalFlip (Szegedy et al., 2015, section
    6): if ten tries fail, it is the largest centre crop within the ratios. Returns the crop as `views.json` stores
    it: `box` (left, top, width, height), `size` (height, width) and `flip`.
    """
    assert recipe.crop is not None
    rng = random_of(recipe, key, "crop", view)
    flip = bool(rng.random() < 0.5)

    def crop(left: int, top: int, w: int, h: int) -> dict[str, Any]:
        return {"box": [left, top, w, h], "size": [recipe.crop, recipe.crop], "flip": flip}

    for _ in range(10):
        area = width * height * rng.uniform(*SCALE)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            return crop(left, top, w, h)
    w, h = width, height
    if width / height < RATIO[0]:
        h = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        w = round(height * RATIO[1])
    return crop((width - w) // 2, (height - h) // 2, w, h)


def views_of(recipe: Recipe, key: str, picture: Image.Image) -> Iterator[tuple[Image.Image, dict[str, Any]]]:
    """Yields each x of a sample with its description in `views.json`: its random crops, or the prepared picture.

    Raises ValueError for a picture smaller than the centre crop.
    """
    if not recipe.augment:
        yield prepared(picture, vars(recipe)), {}
    for view in range(recipe.augment):
        crop = random_crop(recipe, key, view, *picture.size)
        yield view_of(picture, crop), crop


def encode_picture(picture: Array, recipe: Recipe, orientation: int = 1) -> bytes:
    """Encodes uint8 [3,H,W] in the recipe's format: JPEG (4:4:4) and WebP with its quality, PNG without loss.

    Viewers turn the picture by the EXIF `orientation`, which is that of its source: x and Q(x) are turned alike.
    """
    if recipe.picture == "png":
        return encode_png(picture, orientation)
    if recipe.picture == "jpg":
        return encode_jpeg(picture, recipe.quality, orientation)
    return encode_webp(picture, recipe.quality, orientation)


def encode_indices(indices: Array) -> bytes:
    """Encodes tokens uint16 [h,w] as numpy's .npy."""
    out = io.BytesIO()
    np.save(out, indices)
    return out.getvalue()


def replace_sample_tokens(
    indices: Array, recipe: Recipe, key: str, view: int, variant: int, codebook_size: int
) -> Array:
    """Replaces `replace_fraction` of the tokens uint16 [h,w] by different random tokens ("Random" in Table 8).

    Exactly round(fraction·h·w) tokens change. The sample's key, the view and the variant decide which tokens
    change, and to which values.
    """
    rng = random_of(recipe, key, "tokens", view, variant)
    flat = indices.reshape(-1).astype(np.int64)
    positions, shift = swaps(rng, flat.size, recipe.replace_fraction, codebook_size)
    flat[positions] = (flat[positions] + shift) % codebook_size
    return flat.astype(np.uint16).reshape(indices.shape)
