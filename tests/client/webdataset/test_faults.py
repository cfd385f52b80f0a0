"""Damaged datasets, and wrong arguments of `load`."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dat_client import InvalidDataset
from dat_client.webdataset import load, read_manifest

from .precomputed import (
    NAMES,
    edited,
    encoded,
    npy,
    one_view,
    three_views,
    write_pair,
    write_shard,
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": True}, "holds reconstruction, indices, no image"),
        ({"image": True, "source": "/src"}, "give one of them"),
        ({"label": "json"}, r"train-000000.tar, sample 0000: no json, only cls, indices.npy, png"),
        ({"label": "png"}, "sample 0000: png is b'.x89PNG.*must be an integer"),
        ({"view": -1}, "view: must be 'random', 'all' or the number of a view, got -1"),
        ({"view": "first"}, "got 'first'"),
        ({"view": 1}, "sample 0000: view 1 of 1"),
    ],
)
def test_missing_fields_and_wrong_options_are_named(
    own: tuple[Path, Path], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidDataset, match=message):
        next(iter(load(own[1], **options)))


def test_folders_that_precompute_did_not_write_are_refused(own: tuple[Path, Path]) -> None:
    src, dst = own
    with pytest.raises(InvalidDataset, match=r"src: its precompute.json is missing"):
        load(src)
    with pytest.raises(InvalidDataset, match=r"nowhere: its precompute.json is missing"):
        load(f"memory://nowhere{random.randrange(1 << 60)}/nowhere")
    edited(dst, "precompute.json", format=2)
    with pytest.raises(InvalidDataset, match="format 2, this dat-client reads 1"):
        load(dst)
    edited(dst, "precompute.json", format=1)
    (dst / "precompute.json").rename(dst / "aside")
    for damaged in ("", "{", "[]"):
        (dst / "precompute.json").write_text(damaged)
        with pytest.raises(InvalidDataset, match=r"dst: its precompute.json is not JSON|dst: format None"):
            load(dst)
    (dst / "precompute.json").write_text('{"format": 1, "outputs": [], "crop": null}')
    with pytest.raises(InvalidDataset, match=r"dst: its precompute.json lacks augment, picture, resize, variants$"):
        load(dst)
    (dst / "aside").rename(dst / "precompute.json")
    edited(dst, f"manifest/{NAMES[1]}.json", settings="4567")
    with pytest.raises(InvalidDataset, match="shards of 2 different settings"):
        load(dst)


def test_shards_that_changed_are_named(own: tuple[Path, Path]) -> None:
    dst = own[1]
    shard = dst / NAMES[0]
    whole = shard.read_bytes()
    edited(dst, f"manifest/{NAMES[0]}.json", samples=3)
    with pytest.raises(InvalidDataset, match=r"train-000000.tar: 2 samples, 3 by the manifest"):
        list(load(dst))
    shard.write_bytes(whole[:3000])
    with pytest.raises(InvalidDataset, match=r"train-000000.tar: not a whole tar file"):
        list(load(dst))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"train-000000.tar"):
        list(load(dst))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"shard": "train-000001.tar"}'])
def test_a_damaged_manifest_entry_is_named(own: tuple[Path, Path], content: str) -> None:
    (own[1] / "manifest" / f"{NAMES[1]}.json").write_text(content)
    with pytest.raises(InvalidDataset, match=r"manifest/train-000001.tar.json cannot be read: .* precompute again"):
        read_manifest(own[1])


def test_two_files_of_one_name(own: tuple[Path, Path]) -> None:
    shard = own[1] / NAMES[0]
    samples = [{"__key__": "0000", "png": b"", "cls": b"0"}] * 2
    write_shard(shard, samples)
    with pytest.raises(InvalidDataset, match=r"train-000000.tar, sample 0000: the field png is there twice"):
        list(load(own[1]))


def test_a_field_that_precompute_should_have_written(own: tuple[Path, Path]) -> None:
    edited(own[1], "precompute.json", picture="webp")
    with pytest.raises(InvalidDataset, match=r"sample 0000: no webp, only cls, indices.npy, png"):
        list(load(own[1]))
    edited(own[1], "precompute.json", augment=2)
    with pytest.raises(InvalidDataset, match=r"sample 0000: no 0.indices.npy, only"):
        load(own[1], source=own[0], tokens=True)


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    _, dst = write_pair(tmp_path, NAMES[:1], 2, lambda n, x: {"png": encoded(x)[: 5000 if n == 0 else 100]})
    with pytest.raises(InvalidDataset, match=r"train-000000.tar, sample 0001: \w+"):
        list(load(dst))


WRONG_SETTINGS = [
    ("variants", "1"), ("variants", 0), ("variants", True), ("augment", -1), ("augment", None), ("outputs", "cls"),
    ("outputs", [1]), ("outputs", None), ("picture", 5), ("crop", "224"), ("crop", 1.5), ("resize", []),
    ("pictures_a_shard", "1000"), ("format", "1"), ("format", True),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG_SETTINGS)
def test_settings_of_wrong_types_are_named(own: tuple[Path, Path], name: str, value: Any) -> None:
    edited(own[1], "precompute.json", **{name: value})
    message = "dst: format" if name == "format" else f"dst: its precompute.json is damaged: {name} is "
    with pytest.raises(InvalidDataset, match=message):
        load(own[1])


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00\x01", b"\x89PNG\r\n\x1a\n", b"[" * 100_000, b'{"format": 1', b"5"]
)
def test_a_recipe_that_is_no_json(own: tuple[Path, Path], content: bytes) -> None:
    (own[1] / "precompute.json").write_bytes(content)
    with pytest.raises(InvalidDataset, match=r"dst: (its precompute.json is not JSON|format None)"):
        load(own[1])


WRONG_ENTRIES = [
    ("samples", "2"), ("samples", -1), ("samples", 2.0), ("samples", None), ("samples", True), ("bytes", "9"),
    ("sha256", 5), ("settings", None), ("shard", 7), ("shard", "train-000000.tar"), ("skipped", None),
    ("skipped", ["0001"]), ("skipped", [{"key": 1, "reason": "x"}]), ("skipped", [{"key": "1"}]),
    ("source", "a.tar"),
    ("source", {"name": 5, "bytes": 1, "sha256": ""}), ("source", {"name": "a.tar"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG_ENTRIES)
def test_manifest_entries_of_wrong_types_are_named(own: tuple[Path, Path], name: str, value: Any) -> None:
    edited(own[1], f"manifest/{NAMES[1]}.json", **{name: value})
    with pytest.raises(InvalidDataset, match=r"manifest/train-000001.tar.json cannot be read: .*precompute again"):
        load(own[1], source=own[0])


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b'{"shard": "train-0000', b"5", b"null"])
def test_a_manifest_entry_that_is_no_json(own: tuple[Path, Path], content: bytes) -> None:
    (own[1] / "manifest" / f"{NAMES[1]}.json").write_bytes(content)
    with pytest.raises(InvalidDataset, match=r"manifest/train-000001.tar.json cannot be read"):
        load(own[1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "damaged: Expecting"),
        (b"\xff\xfe", "views.json is damaged"),
        (b"[" * 100_000, "views.json is damaged"),
        (b"[]", "must be a list of 3 crops"),
        (b"[{}, {}, {}]", "must be a list of 3 crops"),  # it was read as "no random crop", so x was another picture
        (b"{}", "must be a list of 3 crops"),
        (b'[{"box": "all", "size": [16, 16], "flip": false}]', "must be a list of 3 crops"),
        (
            b"[" + b", ".join([b'{"box": "all", "size": [16, 16], "flip": false}'] * 3) + b"]",
            "ValueError: not enough values",
        ),
    ],
)
def test_a_damaged_views_json_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    def damaged(number: int, x: Image.Image) -> dict[str, Any]:
        return {**three_views(number, x), "views.json": content}

    src, dst = write_pair(tmp_path, NAMES[:1], 1, damaged, augment=3)
    with pytest.raises(InvalidDataset, match=rf"train-000000.tar, sample 0000: .*{message}"):
        list(load(dst, source=src))


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros((4, 5), np.float32), r"float32 \[4, 5\]"),
        (np.zeros((4, 5), np.int64), r"int64 \[4, 5\]"),
        (np.zeros((1, 4, 5), np.uint16), r"uint16 \[1, 4, 5\]"),
        (np.zeros((), np.uint16), r"uint16 \[\]"),
    ],
)
def test_tokens_that_are_no_tokens(tmp_path: Path, array: np.ndarray, found: str) -> None:
    _, dst = write_pair(tmp_path, NAMES[:1], 1, lambda *_: {"png": b"", "indices.npy": npy(array)})
    with pytest.raises(InvalidDataset, match=rf"sample 0000: .*holds {found}, must be uint16 \[h,w\]"):
        list(load(dst, tokens=True))


@pytest.mark.parametrize("label", [b"9" * 20, b"9" * 5000, b"9223372036854775808", b"1.0", b"", b"one"])
def test_a_label_that_is_no_integer_of_64_bits(tmp_path: Path, label: bytes) -> None:
    _, dst = write_pair(tmp_path, NAMES[:1], 1, lambda n, x: {**one_view(n, x), "class": label})
    with pytest.raises(InvalidDataset, match=r"sample 0000: class is b'.*', must be an integer to be the label"):
        load(dst, label="class")


def test_a_dataset_of_no_samples(tmp_path: Path) -> None:
    _, dst = write_pair(tmp_path, NAMES[:1], 1, one_view, skipped=[0])
    with pytest.raises(InvalidDataset, match="its 1 shards hold no sample"):
        load(dst)
