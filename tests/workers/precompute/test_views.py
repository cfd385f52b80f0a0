from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop, v2

from dat_client.dataset_format.views import prepared, view_of
from dat_workers.images.encoded import pixels
from dat_workers.precompute.recipe import Recipe
from dat_workers.precompute.views import encode_indices, encode_picture, random_crop, replace_sample_tokens
from tests.workers.precompute.shards import as_array, picture


@pytest.mark.parametrize(("resize", "crop"), [(64, 48), (64, None), (None, 32), (41, 41), (None, None)])
@pytest.mark.parametrize("number", [0, 3, 13])
def test_resize_and_crop_are_torchvisions(number: int, resize: int | None, crop: int | None) -> None:
    x = picture(number)
    expected = x if resize is None else v2.Resize(resize)(x)
    expected = expected if crop is None else v2.CenterCrop(crop)(expected)
    ours = prepared(x, vars(Recipe("c", resize=resize, crop=crop)))
    assert np.array_equal(np.asarray(ours), np.asarray(expected))
    assert (ours is x) == (resize is None and crop is None)


def test_a_picture_smaller_than_the_crop_is_refused() -> None:
    with pytest.raises(ValueError, match=r"40x40 pixels .* 48 or more, the crop"):
        prepared(picture(0), vars(Recipe("c", crop=48)))


def crops_of(recipe: Recipe, key: str, width: int, height: int) -> list[dict[str, Any]]:
    return [random_crop(recipe, key, view, width, height) for view in range(recipe.augment)]


def test_random_crops_depend_on_key_view_and_seed_alone() -> None:
    recipe = Recipe("c", crop=32, augment=3)
    crops = crops_of(recipe, "a/b", 300, 200)
    assert crops == crops_of(recipe, "a/b", 300, 200)
    other_draws = [
        crops_of(recipe, "a/c", 300, 200),
        crops_of(Recipe("c", crop=32, augment=3, seed=1), "a/b", 300, 200),
    ]
    assert all(crops[i] != draw[i] for draw in other_draws for i in range(3))
    assert len({tuple(crop["box"]) for crop in crops}) == 3
    assert crops_of(Recipe("c", crop=32, augment=5), "a/b", 300, 200)[:3] == crops


def test_random_crops_are_spread_as_torchvisions() -> None:
    """Means of 2,000 draws: area, ratio and place as RandomResizedCrop.get_params draws them."""
    width, height, number = 320, 240, 2000
    recipe = Recipe("c", crop=32, augment=1)
    crops = [crop for i in range(number) for crop in crops_of(recipe, str(i), width, height)]
    ours = np.array([crop["box"] for crop in crops], float)
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    expected = np.array(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(number)], float
    )[:, [1, 0, 3, 2]]
    for i in range(4):
        assert abs(ours[:, i].mean() - expected[:, i].mean()) < 5 * expected[:, i].std() * (2 / number) ** 0.5
    assert 0.45 < np.mean([crop["flip"] for crop in crops]) < 0.55
    assert all(left + w <= width and top + h <= height for left, top, w, h in ours)


def test_a_crop_is_pillows_own() -> None:
    x = picture(1)
    for crop in crops_of(Recipe("c", crop=24, augment=8), "k", *x.size):
        left, top, w, h = crop["box"]
        expected = x.resize((24, 24), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
        if crop["flip"]:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert np.array_equal(np.asarray(view_of(x, crop)), np.asarray(expected))


def test_a_thin_picture_has_crops_too() -> None:
    for width, height in ((1000, 8), (8, 1000), (1, 1)):
        for crop in crops_of(Recipe("c", crop=16, augment=4), "k", width, height):
            assert view_of(Image.new("RGB", (width, height)), crop).size == (16, 16)


@pytest.mark.parametrize(("form", "limit"), [("jpg", 4.0), ("png", 0.0), ("webp", 6.0)])
def test_pictures_are_encoded_as_asked(form: str, limit: float) -> None:
    x = pixels(picture(2, 64))
    back = as_array(encode_picture(x, Recipe("c", picture=form)))
    assert np.abs(back.astype(int) - x).mean() <= limit


def test_jpeg_keeps_the_colours_of_every_pixel() -> None:
    image = Image.open(io.BytesIO(encode_picture(pixels(picture(2, 64)), Recipe("c"))))
    assert {sampling for _, *sampling_of, _ in image.layer for sampling in sampling_of} == {1}  # type: ignore[attr-defined]


def test_tokens_are_numpys_file() -> None:
    indices = np.arange(12, dtype=np.uint16).reshape(3, 4)
    back = np.load(io.BytesIO(encode_indices(indices)))
    assert back.dtype == np.uint16
    assert np.array_equal(back, indices)


def test_swapped_tokens_are_a_share_of_others_and_depend_on_the_key() -> None:
    recipe = Recipe("c", replace_fraction=0.25, variants=2)
    indices = np.full((8, 8), 3, np.uint16)
    swapped = replace_sample_tokens(indices, recipe, "k", 0, 0, 16)
    assert (swapped != indices).sum() == 16
    assert swapped.max() < 16
    assert np.array_equal(swapped, replace_sample_tokens(indices, recipe, "k", 0, 0, 16))
    for place in (("l", 0, 0), ("k", 1, 0), ("k", 0, 1)):
        assert not np.array_equal(swapped, replace_sample_tokens(indices, recipe, *place, 16))
