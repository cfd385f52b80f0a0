"""x, read from the source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dat_client import InvalidDataset
from dat_client.webdataset import load, read_manifest

from .precomputed import (
    KEPT,
    NAMES,
    edited,
    encoded,
    one_view,
    picture,
    pictures,
    q_of,
    write_dst,
    write_pair,
)


@pytest.mark.parametrize("pattern", ["{src}", "{src}/", "{src}/train-{{000000..000009}}.tar", "file://{src}"])
def test_x_from_the_source_beside_its_reconstruction(pair: tuple[Path, Path], pattern: str) -> None:
    src, dst = pair
    items = list(load(dst, source=pattern.format(src=src)))
    for number, (x, x_hat, label) in zip(KEPT, items, strict=True):
        assert torch.equal(x, pictures(number)[0])
        assert torch.equal(x_hat, pictures(number)[1])
        assert label == number % 10


def test_shuffled_pairs_stay_pairs(pair: tuple[Path, Path]) -> None:
    for x, tokens, label in load(pair[1], source=pair[0], tokens=True, shuffle=100):
        number = 65535 - int(tokens[0, 0])
        assert torch.equal(x, pictures(number)[0])
        assert label == number % 10


@pytest.mark.parametrize("names", [["val/000.tar", "train/000.tar"]])
def test_nested_shards(tmp_path: Path, names: list[str]) -> None:
    src, dst = write_pair(tmp_path, names, 2, one_view)
    assert list(read_manifest(dst)) == sorted(names)
    for source in (src, f"{src}/{{train,val}}/000.tar"):
        items = list(load(dst, source=source))
        assert sorted(255 - int(x_hat[0, 0, 0]) for _, x_hat, _ in items) == sorted(
            int(x[0, 0, 0]) for x, _, _ in items
        )
        assert len(items) == 4
    with pytest.raises(InvalidDataset, match=r"source: 0 of .*train/000.tar are named val/000.tar"):
        load(dst, source=f"{src}/train/000.tar")


def test_a_picture_smaller_than_the_crop_is_another_source(tmp_path: Path) -> None:
    def cut(_: int, x: Image.Image) -> dict[str, Any]:
        return {"png": encoded(q_of(x.crop((4, 0, 36, 32))))}

    _, dst = write_pair(tmp_path, NAMES[:1], 1, cut, crop=32)
    smaller, _ = write_pair(tmp_path / "smaller", NAMES[:1], 1, one_view, size=(40, 31))
    with pytest.raises(InvalidDataset, match=r"sample 0000: .*40x31 pixels .* 32 or more, the crop"):
        list(load(dst, source=smaller))


def test_another_source_is_noticed(own: tuple[Path, Path], tmp_path: Path) -> None:
    src, dst = own
    another_source, _ = write_pair(tmp_path / "other", NAMES[:2], 2, one_view, size=(33, 32))
    with pytest.raises(InvalidDataset, match=r"sample 0000: x has 33x32, Q\(x\) 40x32 pixels"):
        list(load(dst, source=another_source))
    fewer, _ = write_pair(tmp_path / "fewer", NAMES[:2], 1, one_view)
    with pytest.raises(InvalidDataset, match=r"source: sample 0001 is not in .*fewer/src/train-000000.tar"):
        list(load(dst, source=fewer))
    with pytest.raises(FileNotFoundError, match=r"nowhere/train-000000.tar"):
        list(load(dst, source=tmp_path / "nowhere"))
    with pytest.raises(InvalidDataset, match=r"source: 0 of .* are named train-000001.tar"):
        load(dst, source=src / NAMES[0])
    with pytest.raises(InvalidDataset, match=r"source: .*train-{0..1.tar has braces that are not in pairs"):
        load(dst, source=f"{src}/train-{{0..1.tar")


def write_folder(folder: Path, names: dict[str, int]) -> Path:
    for name, number in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / name)
    return folder


def dataset_of(folder: Path, key: str, number: int, skipped: list[str]) -> Path:
    """A dataset of one sample, made from a folder of pictures, whose manifest lists `skipped` keys."""
    sample = {"__key__": key, "cls": b"0", "png": encoded(q_of(picture(number)))}
    dst = write_dst(folder, {"000000.tar": [sample]}, pictures_a_shard=1000)
    edited(dst, "manifest/000000.tar.json", skipped=[{"key": key, "reason": "there before"} for key in skipped])
    return dst


def test_of_two_pictures_with_one_key_the_first_is_the_original(tmp_path: Path) -> None:
    src = write_folder(tmp_path / "src", {"a/1.jpg": 5, "a/1.png": 6, "a/1.webp": 7})
    for i in (5, 6):  # without loss, so that x can be compared
        picture(i).save(src / f"a/1.{'jpg' if i == 5 else 'png'}", "PNG")
    (src / "a" / "1.bmp.png").mkdir()
    dst = dataset_of(tmp_path / "dst", "a/1", 5, ["a/1", "a/1"])
    (x, x_hat, _), *others = load(dst, source=src)
    assert not others
    assert torch.equal(x, pictures(5)[0])
    assert torch.equal(x_hat, pictures(5)[1])


def test_a_picture_that_came_later_is_not_taken_for_the_original(tmp_path: Path) -> None:
    src = write_folder(tmp_path / "src", {"a/1.png": 6, "a/1.jpg": 5})
    dst = dataset_of(tmp_path / "dst", "a/1", 6, [])
    with pytest.raises(
        InvalidDataset, match=r"2 files of .* have the key a/1, and 0 of them are listed as skipped"
    ):
        next(iter(load(dst, source=src)))


def test_a_link_is_a_picture(tmp_path: Path) -> None:
    store = write_folder(tmp_path / "store", {"blob.png": 6})
    (tmp_path / "src" / "a").mkdir(parents=True)
    (tmp_path / "src" / "a" / "1.png").symlink_to(store / "blob.png")
    dst = dataset_of(tmp_path / "dst", "a/1", 6, [])
    assert torch.equal(next(iter(load(dst, source=tmp_path / "src")))[0], pictures(6)[0])
