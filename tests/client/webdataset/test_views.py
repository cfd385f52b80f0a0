"""Crops, and the views of a sample."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from dat_client import InvalidDataset
from dat_client.webdataset import load, prepared, view_of

from .precomputed import (
    NAMES,
    VIEWS,
    encoded,
    npy,
    numbers,
    picture,
    pillows_own,
    q_of,
    tensor,
    three_views,
    write_pair,
)


@pytest.mark.parametrize("stored", [False, True])
def test_views_are_cut_as_pillow_cuts_them(augmented: tuple[Path, Path], stored: bool) -> None:
    src, dst = augmented
    items = list(load(dst, view="all", image=True) if stored else load(dst, view="all", source=src))
    of = [(number, i) for number in range(12) if number != 2 for i in range(3)]
    for (number, i), (x, x_hat, label) in zip(of, items, strict=True):
        cut = pillows_own(picture(number), VIEWS[i])
        assert torch.equal(x, tensor(cut))  # bit for bit
        assert torch.equal(x_hat, tensor(q_of(cut)))
        assert label == number % 10


def test_one_view_by_its_number(augmented: tuple[Path, Path]) -> None:
    assert {number // 100 for number in numbers(load(augmented[1], tokens=True, view=2))} == {2}
    with pytest.raises(
        InvalidDataset, match=r"train-000000.tar, sample 0000: view 3 of 3 does not exist: the first is 0"
    ):
        next(iter(load(augmented[1], view=3)))


def test_random_views(augmented: tuple[Path, Path]) -> None:
    data = load(augmented[1], tokens=True, seed=3)
    epochs = [numbers(data) for _ in range(12)]
    for epoch in epochs:
        assert [number % 100 for number in epoch] == [number for number in range(12) if number != 2]
    read = Counter(number // 100 for epoch in epochs for number in epoch)
    assert set(read) == {0, 1, 2}
    assert min(read.values()) > 20  # of 132
    assert epochs[0] != epochs[1]
    again = load(augmented[1], tokens=True, seed=3)
    assert numbers(again) == epochs[0]
    in_workers = DataLoader(load(augmented[1], tokens=True, seed=3), batch_size=None, num_workers=2)
    assert sorted(numbers(in_workers)) == sorted(epochs[0])
    assert numbers(load(augmented[1], tokens=True, seed=4)) != epochs[0]


def test_variants_share_their_x(tmp_path: Path) -> None:
    def variants(number: int, x: Image.Image) -> dict[str, Any]:
        views = [{"variant": i, "seed": i} for i in range(2)]
        cut = x.crop((12, 8, 28, 24))
        both = {f"{i}.png": encoded(q_of(cut).rotate(90 * i)) for i in range(2)}
        return {"views.json": json.dumps(views).encode()} | both

    src, dst = write_pair(tmp_path, NAMES[:1], 2, variants, crop=16, variants=2, outputs=["reconstruction"])
    for number, (x, x_hat, _) in zip((0, 0, 1, 1), load(dst, source=src, view="all"), strict=True):
        assert torch.equal(x, tensor(picture(number).crop((12, 8, 28, 24))))
        assert x_hat.shape == x.shape


@pytest.mark.parametrize("size", [(100, 60), (61, 97), (64, 64), (224, 301)])
@pytest.mark.parametrize(("resize", "crop"), [(None, 31), (48, None), (48, 40), (64, 41), (None, None)])
def test_geometry_is_torchvisions(size: tuple[int, int], resize: int | None, crop: int | None) -> None:
    x = picture(1, size)
    steps: list[Any] = [v2.Resize(resize)] if resize else []
    steps += [v2.CenterCrop(crop)] if crop else []
    expected = v2.Compose([*steps, v2.Identity()])(x)
    assert np.array_equal(prepared(x, {"resize": resize, "crop": crop}), expected)


def test_a_view_is_torchvisions_resized_crop() -> None:
    # torchvision crops first, so that what lies outside does not count: the same where nothing is scaled.
    x = picture(1, (100, 60))
    view = {"box": [7, 9, 30, 20], "size": [20, 30], "flip": False}
    assert np.array_equal(view_of(x, view), v2.functional.resized_crop(x, 9, 7, 20, 30, [20, 30]))


def test_resized_and_cropped_x(tmp_path: Path) -> None:
    geometry = {"resize": 24, "crop": 17}

    def smaller(_: int, x: Image.Image) -> dict[str, Any]:
        return {"png": encoded(q_of(prepared(x, geometry)))}

    src, dst = write_pair(tmp_path, NAMES[:1], 3, smaller, size=(40, 32), **geometry)
    for number, (x, x_hat, _) in enumerate(load(dst, source=src)):
        assert torch.equal(x, tensor(prepared(picture(number), geometry)))
        assert x.shape == x_hat.shape == (3, 17, 17)


def test_a_kept_field_is_not_taken_for_a_reconstruction(tmp_path: Path) -> None:
    """`--keep png --format png --augment 3` stores the original beside the views."""

    def beside(number: int, x: Image.Image) -> dict[str, Any]:
        return {**three_views(number, x), "png": encoded(x), "indices.npy": npy(np.zeros((2, 2), np.uint16))}

    _, dst = write_pair(tmp_path, NAMES[:1], 1, beside, augment=3)
    assert len(list(load(dst, view="all"))) == 3
    for (x_hat, _), view in zip(load(dst, view="all"), VIEWS, strict=True):
        assert torch.equal(x_hat, tensor(q_of(pillows_own(picture(0), view))))
