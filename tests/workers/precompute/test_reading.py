"""`dat_client.webdataset` reads what `dat precompute` wrote, and the service decodes its tokens."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dat_client import Client, InvalidDataset
from dat_client.webdataset import load
from dat_client.webdataset.originals import _pictures_of
from dat_workers.engines.config import EngineConfig
from dat_workers.precompute import SampleFailed, precompute
from tests.workers.precompute.shards import as_array, encoded, picture, sample_files, write_shards, write_tar

ONE_THREAD = EngineConfig(threads=1)


def items(dst: Path, **options: Any) -> list[Any]:
    return list(load(str(dst), **options))


def test_pairs_of_x_and_its_reconstruction(tmp_path: Path) -> None:
    source, dst = write_shards(tmp_path / "src", 2, 3), tmp_path / "dst"
    precompute(str(source), str(dst), codec="identity", crop=32, picture="png", outputs=["reconstruction", "image"])
    for options in ({"image": True}, {"source": str(source)}):
        found = items(dst, **options)
        assert [label for _, _, label in found] == list(range(6))
        for number, (x, q, _) in enumerate(found):
            image = picture(number)
            left, top = round((image.width - 32) / 2), round((image.height - 32) / 2)
            expected = as_array(encoded(image.crop((left, top, left + 32, top + 32))))
            assert np.array_equal(x.numpy(), expected)
            assert np.array_equal(q.numpy(), expected)  # identity, without loss
    batches = list(DataLoader(load(str(dst), shuffle=10), batch_size=2, num_workers=2))
    assert sorted(label for _, labels in batches for label in labels.tolist()) == list(range(6))


def test_x_from_compressed_shards_and_from_pictures_beside_others(tmp_path: Path) -> None:
    files = [("0.v1.png", encoded(picture(0))), ("0.cls", b"0"), ("1.png", encoded(picture(1)))]
    files += [("1.seg.png", encoded(picture(3))), ("1.cls", b"1")]  # the picture is the one with the plainest name
    whole = write_tar(tmp_path / "a.tar", files)
    packed = tmp_path / "src" / "part" / "a.tar.gz"
    packed.parent.mkdir(parents=True)
    packed.write_bytes(gzip.compress(whole.read_bytes()))
    dst = tmp_path / "dst"
    precompute(str(tmp_path / "src"), str(dst), codec="identity", picture="png", keep=["cls"])
    (tmp_path / "src").rename(tmp_path / "moved")
    for source in ("moved", "moved/*/*.tar.gz", "moved/{no,part}/a.tar.gz"):
        found = items(dst, source=f"{tmp_path}/{source}")
        assert [label for _, _, label in found] == [0, 1]
        for number, (x, q, _) in enumerate(found):
            assert np.array_equal(x.numpy(), as_array(encoded(picture(number))))
            assert np.array_equal(q.numpy(), x.numpy())


@pytest.mark.parametrize("name", ["a.TAR.GZ", "a", "[2012] a.tar"])
def test_x_from_shards_of_any_name(tmp_path: Path, name: str) -> None:
    source = tmp_path / "[x] *" / name
    write_tar(source, sample_files(0))
    precompute(str(source), str(tmp_path / "dst"), codec="identity", picture="png")
    for address in (source.parent, source):
        ((x, q, _),) = items(tmp_path / "dst", source=str(address))
        assert torch.equal(x, q)


@pytest.mark.parametrize("workers", [0, 2])
def test_x_from_a_folder_of_pictures(tmp_path: Path, workers: int) -> None:
    for number, name in enumerate(("a/0.png", "a/1.x.PNG", "b/c/2.png", "b/3.png")):
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(number)))
    dst = tmp_path / "dst"
    precompute(
        str(tmp_path / "src"), str(dst), codec="identity", picture="png", crop=32, augment=2, pictures_a_shard=2
    )
    data = load(str(dst), source=str(tmp_path / "src"), view="all", shuffle=3)
    found = list(DataLoader(data, batch_size=None, num_workers=workers))
    assert sorted(label for _, _, label in found) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert all(torch.equal(x, q) for x, q, _ in found)
    (tmp_path / "src" / "b" / "._3.png").write_bytes(b"what macOS adds")
    assert len(items(dst, source=str(tmp_path / "src"))) == 4
    (tmp_path / "src" / "b" / "3.jpg").write_bytes(b"x")
    _pictures_of.cache_clear()
    with pytest.raises(InvalidDataset, match=r"2 files of .*/src/b have the key b/3, and 0 of them are listed"):
        items(dst, source=str(tmp_path / "src"))
    (tmp_path / "src" / "b" / "3.jpg").unlink()
    (tmp_path / "src" / "b" / "3.png").unlink()
    _pictures_of.cache_clear()
    with pytest.raises(InvalidDataset, match=r"sample b/3 is not in .*/src"):
        items(dst, source=str(tmp_path / "src"))


def test_crops_are_cut_from_the_source_again(tmp_path: Path) -> None:
    source, dst = write_shards(tmp_path / "src", 2, 3, side=60), tmp_path / "dst"
    precompute(str(source), str(dst), codec="identity", crop=32, augment=3, picture="png")
    found = items(dst, source=str(source), view="all")
    assert len(found) == 18
    for x, q, _ in found:
        assert np.array_equal(x.numpy(), q.numpy())


def test_variants_are_views(tmp_path: Path) -> None:
    source, dst = write_shards(tmp_path / "src", 1, 2), tmp_path / "dst"
    options: dict[str, Any] = {"replace_fraction": 0.5, "variants": 2, "crop": 40, "picture": "png"}
    precompute(str(source), str(dst), codec="tiny-f8", engine_config=ONE_THREAD, **options)
    found = items(dst, source=str(source), view="all")
    assert len(found) == 4
    assert np.array_equal(found[0][0].numpy(), found[1][0].numpy())
    assert not np.array_equal(found[0][1].numpy(), found[1][1].numpy())


def test_tokens_decoded_by_the_service_are_its_own_pictures(tmp_path: Path, serve_app: Callable[..., str]) -> None:
    source, dst = write_shards(tmp_path / "src", 1, 4), tmp_path / "dst"
    precompute(str(source), str(dst), codec="tiny-f8", engine_config=ONE_THREAD, crop=40, outputs=["indices"])
    (images, tokens, _), *_ = DataLoader(load(str(dst), tokens=True, source=str(source)), batch_size=4)
    with Client(serve_app(codec="tiny-f8", threads=1), "tiny-f8") as client:
        q = client.discretize(images, outputs=["reconstruction", "indices"])
        assert torch.equal(q.indices, tokens)
        assert torch.equal(client.decode(tokens, output_dtype="UINT8"), q.reconstruction)


def test_a_folder_that_is_not_whole_is_read_as_far_as_it_is(tmp_path: Path) -> None:
    source, dst = write_shards(tmp_path / "src", 3, 2), tmp_path / "dst"
    precompute(str(source), str(dst), codec="identity", picture="png")
    (dst / "manifest" / "train-000001.tar.json").unlink()
    assert [label for _, label in items(dst)] == [0, 1, 4, 5]


@pytest.mark.parametrize("codec", ["identity", "tiny-f8"])
def test_skipped_samples_keep_pairs_together(tmp_path: Path, codec: str) -> None:
    files = [*sample_files(0), ("bad.png", b"no picture"), ("bad.cls", b"9"), ("__info__/2.png", b"metadata")]
    files += [*sample_files(3)[:1] * 2, *sample_files(1), *sample_files(0), *sample_files(2)]
    source = write_tar(tmp_path / "src" / "a.tar", files)
    precompute(str(source), str(tmp_path / "dst"), codec=codec, engine_config=ONE_THREAD, skip=True, picture="png")
    found = items(tmp_path / "dst", source=str(source.parent))
    assert [label for _, _, label in found] == [0, 1, 2]
    for number, (x, _, _) in enumerate(found):
        assert np.array_equal(x.numpy(), as_array(encoded(picture(number))))


def test_sources_that_are_links_of_a_hubs_cache_are_found_again(tmp_path: Path) -> None:
    snapshot = tmp_path / "cache" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for number in range(2):
        blob = write_tar(tmp_path / "cache" / "blobs" / f"{number}fa5", sample_files(number))
        (snapshot / f"train-{number:06d}.tar").symlink_to(f"../../blobs/{blob.name}")
    sources = [snapshot / f"train-{number:06d}.tar" for number in range(2)]
    precompute(sources, tmp_path / "dst", codec="identity", picture="png", engine_config=ONE_THREAD)
    assert sorted(path.name for path in (tmp_path / "dst").glob("*.tar")) == [path.name for path in sources]
    for source in (snapshot, f"{snapshot}/*.tar"):
        found = items(tmp_path / "dst", source=str(source))
        assert [label for _, _, label in found] == [0, 1]
        for number, (x, q, _) in enumerate(found):
            assert np.array_equal(x.numpy(), as_array(encoded(picture(number))))
            assert np.array_equal(q.numpy(), x.numpy())


def test_pictures_whose_names_mean_something_in_addresses(tmp_path: Path) -> None:
    names = ("b::c/a::b.png", "p%20q/{0..1}.png", "z#1/x#2?[3].png")
    for number, name in enumerate(names):
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(encoded(picture(number)))
    precompute(tmp_path / "src", tmp_path / "dst", codec="identity", picture="png")
    found = items(tmp_path / "dst", source=tmp_path / "src")
    assert [label for _, _, label in found] == [0, 1, 2]
    for number, (x, q, _) in enumerate(found):
        assert np.array_equal(x.numpy(), as_array(encoded(picture(number))))
        assert np.array_equal(q.numpy(), x.numpy())


def test_a_class_that_readers_of_shards_pass_over_is_not_written(tmp_path: Path) -> None:
    for number, name in enumerate(("__cat__/0.png", "dog/__1__.png")):
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(encoded(picture(number)))
    with pytest.raises(SampleFailed, match=r"sample __cat__/0: readers of shards pass over names such as __cat__/"):
        precompute(tmp_path / "src", tmp_path / "dst", codec="identity", picture="png")
    summary = precompute(tmp_path / "src", tmp_path / "dst", codec="identity", picture="png", skip=True)
    assert (summary.samples, [key for _, key, _ in summary.skipped_first]) == (1, ["__cat__/0"])
    ((x, q, label),) = items(tmp_path / "dst", source=tmp_path / "src")
    assert (torch.equal(x, q), label) == (True, 1)
