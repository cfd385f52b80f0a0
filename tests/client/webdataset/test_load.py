"""What `load` yields."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from fsspec.core import url_to_fs
from PIL import Image
from torch.utils.data import DataLoader

from dat_client import InvalidDataset
from dat_client.webdataset import load, read_manifest, read_settings

from .precomputed import (
    KEPT,
    NAMES,
    VIEWS,
    encoded,
    numbers,
    one_view,
    picture,
    pictures,
    pillows_own,
    q_of,
    tensor,
    write_dst,
    write_pair,
    write_shard,
)


def test_reconstructions_and_labels(dst: Path) -> None:
    items = list(load(dst))
    assert len(items) == len(KEPT)
    for number, (x_hat, label) in zip(KEPT, items, strict=True):
        assert x_hat.dtype == torch.uint8
        assert torch.equal(x_hat, pictures(number)[1])
        assert label == number % 10
        assert type(label) is int


def test_tokens_are_int32(dst: Path) -> None:
    tokens, label = next(iter(load(dst, tokens=True)))
    assert tokens.dtype == torch.int32
    assert tokens.tolist() == [[65534] * 5] * 4  # above 32767: not read as int16
    assert label == 1


def test_pipeline_has_webdatasets_methods(dst: Path) -> None:
    data = load(dst, shuffle=4).map(lambda item: item[1]).repeat()
    labels = [label for label, _ in zip(data, range(3 * len(KEPT)), strict=False)]
    assert Counter(labels) == Counter(3 * [number % 10 for number in KEPT])


def test_stored_images_of_any_suffix(tmp_path: Path) -> None:
    def with_image(number: int, x: Image.Image) -> dict[str, Any]:
        suffix = ("jpeg", "png", "jpg")[number]
        stored = encoded(x, "PNG" if suffix == "png" else "JPEG")
        return {"jpg": encoded(q_of(x), "JPEG"), f"image.{suffix}": stored}

    _, dst = write_pair(tmp_path, NAMES[:1], 3, with_image, outputs=["reconstruction", "image"], picture="jpg")
    for number, (x, x_hat, _) in enumerate(load(dst, image=True)):
        jpeg = Image.open(io.BytesIO(encoded(q_of(picture(number)), "JPEG"))).convert("RGB")
        assert torch.equal(x_hat, tensor(jpeg))
        assert (x.float() - pictures(number)[0].float()).abs().mean() < 10


def test_other_pictures_than_rgb(tmp_path: Path) -> None:
    grey = picture(3).convert("L")
    _, dst = write_pair(tmp_path, NAMES[:1], 1, lambda *_: {"png": encoded(q_of(grey))})
    (x_hat, _), *_ = load(dst)
    assert torch.equal(x_hat, tensor(q_of(grey).convert("RGB")))


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_alone_reads_them(augmented: tuple[Path, Path], dst: Path) -> None:
    urls = [str(dst / name) for name in NAMES]
    plain = webdataset.WebDataset(urls, shardshuffle=False).decode("torchrgb8").to_tuple("__key__", "png", "cls")
    for number, (key, x_hat, label) in zip(KEPT, plain, strict=True):
        assert key == f"{number:04}"
        assert torch.equal(x_hat, pictures(number)[1])
        assert label == number % 10
    views = next(iter(webdataset.WebDataset([str(augmented[1] / NAMES[0])], shardshuffle=False)))
    assert json.loads(views["views.json"]) == VIEWS
    assert {"0.png", "2.indices.npy", "1.image.png", "cls"} <= set(views)


@pytest.mark.parametrize("address", ["memory://q{n}/deep", "file://{tmp}/q"])
def test_fsspec_addresses(pair: tuple[Path, Path], tmp_path: Path, address: str) -> None:
    base = address.format(n=random.randrange(1 << 60), tmp=tmp_path)
    for name, folder in zip(("src", "dst"), pair, strict=True):
        fs, path = url_to_fs(f"{base}/{name}")
        fs.put(f"{folder}/", path, recursive=True)
    assert read_settings(f"{base}/dst") == read_settings(pair[1])
    assert read_manifest(f"{base}/dst") == read_manifest(pair[1])
    for source in ("src", "src/train-{000000..000004}.tar"):
        data = load(f"{base}/dst/", source=f"{base}/{source}", tokens=True)
        loader = DataLoader(data, batch_size=None, num_workers=2)
        read = {65535 - int(tokens[0, 0]): x for x, tokens, _ in loader}
        assert sorted(read) == KEPT
        assert all(torch.equal(x, pictures(number)[0]) for number, x in read.items())
    fs.rm(url_to_fs(base)[1], recursive=True)


def test_chained_addresses_in_patterns(pair: tuple[Path, Path]) -> None:
    source = f"simplecache::file://{pair[0]}/train-{{000000..000004}}.tar"
    assert len(list(load(pair[1], source=source))) == len(KEPT)


def test_relative_paths_and_a_home(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pair[1].parent)
    data = load("dst", source="src/train-{000000..000004}.tar")
    monkeypatch.setenv("HOME", str(pair[1].parent))
    at_home = load("~/dst")
    monkeypatch.chdir("/")
    assert len(list(data)) == len(list(at_home)) == len(KEPT)


def test_unfinished_shards_are_not_read(tmp_path: Path) -> None:
    _, dst = write_pair(tmp_path, NAMES[:2], 2, one_view)
    (dst / "manifest" / f"{NAMES[0]}.json").unlink()
    assert numbers(load(dst, tokens=True)) == [2, 3]
    (dst / "manifest" / f".{NAMES[0]}.json.0123.tmp").write_text("{")
    assert list(read_manifest(dst)) == NAMES[1:2]
    (dst / "manifest" / f"{NAMES[1]}.json").unlink()
    with pytest.raises(InvalidDataset, match="no shard is finished"):
        load(dst)


def test_without_labels_pictures_come_alone(pair: tuple[Path, Path]) -> None:
    src, dst = pair
    x, x_hat = pictures(1)
    assert torch.equal(next(iter(load(dst, label=None))), x_hat)
    tokens = next(iter(load(dst, label=None, tokens=True)))
    assert tokens.tolist() == [[65534] * 5] * 4
    both = next(iter(load(dst, label=None, source=src)))
    assert [torch.equal(mine, expected) for mine, expected in zip(both, (x, x_hat), strict=True)] == [True, True]
    batch = next(iter(DataLoader(load(dst, label=None), batch_size=2)))
    assert batch.shape == (2, 3, 32, 40)


def test_data_without_labels_say_which_fields_they_have(tmp_path: Path) -> None:
    def caption(number: int, x: Image.Image) -> dict[str, Any]:
        return {**one_view(number, x), "txt": b"17", "json": b"{}"}

    _, dst = write_pair(tmp_path, NAMES[:1], 2, caption, labels=False)
    message = "no cls, only indices.npy, json, png, txt; label= names .* label=None"
    with pytest.raises(InvalidDataset, match=message):
        load(dst)
    assert [label for _, label in load(dst, label="txt")] == [17, 17]
    assert [x_hat.shape for x_hat in load(dst, label=None)] == [(3, 32, 40)] * 2


def test_keys_that_are_not_utf8(tmp_path: Path) -> None:
    """Names of files are bytes: `cafe\\xe9` is a name in Latin-1."""
    key = b"cafe\xe9/\xff".decode("utf-8", "surrogateescape")
    x = picture(3)
    views = {f"{i}.png": encoded(pillows_own(x, view)) for i, view in enumerate(VIEWS)}
    sample = {"__key__": key, "cls": b"3", "views.json": json.dumps(VIEWS).encode(), **views}
    write_shard(tmp_path / "src" / "a.tar", [{"__key__": key, "png": encoded(x)}])
    dst = write_dst(tmp_path / "dst", {"a.tar": [sample]}, augment=3, outputs=["reconstruction"])
    data = load(dst, source=tmp_path / "src")
    for loader in (data, DataLoader(data, batch_size=None, num_workers=1)):
        (x_cut, x_hat, label) = next(iter(loader))
        assert label == 3
        assert torch.equal(x_cut, x_hat)
    (tmp_path / "src" / "a.tar").write_bytes(bytes(10240))
    with pytest.raises(InvalidDataset) as caught:  # it travels from the worker to this process
        next(iter(DataLoader(data, batch_size=None, num_workers=1)))
    assert f"sample {key} is not in" in str(caught.value)
