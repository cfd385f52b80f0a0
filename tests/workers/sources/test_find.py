from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
import torch

from dat_workers.errors import InvalidInput
from dat_workers.sources.addresses import naming_address
from dat_workers.sources.find import find
from tests.workers.precompute.shards import encoded, picture, write_shards, write_tar


def names(source: str | list[str]) -> list[str]:
    return [shard.name for shard in find(source).shards]


def test_braces_globs_folders_and_lists_name_the_same_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, 3, 1)
    expected = [f"train-{i:06d}.tar" for i in range(3)]
    assert names(f"{tmp_path}/train-{{000000..000002}}.tar") == expected
    assert names(f"{tmp_path}/train-*.tar") == expected
    assert names(str(tmp_path)) == expected
    assert names([f"{tmp_path}/{name}" for name in reversed(expected)]) == expected
    assert names(f"file://{tmp_path}/train-000001.tar") == expected[1:2]


def test_names_are_paths_below_the_common_folder(tmp_path: Path) -> None:
    for name in ("a/0.tar", "b/0.tar", "b/1.tar.gz", "b/.hidden.tar", "b/2.tgz"):
        write_tar(tmp_path / name, [])
    assert names(str(tmp_path)) == ["a/0.tar", "b/0.tar", "b/1.tar", "b/2.tar"]
    assert names(f"{tmp_path}/{{a,b}}/0.tar") == ["a/0.tar", "b/0.tar"]
    write_tar(tmp_path / "one" / "train" / "0.tar", [])
    assert names(str(tmp_path / "one")) == ["train/0.tar"]  # as it will be when there is one/val too


def test_links_are_followed_and_keep_their_names(tmp_path: Path) -> None:
    write_shards(tmp_path / "src", 1, 1)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "linked").symlink_to(tmp_path / "src")
    assert names(str(tmp_path / "folder")) == ["linked/train-000000.tar"]
    (tmp_path / "link").symlink_to(tmp_path / "src")
    (shard,) = find(str(tmp_path / "link")).shards
    assert (shard.name, shard.address) == ("train-000000.tar", f"file://{tmp_path}/link/train-000000.tar")
    # The parent of a link's target is meant, as everywhere in Unix.
    assert find(f"{tmp_path}/folder/linked/../link/train-000000.tar").shards == (shard,)


def test_several_folders_of_pictures_are_not_taken_for_one(tmp_path: Path) -> None:
    for name in ("train/tabby/1.png", "val/tabby/1.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"x")
    for pattern in ("{train,val}", "*"):
        with pytest.raises(InvalidInput, match="folders with shards, if there are several sources"):
            find(f"{tmp_path}/{pattern}")


def test_other_pictures_are_another_origin(tmp_path: Path) -> None:
    for name in ("tabby/1.png", "tabby/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"same")
    (before,) = find(str(tmp_path)).shards
    (tmp_path / "acorn").mkdir()
    (tmp_path / "tabby" / "2.png").rename(tmp_path / "acorn" / "2.png")
    (after,) = find(str(tmp_path)).shards
    assert before.nbytes == after.nbytes
    assert before.origin != after.origin


def test_an_object_store_is_listed_with_its_sizes(tmp_path: Path) -> None:
    tar = write_shards(tmp_path, 1, 1) / "train-000000.tar"
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket-of-sources/train/train-000000.tar", tar.read_bytes())
    (shard,) = find("memory://bucket-of-sources/train").shards
    assert (shard.name, shard.nbytes) == ("train-000000.tar", tar.stat().st_size)


def test_folders_of_pictures_become_classes_and_shards_of_a_number(tmp_path: Path) -> None:
    for name in ("tabby/1.png", "tabby/2.png", "acorn/x.y.png", "acorn/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(picture(0)))
    found = find(str(tmp_path), pictures_a_shard=2)
    assert found.classes == ("acorn", "tabby")
    assert [(s.name, s.files) for s in found.shards] == [
        ("000000.tar", ("acorn/x.y.png", "tabby/1.png")),
        ("000001.tar", ("tabby/2.png",)),
    ]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{tmp}/nothing.tar", "no such shard"),
        ("{tmp}/no-*.tar", "nothing matches"),
        ("{tmp}/train-{{0..1.tar", "braces in pairs"),
        ("{tmp}/empty", "holds neither shards nor pictures"),
        ("no-such-protocol://x", "no-such-protocol"),
    ],
)
def test_other_sources_are_refused(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises((InvalidInput, FileNotFoundError), match=message):
        find(source.replace("{tmp}", str(tmp_path)).replace("{{", "{"))


def test_two_shards_of_one_name_and_loose_pictures_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [])
    write_tar(tmp_path / "a.tar.gz", [])
    with pytest.raises(InvalidInput, match=r"a\.tar.*different names"):
        find(str(tmp_path))
    (tmp_path / "pictures" / "tabby").mkdir(parents=True)
    (tmp_path / "pictures" / "tabby" / "1.png").write_bytes(b"")
    (tmp_path / "pictures" / "loose.png").write_bytes(b"")
    with pytest.raises(InvalidInput, match=r"loose\.png"):
        find(str(tmp_path / "pictures"))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), KeyError("x")])
def test_only_errors_of_storages_become_os_errors(error: Exception) -> None:
    with pytest.raises(type(error)), naming_address("s3://bucket/q"):
        raise error
