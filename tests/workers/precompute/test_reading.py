"""What `dat precompute` wrote, read by `dat_client.webdataset` and decoded by the service."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from dat_client import Client
from dat_client.webdataset import load
from dat_workers.precompute import precompute
from tests.workers.precompute.shards import as_array, encoded, picture, sample_files, write_shards, write_tar


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
            wanted = as_array(encoded(image.crop((left, top, left + 32, top + 32))))
            assert np.array_equal(x.numpy(), wanted)
            assert np.array_equal(q.numpy(), wanted)  # identity, without loss
    batches = list(DataLoader(load(str(dst), shuffle=10), batch_size=2, num_workers=2))
    assert sorted(label for _, labels in batches for label in labels.tolist()) == list(range(6))


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
    precompute(str(source), str(dst), codec="tiny-f8", threads=1, **options)
    found = items(dst, source=str(source), view="all")
    assert len(found) == 4
    assert np.array_equal(found[0][0].numpy(), found[1][0].numpy())
    assert not np.array_equal(found[0][1].numpy(), found[1][1].numpy())


def test_tokens_decoded_by_the_service_are_its_own_pictures(tmp_path: Path, serve_app: Callable[..., str]) -> None:
    source, dst = write_shards(tmp_path / "src", 1, 4), tmp_path / "dst"
    precompute(str(source), str(dst), codec="tiny-f8", threads=1, crop=40, outputs=["indices"])
    found = items(dst, tokens=True, source=str(source))
    images, tokens = (np.stack([item[i].numpy() for item in found]) for i in (0, 1))
    with Client(serve_app(codec="tiny-f8", threads=1), "tiny-f8") as client:
        q = client.discretize(images, outputs=["reconstruction", "indices"])
        assert np.array_equal(q.indices, tokens)
        assert np.array_equal(client.decode(tokens), q.reconstruction)


def test_a_folder_that_is_not_whole_is_read_as_far_as_it_is(tmp_path: Path) -> None:
    source, dst = write_shards(tmp_path / "src", 3, 2), tmp_path / "dst"
    precompute(str(source), str(dst), codec="identity", picture="png")
    (dst / "manifest" / "train-000001.tar.json").unlink()
    assert [label for _, label in items(dst)] == [0, 1, 4, 5]


@pytest.mark.parametrize("codec", ["identity", "tiny-f8"])
def test_skipped_samples_keep_pairs_together(tmp_path: Path, codec: str) -> None:
    files = [*sample_files(0), ("bad.png", b"no picture"), ("bad.cls", b"9"), *sample_files(1)]
    source = write_tar(tmp_path / "src" / "a.tar", files)
    precompute(str(source), str(tmp_path / "dst"), codec=codec, threads=1, skip=True, picture="png")
    found = items(tmp_path / "dst", source=str(source.parent))
    assert [label for _, _, label in found] == [0, 1]
    for number, (x, _, _) in enumerate(found):
        assert np.array_equal(x.numpy(), as_array(encoded(picture(number))))
