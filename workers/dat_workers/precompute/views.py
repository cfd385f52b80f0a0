"""A picture into the views of it that go through Q, and tokens into variants: all by the sample's key alone."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from dat_workers.batching.device_copies import Array
from dat_workers.errors import InvalidInput
from dat_workers.images.encoded import as_image, encode_jpeg, encode_png
from dat_workers.perturbation import swaps
from dat_workers.precompute.recipe import Recipe

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # torchvision's RandomResizedCrop, as ImageNet is trained on
BILINEAR = Image.Resampling.BILINEAR


@dataclass(frozen=True)
class Crop:
    """A part of a picture, scaled and perhaps mirrored: box (left, top, width, height), size (height, width)."""

    box: tuple[int, int, int, int]
    size: tuple[int, int]
    flip: bool = False

    def of(self, picture: Image.Image) -> Image.Image:
        left, top, width, height = self.box
        cut = picture.resize((self.size[1], self.size[0]), BILINEAR, box=(left, top, left + width, top + height))
        return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else cut

    def described(self) -> dict[str, Any]:
        return {"box": list(self.box), "size": list(self.size), "flip": self.flip}


def random_of(recipe: Recipe, key: str, *what: object) -> np.random.Generator:
    """Random numbers that depend on the seed, the sample's key and `what`, and on nothing else."""
    said = "/".join(map(str, (recipe.seed, *what, key)))
    digest = hashlib.sha256(said.encode("utf-8", "surrogateescape")).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def random_crop(recipe: Recipe, key: str, view: int, width: int, height: int) -> Crop:
    """Crop `view` of a sample: area 8 to 100 % of the picture, sides 3:4 to 4:3, mirrored half the time.

    As torchvision's RandomResizedCrop and RandomHorizontalFlip draw them (Szegedy et al., 2015, section 6): ten
    tries, then the largest centre crop within the ratios.
    """
    assert recipe.crop is not None
    rng = random_of(recipe, key, "crop", view)
    size = (recipe.crop, recipe.crop)
    flip = bool(rng.random() < 0.5)
    for _ in range(10):
        area = width * height * rng.uniform(*SCALE)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            return Crop((left, top, w, h), size, flip)
    w, h = width, height
    if width / height < RATIO[0]:
        h = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        w = round(height * RATIO[1])
    return Crop(((width - w) // 2, (height - h) // 2, w, h), size, flip)


def crops_of(recipe: Recipe, key: str, width: int, height: int) -> list[Crop]:
    """The random crops of a sample; none where the recipe asks for none."""
    return [random_crop(recipe, key, view, width, height) for view in range(recipe.augment)]


def views_of(recipe: Recipe, key: str, picture: Image.Image) -> Iterator[tuple[Image.Image, dict[str, Any]]]:
    """Each x of a sample, and what views.json says of it: its random crops, or the one that `prepared` makes."""
    crops = crops_of(recipe, key, *picture.size)
    for crop in crops:
        yield crop.of(picture), crop.described()
    if not crops:
        yield prepared(recipe, picture), {}


def prepared(recipe: Recipe, picture: Image.Image) -> Image.Image:
    """The picture with its shorter side at `resize`, its middle `crop`: torchvision's Resize and CenterCrop."""
    if recipe.resize is not None:
        width, height = picture.size
        short, long = min(width, height), max(width, height)
        longer = int(recipe.resize * long / short)
        size = (recipe.resize, longer) if width <= height else (longer, recipe.resize)
        picture = picture.resize(size, BILINEAR) if size != picture.size else picture
    if recipe.crop is not None:
        width, height = picture.size
        if min(width, height) < recipe.crop:
            limit = f"sides of {recipe.crop} or more, the crop; a resize scales smaller ones up"
            raise InvalidInput("picture", f"{width}x{height} pixels", limit)
        left, top = round((width - recipe.crop) / 2), round((height - recipe.crop) / 2)
        picture = picture.crop((left, top, left + recipe.crop, top + recipe.crop))
    return picture


def encoded(picture: Array, recipe: Recipe) -> bytes:
    """uint8 [3,H,W] in the recipe's format: JPEG in 4:4:4 and WebP with its quality, PNG as it is."""
    if recipe.picture == "png":
        return encode_png(picture)
    if recipe.picture == "jpg":
        return encode_jpeg(picture, recipe.quality)
    out = io.BytesIO()
    as_image(picture).save(out, "WEBP", quality=recipe.quality)
    return out.getvalue()


def encoded_tokens(indices: Array) -> bytes:
    """uint16 [h,w] as numpy's .npy."""
    out = io.BytesIO()
    np.save(out, indices)
    return out.getvalue()


def with_others(indices: Array, recipe: Recipe, key: str, view: int, variant: int, codebook_size: int) -> Array:
    """uint16 [h,w] with `replace_fraction` of the tokens swapped for random other ones ("Random" of Table 8).

    round(fraction·h·w) tokens change, and each does change; which, and to what, depends on the sample's key.
    """
    rng = random_of(recipe, key, "tokens", view, variant)
    flat = indices.reshape(-1).astype(np.int64)
    where, shift = swaps(rng, flat.size, recipe.replace_fraction, codebook_size)
    flat[where] = (flat[where] + shift) % codebook_size
    return flat.astype(np.uint16).reshape(indices.shape)
