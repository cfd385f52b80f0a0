from __future__ import annotations

import gzip
import pickle
import tarfile
from pathlib import Path

import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from dat_client.dataset_format.tar_samples import DamagedShard, Sample, samples_in_tar
from tests.workers.precompute.shards import sample_files, write_shards, write_tar


def read(path: Path) -> list[Sample]:
    with path.open("rb") as file:
        return list(samples_in_tar(file))


def read_damaged(path: Path) -> tuple[list[str], DamagedShard]:
    keys = []
    with path.open("rb") as file:
        with pytest.raises(DamagedShard) as caught:  # noqa: PT012 - the samples before the damage count
            for sample in samples_in_tar(file):
                keys.append(sample.key)
        assert not file.read()  # so that the whole file can be hashed
    return keys, caught.value


def test_a_damaged_shard_is_named_across_processes() -> None:
    error = DamagedShard("damaged shard: truncated header", "0004")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.key) == (DamagedShard, "damaged shard: truncated header", "0004")


def test_samples_are_those_that_webdataset_reads(tmp_path: Path) -> None:
    files = [
        ("a.b/c.d/one.JPG", b"1"),
        ("a.b/c.d/one.seg.png", b"2"),
        ("./two.cls", b"3"),
        ("three", b"no field"),
        ("two.v1.png", b"4"),
        ("two.v2.png", b"5"),
        ("__info__", b"metadata"),
        ("__info__/six.png", b"metadata"),
    ]
    path = write_tar(tmp_path / "x.tar", files)
    with path.open("rb") as stream:
        expected = [
            {name: data for name, data in sample.items() if not name.startswith("__")} | {"key": sample["__key__"]}
            for sample in group_by_keys(tar_file_expander([{"stream": stream, "url": str(path)}]))
        ]
    assert [sample.fields | {"key": sample.key} for sample in read(path)] == expected
    assert len(expected) == 3


def test_files_that_begin_with_a_dot_are_no_samples(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a/._one.png", b"added by macOS"), ("a/.two", b""), *sample_files(0)])
    assert [sample.key for sample in read(path)] == ["0000"]


def test_compressed_and_empty_archives(tmp_path: Path) -> None:
    path = write_shards(tmp_path, 1, 2) / "train-000000.tar"
    packed = tmp_path / "packed.tar.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert [sample.key for sample in read(packed)] == ["0000", "0001"]
    assert read(write_tar(tmp_path / "empty.tar", [])) == []


@pytest.mark.parametrize("left", [0, 1, 100, 512, 700, 3000, -20 * 512])
def test_an_archive_that_was_cut_off_is_damaged_wherever(tmp_path: Path, left: int) -> None:
    whole = write_shards(tmp_path, 1, 3) / "train-000000.tar"
    cut_path = tmp_path / "cut.tar"
    cut_path.write_bytes(whole.read_bytes()[:left])
    keys, error = read_damaged(cut_path)
    assert keys == ["0000", "0001", "0002"][: len(keys)]
    assert error.key not in keys
    assert "damaged shard" in str(error)


def test_cut_between_two_files_it_would_look_whole(tmp_path: Path) -> None:
    whole = write_shards(tmp_path, 1, 3) / "train-000000.tar"
    with tarfile.open(whole) as tar:
        ends = [member.offset for member in tar][4]  # the third sample's picture would come next
    cut_path = tmp_path / "cut.tar"
    cut_path.write_bytes(whole.read_bytes()[:ends])
    with tarfile.open(cut_path) as tar:
        assert len(tar.getnames()) == 4  # tarfile does not notice
    keys, error = read_damaged(cut_path)
    assert keys == ["0000"]
    assert error.key == "0001"
    assert "empty header" in str(error)


@pytest.mark.parametrize("at", [0, 100, 156])
@pytest.mark.parametrize("member", [1, 2, 3])
def test_an_invalid_header_is_damage(tmp_path: Path, member: int, at: int) -> None:
    whole = write_shards(tmp_path, 1, 3) / "train-000000.tar"
    with tarfile.open(whole) as tar:
        start = [found.offset for found in tar][member]
    content = bytearray(whole.read_bytes())
    cut_path = tmp_path / "cut.tar"
    cut_path.write_bytes(content[: start + 100])
    keys, error = read_damaged(cut_path)
    assert keys == ["0000"][: (member + 1) // 2 - 1]
    assert error.key == f"{(member - 1) // 2:04d}"
    content[start + at] ^= 0x55
    cut_path.write_bytes(content)
    assert read_damaged(cut_path)[0] == keys


def test_two_archives_one_after_the_other_are_not_taken_for_one(tmp_path: Path) -> None:
    whole = write_shards(tmp_path, 1, 3) / "train-000000.tar"
    both = tmp_path / "both.tar"
    both.write_bytes(whole.read_bytes() * 2)
    assert "something after the end" in str(read_damaged(both)[1])


def test_a_field_beyond_the_limit_is_a_problem_of_its_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dat_client.dataset_format.tar_samples.MAX_FIELD_BYTES", 100)
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"x" * 101), ("a.cls", b"1"), ("b.jpg", b"x" * 100)])
    assert [sample.problem for sample in read(path)] == ["the field jpg has more than 100 bytes", ""]


def test_other_files_are_damaged_archives(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"<html>404</html>" * 100)
    assert read_damaged(tmp_path / "x.tar")[0] == []
    packed = tmp_path / "y.tar.gz"
    whole = gzip.compress((write_shards(tmp_path / "z", 1, 3) / "train-000000.tar").read_bytes())
    packed.write_bytes(whole[: len(whole) // 2])
    keys, _ = read_damaged(packed)
    assert len(keys) < 3
