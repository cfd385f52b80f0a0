from __future__ import annotations

import errno
import hashlib
import os
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest

from dat_client.dataset_format.manifest import ManifestEntry
from dat_workers.precompute.output_folder import OtherRecipe, OutputFolder
from dat_workers.precompute.recipe import Recipe
from dat_workers.sources.folders import Shard
from tests.workers.precompute.shards import contents, read_tar

RECIPE = Recipe("c", "f" * 64)
BYTES = 1000
SHARD = Shard("a/train-0.tar", "memory://source/a/train-0.tar", BYTES)


@pytest.fixture(autouse=True)
def source() -> Iterator[None]:
    """The source of SHARD."""
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/source/a/train-0.tar", bytes(BYTES))
    yield
    fs.rm("/source", recursive=True)


@pytest.fixture(params=["local", "memory"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "dst") if request.param == "local" else f"memory://{tmp_path}/dst"


def write(folder: OutputFolder, name: str = SHARD.name, recipe: Recipe = RECIPE) -> ManifestEntry:
    with folder.writing(name) as out:
        out.add("k", {"jpg": b"picture", "cls": b"7"})
    source = (SHARD.address, BYTES, hashlib.sha256(bytes(BYTES)).hexdigest())
    entry = ManifestEntry(name, out.samples, out.nbytes, out.sha256, recipe.id, (("x", "bad"),), source)
    folder.record(entry)
    return entry


def test_a_shard_is_done_when_entry_recipe_source_and_file_agree(address: str) -> None:
    folder = OutputFolder(address)
    folder.begin()
    folder.settle_recipe(RECIPE, [SHARD])
    assert folder.finished_entry(SHARD, RECIPE) is None
    entry = write(folder)
    assert folder.finished_entry(SHARD, RECIPE, hashes=True) == entry
    assert folder.finished_entry(replace(SHARD, nbytes=999), RECIPE) is None
    assert folder.finished_entry(SHARD, Recipe("c", "e" * 64)) is None
    fsspec.filesystem("memory").pipe_file("/source/a/train-0.tar", b"x" * BYTES)
    assert folder.finished_entry(SHARD, RECIPE) == entry
    assert folder.finished_entry(SHARD, RECIPE, hashes=True) is None
    fsspec.filesystem("memory").pipe_file("/source/a/train-0.tar", bytes(BYTES))
    assert folder.finished_entry(SHARD, RECIPE, hashes=True) == entry
    folder.fs.pipe_file(folder.at(SHARD.name), b"x" * entry.nbytes)
    assert folder.finished_entry(SHARD, RECIPE) == entry
    assert folder.finished_entry(SHARD, RECIPE, hashes=True) is None
    folder.fs.pipe_file(folder.at(SHARD.name), b"x")
    assert folder.finished_entry(SHARD, RECIPE) is None
    folder.fs.rm_file(folder.at(SHARD.name))
    assert folder.finished_entry(SHARD, RECIPE) is None
    assert list(folder.entries()) == [entry]
    folder.end()


def test_an_entry_that_cannot_be_read_is_none(address: str) -> None:
    folder = OutputFolder(address)
    folder.begin()
    write(folder)
    half = b'{"skipped": [], "bytes": 1, "source": {"name": "x", "bytes": 1}}'
    for text in (b"", b"{", b"[]", b"{}", b'{"skipped": 3}', half):
        folder.fs.pipe_file(folder.at(f"manifest/{SHARD.name}.json"), text)
        assert folder.entry(SHARD.name) is None
    folder.end()


def test_temporary_files_in_the_manifest_are_not_shards(address: str) -> None:
    folder = OutputFolder(address)
    folder.begin()
    write(folder)
    folder.fs.pipe_file(folder.at("manifest/.0a1b2c3d"), b"")  # how another job tries whether it may write
    assert folder.shard_names() == {SHARD.name}
    folder.end()


def test_a_shard_is_bytes_of_its_samples_alone(tmp_path: Path) -> None:
    folder = OutputFolder(str(tmp_path / "dst"))
    folder.begin()
    entry = write(folder)
    again = write(folder, "b.tar")
    assert entry.sha256 == again.sha256
    assert read_tar(tmp_path / "dst" / SHARD.name) == {"k.jpg": b"picture", "k.cls": b"7"}
    long = "d/" * 300 + "k"
    with folder.writing("long.tar") as out:
        out.add(long, {"jpg": b"1"})
    with tarfile.open(tmp_path / "dst" / "long.tar") as tar:
        assert tar.getnames() == [f"{long}.jpg"]
    folder.end()
    assert set(contents(tmp_path / "dst")) == {SHARD.name, "b.tar", "long.tar"} | {
        f"manifest/{name}.json" for name in (SHARD.name, "b.tar")
    }


def test_an_error_leaves_nothing_and_the_old_file_as_it_was(address: str) -> None:
    folder = OutputFolder(address)
    folder.begin()
    old = write(folder)

    def fail() -> None:
        with folder.writing(SHARD.name) as out:
            out.add("other", {"jpg": b"half"})
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fail()
    assert folder.finished_entry(SHARD, RECIPE, hashes=True) == old
    folder.end()
    assert not [path for path in folder.fs.find(folder.path) if ".precompute-" in path]


def test_another_recipe_is_refused_unless_overwritten(address: str) -> None:
    folder = OutputFolder(address)
    folder.begin()
    folder.settle_recipe(RECIPE, [SHARD])
    folder.settle_recipe(RECIPE, [SHARD])
    old, another_recipe = write(folder), replace(RECIPE, quality=80)
    with pytest.raises(OtherRecipe, match=r"quality: 95, now 80.*--overwrite"):
        folder.settle_recipe(another_recipe, [SHARD])
    assert folder.recipe() == RECIPE
    new = write(folder, "new.tar", another_recipe)
    folder.settle_recipe(another_recipe, [SHARD], overwrite=True)
    assert folder.recipe() == another_recipe
    assert list(folder.entries()) == [new]
    assert not folder.has(old.shard)
    folder.fs.pipe_file(folder.at("precompute.json"), b"not ours")
    with pytest.raises(OtherRecipe, match="not written by this version of dat"):
        folder.settle_recipe(another_recipe, [SHARD])
    folder.end()


def test_foreign_files_are_not_overwritten(address: str) -> None:
    folder = OutputFolder(address)
    folder.begin()
    folder.fs.makedirs(folder.at("a"), exist_ok=True)
    folder.fs.pipe_file(folder.at(SHARD.name), b"photographs")
    with pytest.raises(OtherRecipe, match=r"a/train-0\.tar was not made by dat"):
        folder.settle_recipe(RECIPE, [SHARD])
    assert folder.recipe() is None
    folder.settle_recipe(RECIPE, [SHARD], overwrite=True)
    folder.end()


def test_a_shard_of_another_source_is_not_overwritten(address: str) -> None:
    folder = OutputFolder(address)
    folder.begin()
    folder.settle_recipe(RECIPE, [SHARD])
    write(folder)
    moved = replace(SHARD, address="file:///elsewhere/a/train-0.tar")
    assert folder.finished_entry(moved, RECIPE) is not None
    with pytest.raises(OtherRecipe, match=r"was made of memory://source/a/train-0\.tar, now file:///elsewhere"):
        folder.finished_entry(replace(moved, nbytes=7), RECIPE)
    folder.end()


def test_a_folder_without_shards_takes_any_recipe(address: str) -> None:
    folder = OutputFolder(address)
    folder.begin()
    folder.settle_recipe(RECIPE, [SHARD])
    folder.settle_recipe(replace(RECIPE, quality=80), [SHARD])
    assert folder.recipe() == replace(RECIPE, quality=80)
    folder.end()


def test_nothing_is_overwritten_while_another_job_writes(tmp_path: Path) -> None:
    living = OutputFolder(str(tmp_path))
    living.begin()
    living.settle_recipe(RECIPE, [SHARD])
    second = OutputFolder(str(tmp_path))
    second.begin()
    with pytest.raises(OtherRecipe, match="is being written by another job"):
        second.settle_recipe(replace(RECIPE, quality=80), [SHARD], overwrite=True)
    second.end()
    living.end()


def test_of_two_jobs_that_begin_at_once_one_writes_the_recipe(tmp_path: Path) -> None:
    first, second = OutputFolder(str(tmp_path)), OutputFolder(str(tmp_path))
    first.begin()
    second.begin()
    assert second.recipe() is None  # and now the first one writes it
    first.settle_recipe(RECIPE, [SHARD])
    assert not second._create("precompute.json", b"mine")
    assert second.recipe() == RECIPE
    first.end()
    second.end()


def test_files_of_dead_jobs_go_and_those_of_live_jobs_stay(tmp_path: Path) -> None:
    alive = OutputFolder(str(tmp_path), "alive")
    alive.begin()
    (tmp_path / ".precompute-alive" / "half").write_bytes(b"x")
    (tmp_path / ".precompute-dead").mkdir()
    (tmp_path / ".precompute-dead" / "half").write_bytes(b"x")
    (tmp_path / ".precompute-dead.lock").write_bytes(b"")
    pid = os.fork()  # another process: locks are its own
    if pid == 0:
        folder = OutputFolder(str(tmp_path), "new")
        folder.begin()
        folder.end()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert (tmp_path / ".precompute-alive" / "half").exists()
    assert not list(tmp_path.glob(".precompute-dead*"))
    assert not list(tmp_path.glob(".precompute-new*"))
    alive.end()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        OutputFolder(str(tmp_path / "file" / "dst")).begin()


def test_an_object_store_sees_whole_shards_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = OutputFolder(f"memory://{tmp_path}/dst")
    folder.begin()
    sent: list[tuple[str, int]] = []
    put = type(folder.fs).put_file

    def record(self: Any, local: str, remote: str, **options: Any) -> None:
        sent.append((remote, Path(local).stat().st_size))
        put(self, local, remote, **options)

    monkeypatch.setattr(type(folder.fs), "put_file", record)
    entry = write(folder)
    assert sent == [(folder.at(SHARD.name), entry.nbytes)]
    fsspec.filesystem("memory").rm(str(tmp_path), recursive=True)


def test_a_job_without_a_result_leaves_the_folders_as_they_were(tmp_path: Path) -> None:
    outer = tmp_path / "of" / "this" / "job"
    folder = OutputFolder(str(outer))
    folder.begin()
    folder.end()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "of").mkdir()
    for names in ([], ["notes.txt"]):
        for name in names:
            (outer.parent / name).parent.mkdir(exist_ok=True)
            (outer.parent / name).write_text("mine")
        folder = OutputFolder(str(outer))
        folder.begin()
        folder.end()
        assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == (
            ["of", "of/this", "of/this/notes.txt"] if names else ["of"]
        )
    first, second = OutputFolder(str(outer)), OutputFolder(str(outer))
    first.begin()
    second.begin()
    first.end()  # the second is still writing
    assert (outer / "manifest").is_dir()
    entry = write(second)
    second.end()
    assert entry == OutputFolder(str(outer)).entry(SHARD.name)


