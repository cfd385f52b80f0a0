from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import subprocess
import tarfile
from pathlib import Path

import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from dat_client.dataset_format.left_out import LeftOut
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
    for module in (gzip, bz2, lzma):  # packed, tarfile would stop after the first
        both.write_bytes(module.compress(whole.read_bytes()) * 2)
        assert "something after the end" in str(read_damaged(both)[1])
        both.write_bytes(module.compress(whole.read_bytes())[:-4])
        assert "ended before the end-of-stream marker" in str(read_damaged(both)[1])


@pytest.mark.parametrize("at", [5, -3])  # the mark of the first block, and the checksum of the whole
def test_a_damaged_stream_of_bzip2_is_a_damaged_shard(at: int, tmp_path: Path) -> None:
    content = bytearray(bz2.compress((write_shards(tmp_path, 1, 3) / "train-000000.tar").read_bytes()))
    content[at] ^= 1
    packed = tmp_path / "packed.tar.bz2"
    packed.write_bytes(content)
    assert "bzip2: Invalid data stream" in str(read_damaged(packed)[1])


def test_gzip_members_are_read_to_the_last_and_their_checksums_compared(tmp_path: Path) -> None:
    whole = (write_shards(tmp_path, 1, 3) / "train-000000.tar").read_bytes()
    packed = tmp_path / "packed.tar.gz"
    packed.write_bytes(gzip.compress(whole[:1000]) + gzip.compress(whole[1000:]))
    assert [sample.fields["cls"] for sample in read(packed)] == [b"0", b"1", b"2"]
    content = bytearray(gzip.compress(whole, 0))  # stored, so that a label can be changed in its place
    content[content.index(b"0001.cls") + 512] = ord("7")
    packed.write_bytes(content)
    assert "CRC check failed" in str(read_damaged(packed)[1])


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


def write_links(path: Path, members: list[tuple[str, bytes | str, bytes]]) -> Path:
    """Writes files (name, content, tarfile.REGTYPE), links (name, target, type) and other members."""
    with tarfile.open(path, "w") as tar:
        for name, content, kind in members:
            member = tarfile.TarInfo(name)
            member.type = kind
            if isinstance(content, bytes):
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            else:
                member.linkname = content
                tar.addfile(member)
    return path


def test_links_have_the_content_of_their_target(tmp_path: Path) -> None:
    (tmp_path / "tree" / "b").mkdir(parents=True)
    (tmp_path / "tree" / "a.jpg").write_bytes(b"picture")
    (tmp_path / "tree" / "b" / "hard.jpg").hardlink_to(tmp_path / "tree" / "a.jpg")
    (tmp_path / "tree" / "b" / "soft.jpg").symlink_to("../a.jpg")
    subprocess.run(["tar", "-cf", tmp_path / "x.tar", "-C", tmp_path / "tree", "--sort=name", "."], check=True)
    with tarfile.open(tmp_path / "x.tar") as tar:
        assert {member.type for member in tar if not member.isdir()} == {
            tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE,
        }  # fmt: skip
    found = {sample.key: (sample.fields, sample.problem) for sample in read(tmp_path / "x.tar")}
    assert found == {f"./{key}": ({"jpg": b"picture"}, "") for key in ("a", "b/hard", "b/soft")}


def test_links_to_what_is_not_held_are_problems_of_their_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dat_client.dataset_format.tar_samples.HELD_BYTES", 10)
    members: list[tuple[str, bytes | str, bytes]] = [
        ("a.jpg", b"12345", tarfile.REGTYPE),
        ("b.jpg", b"67890", tarfile.REGTYPE),
        ("c.jpg", "a.jpg", tarfile.LNKTYPE),  # 15 bytes: "a.jpg" is forgotten, the copy is held
        ("d.jpg", "a.jpg", tarfile.LNKTYPE),
        ("e.jpg", "c.jpg", tarfile.LNKTYPE),
        ("f.jpg", "../../etc/passwd", tarfile.SYMTYPE),
        ("f.cls", b"1", tarfile.REGTYPE),
        ("g.jpg", "later.jpg", tarfile.SYMTYPE),
        ("later.jpg", b"x", tarfile.REGTYPE),
    ]
    samples = {sample.key: sample for sample in read(write_links(tmp_path / "x.tar", members))}
    assert {key: sample.fields for key, sample in samples.items() if not sample.problem} == {
        "a": {"jpg": b"12345"}, "b": {"jpg": b"67890"}, "c": {"jpg": b"12345"}, "e": {"jpg": b"12345"},
        "later": {"jpg": b"x"},
    }  # fmt: skip
    assert samples["d"].problem.startswith("the field jpg is a link to a.jpg, which is not among the last")
    assert "../../etc/passwd" in samples["f"].problem
    assert samples["f"].fields == {"cls": b"1"}
    assert "later.jpg" in samples["g"].problem


def test_what_belongs_to_no_sample_is_counted_by_reason(tmp_path: Path) -> None:
    members: list[tuple[str, bytes | str, bytes]] = [
        ("cat", b"", tarfile.DIRTYPE),
        ("cat/._1.jpg", b"", tarfile.REGTYPE),
        ("__MACOSX/cat/1.jpg", b"", tarfile.REGTYPE),
        ("README", b"", tarfile.REGTYPE),
        ("cat/fifo.jpg", b"", tarfile.FIFOTYPE),
        ("__meta__", b"", tarfile.REGTYPE),
        ("cat/1.jpg", b"x", tarfile.REGTYPE),
    ]
    left_out = LeftOut()
    with write_links(tmp_path / "x.tar", members).open("rb") as file:
        assert [sample.key for sample in samples_in_tar(file, left_out)] == ["cat/1"]
    assert set(left_out.rows) == {
        ("names that begin with a dot are not read", 1, ("cat/._1.jpg",)),
        ("folders named __MACOSX are not read", 1, ("__MACOSX/cat/1.jpg",)),
        ("files without a suffix are not read", 1, ("README",)),
        ("FIFOs and devices are not read", 1, ("cat/fifo.jpg",)),
        ("names between two pairs of underscores are not read", 1, ("__meta__",)),
    }
    many = LeftOut()
    for number in range(50):
        many.add(".gif files are not read", str(number))
    assert many.rows == ((".gif files are not read", 50, tuple(map(str, range(20)))),)
    assert many.total == 50
    (text,) = many.lines()
    assert text.splitlines()[:2] == ["left out: 50, since .gif files are not read:", "  0"]
    assert text.splitlines()[20:] == ["  19", "  ... and 30 more"]
