"""Pictures are found in shards, folders and single files, by the rule of `dat precompute`."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from dat_client.dataset_format.left_out import LeftOut
from dat_workers.errors import InvalidInput
from dat_workers.images.crops import UNUSABLE, PictureReader, centre_crops
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


def levels(sources: str | Path | list[str | Path], **options: bool) -> list[int]:
    """The grey level of each picture, in the order in which they are read."""
    return [int(picture[0, 0, 0]) for _, picture in PictureReader(sources, **options)]


MEMBERS = {"b.png": png(1), "b.cls": b"7", "b.seg.PNG": png(2), "._b.png": b"of macOS", "a/a.png": png(3)}


@pytest.mark.parametrize(("name", "mode"), [("s.tar", "w"), ("s.tar.gz", "w:gz"), ("s.tgz", "w:gz")])
def test_pictures_of_a_shard_come_in_its_order(tmp_path: Path, name: str, mode: str) -> None:
    shard = write_shard(tmp_path / name, MEMBERS, mode)
    reader = PictureReader(shard)
    assert [(place.rpartition("sample ")[2], int(x[0, 0, 0])) for place, x in reader] == [("b", 1), ("a/a", 3)]
    left = f"file://{shard}: ._b.png"
    assert reader.left_out.rows == (("names that begin with a dot are not read", 1, (left,)),)
    assert centre_crops(shard, 8, limit=1)[:, 0, 0, 0].tolist() == [1]


def test_folders_of_shards_globs_braces_and_single_pictures_are_read(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for number in range(3):
        write_shard(tmp_path / "deep" / f"{number}.tar", {"x.png": png(number)})
    assert levels(tmp_path) == levels(f"{tmp_path}/deep/*.tar") == [0, 1, 2]
    assert levels(f"{tmp_path}/deep/{{2,0}}.tar") == [2, 0]
    (tmp_path / "one.png").write_bytes(png(9))
    assert levels([tmp_path / "one.png", f"{tmp_path}/deep/1.tar"]) == [9, 1]


def test_pictures_of_a_folder_come_by_name_at_any_depth(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for name in ("b.png", "a.PNG", "notes.txt", "below/c.png"):
        (tmp_path / name).write_bytes(png(len(name)))
    reader = PictureReader(tmp_path)
    assert [place.rpartition(" ")[2] for place, _ in reader] == ["a", "b", "below/c"]
    assert reader.left_out.rows == ((".txt files are not read", 1, (f"{tmp_path}/notes.txt",)),)


def test_pictures_that_are_not_usable_are_errors_or_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "b.png").write_bytes(png(5))
    with pytest.raises(InvalidInput, match=r"sample a: png: 10 bytes .* --on-error skip \(skip=True\) leaves"):
        levels(tmp_path)
    reader = PictureReader(tmp_path, skip=True)
    for _ in range(2):  # a second pass counts nothing twice
        assert [int(x[0, 0, 0]) for _, x in reader] == [5]
    ((reason, count, names),) = reader.left_out.rows
    assert (reason, count) == (UNUSABLE, 1)
    assert "sample a: png: 10 bytes" in names[0]
    (tmp_path / "b.png").unlink()
    with pytest.raises(InvalidInput, match="pictures that are usable"):
        centre_crops(tmp_path, 8, skip=True)


def test_what_is_left_out_is_known_before_a_shard_is_read_to_its_end(tmp_path: Path) -> None:
    for name, content in {"a.png": b"no picture", "b.png": png(1), "c.png": png(2)}.items():
        (tmp_path / name).write_bytes(content)
    reader = PictureReader(tmp_path, skip=True)
    stream = iter(reader)
    next(stream)
    assert [(reason, count) for reason, count, _ in reader.left_out.rows] == [(UNUSABLE, 1)]
    left_out = LeftOut()
    assert centre_crops(tmp_path, 8, limit=1, skip=True, left_out=left_out)[:, 0, 0, 0].tolist() == [1]
    assert left_out.total == 1


def test_a_damaged_shard_is_refused_by_name(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", MEMBERS)
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(InvalidInput, match="damaged shard") as caught:
        levels(shard)
    assert caught.value.field == f"file://{shard}"
    with pytest.raises(FileNotFoundError):
        levels(tmp_path / "absent.tar")