def reason_of(folder: OutputFolder, shard: Shard = SHARD, recipe: Recipe = RECIPE, *, hashes: bool = False) -> str:
    assert folder.finished_entry(shard, recipe, hashes=hashes) is None
    return folder.remade[shard.name]


def test_why_a_shard_is_made_again(address: str) -> None:
    folder = OutputFolder(address)
    folder.begin()
    folder.settle_recipe(RECIPE, [SHARD])
    assert folder.finished_entry(SHARD, RECIPE) is None
    assert folder.remade == {}  # it was never there
    entry = write(folder)
    assert reason_of(folder, replace(SHARD, nbytes=999)) == f"its source had {BYTES} bytes and has 999 now"
    assert reason_of(folder, recipe=Recipe("c", "e" * 64)) == "it was made with other settings"
    fsspec.filesystem("memory").pipe_file("/source/a/train-0.tar", b"x" * BYTES)
    assert reason_of(folder, hashes=True) == "the SHA-256 of its source has changed"
    fsspec.filesystem("memory").pipe_file("/source/a/train-0.tar", bytes(BYTES))
    assert folder.finished_entry(SHARD, RECIPE, hashes=True) == entry
    assert folder.remade == {}
    folder.fs.pipe_file(folder.at(SHARD.name), b"x" * entry.nbytes)
    assert reason_of(folder, hashes=True) == "its SHA-256 is not that of its manifest entry"
    folder.fs.pipe_file(folder.at(SHARD.name), b"x")
    assert reason_of(folder) == f"it has 1 bytes, {entry.nbytes} by its manifest entry"
    folder.fs.rm_file(folder.at(SHARD.name))
    assert reason_of(folder) == "it is not there, but its manifest entry is"
    for text in (b"\xff\xfe", b"[" * 100_000, b"5", b'{"shard": "a'):
        folder.fs.pipe_file(folder.at(f"manifest/{SHARD.name}.json"), text)
        assert reason_of(folder).startswith("its manifest entry cannot be read: ")
    folder.end()


@pytest.mark.parametrize("content", [b"", b"\x89PNG", b"[" * 100_000, b'{"format": 1', b'{"format": "1"}', b"7"])
def test_a_damaged_recipe_is_refused_or_replaced(address: str, content: bytes) -> None:
    folder = OutputFolder(address)
    folder.begin()
    folder.settle_recipe(RECIPE, [SHARD])
    write(folder)
    write(folder, "other.tar", Recipe("c", "e" * 64))
    folder.fs.pipe_file(folder.at("precompute.json"), content)
    with pytest.raises(OtherRecipe, match=r"precompute.json was not written by this version of dat: .*--overwrite"):
        folder.settle_recipe(RECIPE, [SHARD])
    folder.settle_recipe(RECIPE, [SHARD], overwrite=True)
    assert folder.recipe() == RECIPE
    assert folder.shard_names() == {SHARD.name}  # the other one was made with other settings
    folder.end()
