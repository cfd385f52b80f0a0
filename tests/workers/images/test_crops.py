"""Pictures are found in shards, folders and single files."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from dat_workers.errors import InvalidInput
from dat_workers.images.crops import centre_crops, encoded_pictures
from dat_workers.images.encoded import encode_png


def png(level: int) -> bytes:
    return encode_png(np.full((3, 12, 16), level, np.uint8))


def write_shard(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


MEMBERS = {"b.png": png(1), "b.cls": b"7", "b.seg.PNG": png(2), "._b.png": b"of macOS", "a/a.png": png(3)}


@pytest.mark.parametrize(("name", "mode"), [("s.tar", "w"), ("s.tar.gz", "w:gz")])
def test_pictures_of_a_shard_come_in_its_order(tmp_path: Path, name: str, mode: str) -> None:
    shard = write_shard(tmp_path / name, MEMBERS, mode)
    assert list(encoded_pictures(shard)) == [("b.png", png(1)), ("b.seg.png", png(2)), ("a/a.png", png(3))]
    assert centre_crops([shard], 8, limit=2)[:, 0, 0, 0].tolist() == [1, 2]


def test_pictures_of_a_folder_come_by_name(tmp_path: Path) -> None:
    for name in ("b.png", "a.PNG", "notes.txt"):
        (tmp_path / name).write_bytes(png(len(name)))
    assert [name for name, _ in encoded_pictures(tmp_path)] == ["a.PNG", "b.png"]
    assert [name for name, _ in encoded_pictures(tmp_path / "b.png")] == ["b.png"]


def test_a_damaged_shard_is_refused_by_name(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", MEMBERS)
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(InvalidInput, match="a whole tar shard") as caught:
        list(encoded_pictures(shard))
    assert caught.value.field == str(shard)
    with pytest.raises(FileNotFoundError):
        list(encoded_pictures(tmp_path / "absent.tar"))
