from __future__ import annotations

import hashlib
from pathlib import Path

from dat_workers.sources.find import find
from dat_workers.sources.reader import ShardReader, source_sha256
from tests.workers.precompute.shards import sample_files, write_shards, write_tar


def test_the_source_is_counted_as_it_is_read(tmp_path: Path) -> None:
    path = write_shards(tmp_path, 1, 4) / "train-000000.tar"
    reader = ShardReader(find(str(path)).shards[0])
    assert [sample.key for sample in reader] == ["0000", "0001", "0002", "0003"]
    assert reader.nbytes == path.stat().st_size
    assert reader.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() == source_sha256(reader.shard)


def test_keys_and_fields_that_come_twice_are_problems(tmp_path: Path) -> None:
    files = [*sample_files(0), *sample_files(1), *sample_files(0)[:1], *sample_files(2), *sample_files(2)[:1]]
    (shard,) = find(str(write_tar(tmp_path / "x.tar", files))).shards
    problems = {(i, s.key): s.problem for i, s in enumerate(ShardReader(shard))}
    assert problems == {
        (0, "0000"): "",
        (1, "0001"): "",
        (2, "0000"): "the key was there before in this shard",
        (3, "0002"): "the field png is there twice",
    }


def test_pictures_of_a_folder_are_samples_and_those_that_cannot_be_read_are_problems(tmp_path: Path) -> None:
    for name in ("tabby/1.x.PNG", "acorn/2.jpg", "acorn/3.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    found = find(str(tmp_path))
    (tmp_path / "acorn" / "3.jpg").unlink()
    reader = ShardReader(found.shards[0], found.classes)
    assert [(sample.key, sample.fields) for sample in reader] == [
        ("acorn/2", {"jpg": b"acorn/2.jpg", "cls": b"0"}),
        ("acorn/3", {}),
        ("tabby/1_x", {"png": b"tabby/1.x.PNG", "cls": b"1"}),
    ]
    assert [bool(sample.problem) for sample in reader] == [False, True, False]
    assert hashlib.sha256(b"acorn/2.jpgtabby/1.x.PNG").hexdigest() == source_sha256(found.shards[0])
