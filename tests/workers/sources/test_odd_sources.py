"""What is odd about folders, links and files is refused by name, or listed; nothing vanishes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from torchvision.datasets import ImageFolder

from dat_client.dataset_format.tar_samples import DamagedShard
from dat_workers.errors import InvalidInput
from dat_workers.sources.find import find
from dat_workers.sources.reader import ShardReader
from tests.workers.precompute.shards import encoded, picture, sample_files, write_shards, write_tar


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(picture(0)))
    return root


def labels(root: Path) -> dict[str, int]:
    """The `cls` of each usable sample of a folder, by key, unusable ones being listed."""
    found = find(root, skip=True)
    samples = [sample for shard in found.shards for sample in ShardReader(shard, found.classes)]
    return {sample.key: int(sample.fields["cls"]) for sample in samples if not sample.problem}


def dangling_class(root: Path) -> str:
    (root / "b").mkdir()
    (root / "b" / "1.png").symlink_to("../nowhere.png")
    return "b/1.png (a link to ../nowhere.png: No such file or directory)"


def empty_class(root: Path) -> str:
    (root / "b").mkdir()
    return "b/ (a class folder without pictures)"


def class_of_other_types(root: Path) -> str:
    write(root, "b/1.gif", "b/2.gif", "b/3.heic")
    return "b/ (a class folder without pictures: it has 2 .gif, 1 .heic)"


def class_of_hidden_names(root: Path) -> str:
    write(root, "b/._1.png")
    return "b/ (a class folder without pictures)"


def class_of_fifos(root: Path) -> str:
    (root / "b").mkdir()
    os.mkfifo(root / "b" / "1.png")
    return "b/ (a class folder without pictures)"


@pytest.mark.parametrize(
    "make", [dangling_class, empty_class, class_of_other_types, class_of_hidden_names, class_of_fifos]
)
def test_a_class_without_usable_pictures_is_an_error_or_keeps_its_number(
    tmp_path: Path, make: Callable[[Path], str]
) -> None:
    write(tmp_path, "a/1.png", "c/1.png")
    problem = make(tmp_path)
    with pytest.raises(InvalidInput) as caught:
        find(tmp_path)
    assert f"{tmp_path}/{problem}" in str(caught.value)
    assert "--on-error skip" in str(caught.value)
    assert (
        find(tmp_path, skip=True).classes
        == tuple(ImageFolder(tmp_path, allow_empty=True).classes)
        == ("a", "b", "c")
    )
    assert labels(tmp_path) == {"a/1": 0, "c/1": 2}
    assert find(tmp_path, labelled=False, skip=True).classes is None


def test_a_class_of_the_types_that_image_folder_takes_is_read(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png", "b/1.TIF", "c/1.ppm", "d/1.bmp", "e/1.pgm", "f/1.tiff", "g/1.webp", "h/1.jpeg")
    assert find(tmp_path).left_out == ()
    theirs = ImageFolder(tmp_path)
    assert labels(tmp_path) == {
        str(Path(path).relative_to(tmp_path).with_suffix("")): number for path, number in theirs.samples
    }


def test_a_folder_that_may_not_be_listed_is_an_error_or_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may list every folder, so the system's answer is replaced here."""
    write(tmp_path, "a/1.png", "b/1.png", "c/1.png", "c/deep/2.png")
    scandir = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith(("/b", "/deep")):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refusing)
    with pytest.raises(InvalidInput, match=r"b/ \(this folder cannot be listed: Permission denied\).*c/deep/ \("):
        find(tmp_path)
    found = find(tmp_path, skip=True)
    assert found.classes == ("a", "b", "c")
    reason = "this folder cannot be listed: Permission denied"
    assert found.shards[0].problems == (("b/", reason), ("c/deep/", reason))
    assert labels(tmp_path) == {"a/1": 0, "c/1": 2}


def test_at_most_20_problems_are_named_and_all_are_counted(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png")
    for number in range(50):
        (tmp_path / f"empty{number:02d}").mkdir()
    with pytest.raises(InvalidInput, match=r"50 names that cannot be read: .*empty19/ \(.*; and 30 more") as caught:
        find(tmp_path)
    assert "empty20" not in str(caught.value)


def test_special_files_and_hidden_names_are_passed_over_and_counted(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png", "a/._1.png", ".cache/x.png", "__MACOSX/a/1.png", "a/1.png.txt", "a/README")
    os.mkfifo(tmp_path / "a" / "fifo.png")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "a" / "null.png").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as bound:
        before = os.getcwd()
        os.chdir(tmp_path / "a")  # a socket's path is short
        try:
            bound.bind("socket.png")
        finally:
            os.chdir(before)
        found = find(tmp_path)
    assert found.shards[0].files == ("a/1.png",)
    assert {reason: (count, sorted(names)) for reason, count, names in found.left_out} == {
        "names that begin with a dot are not read": (2, [f"{tmp_path}/.cache", f"{tmp_path}/a/._1.png"]),
        "folders named __MACOSX are not read": (1, [f"{tmp_path}/__MACOSX"]),
        "FIFOs are not read": (2, [f"{tmp_path}/a/fifo.png", f"{tmp_path}/fifo"]),
        "sockets are not read": (1, [f"{tmp_path}/a/socket.png"]),
        "devices are not read": (1, [f"{tmp_path}/a/null.png"]),
        ".txt files are not read": (1, [f"{tmp_path}/a/1.png.txt"]),
        "files without a suffix are not read": (1, [f"{tmp_path}/a/README"]),
    }


def test_each_file_is_looked_up_once(tmp_path: Path) -> None:
    write(tmp_path, *(f"{name}/{number}.png" for name in "ab" for number in range(50)))
    program = (
        f"import os; from dat_client.dataset_format.folders import list_folder; list_folder({str(tmp_path)!r})"
    )
    log = tmp_path.with_name("strace.log")
    try:
        subprocess.run(["strace", "-f", "-o", log, sys.executable, "-c", program], check=True, timeout=120)
    except FileNotFoundError:
        pytest.skip("strace is not installed")
    lines = log.read_text(errors="replace").splitlines()
    assert sum(f'{tmp_path}/a/7.png"' in line for line in lines) == 1


@pytest.mark.parametrize("archive", ["cat/old.tgz", "devkit.tar", "devkit/meta/x.tar.gz"])
def test_a_folder_with_pictures_and_an_archive_is_refused(tmp_path: Path, archive: str) -> None:
    write(tmp_path, "cat/1.png", "dog/1.png")
    write_tar(tmp_path / archive, sample_files(0))
    with pytest.raises(InvalidInput) as caught:
        find(tmp_path)
    message = str(caught.value)
    assert f"{tmp_path} holds both pictures (cat/1.png) and shards ({archive})" in message
    pattern = message.partition("a pattern such as '")[2].partition("'")[0]
    assert [shard.address for shard in find(pattern).shards] == [f"file://{tmp_path}/{archive}"]
    assert f"move {archive} out of it" in message
    with pytest.raises(InvalidInput, match="holds both pictures"):
        find(tmp_path, labelled=False)


def test_cycles_of_links_are_refused_by_name_and_other_links_are_followed(tmp_path: Path) -> None:
    root = write(tmp_path / "src", "a/1.png", "b/1.png")
    (root / "a" / "also").symlink_to("../b")  # the same folder twice, but without a cycle
    (root / "z").symlink_to(tmp_path / "src" / "a")
    assert find(root).shards[0].files == ("a/1.png", "a/also/1.png", "b/1.png", "z/1.png", "z/also/1.png")
    for target in ("..", ".", str(tmp_path), "/"):
        loop = root / "a" / "loop"
        loop.symlink_to(target)
        with pytest.raises(InvalidInput) as caught:
            find(root, skip=True)
        assert f"/loop is a link to {target}, a folder that contains this link" in str(caught.value)
        loop.unlink()
    (root / "a" / "there").symlink_to(write(tmp_path / "other", "1.png"))
    (tmp_path / "other" / "back").symlink_to(root / "a")  # two links that lead to each other
    with pytest.raises(InvalidInput, match=r"/back is a link to .*/src/a, a folder that contains this link"):
        find(root)
    (tmp_path / "other" / "back").unlink()
    (root / "a" / "self.png").symlink_to("self.png")
    with pytest.raises(InvalidInput, match=r"a/self.png \(a link to self.png: Too many levels"):
        find(root)


def test_shards_that_are_links_keep_their_names_and_two_links_are_two_shards(tmp_path: Path) -> None:
    blob = write_tar(tmp_path / "blobs" / "3fa5", sample_files(0))
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    names = [f"train-{number:06d}.tar" for number in range(2)]
    for name in names:
        (snapshot / name).symlink_to("../../blobs/3fa5")
    whole = [snapshot / name for name in names]
    for source in (snapshot, whole, f"{snapshot}/*.tar", f"{snapshot}/train-00000{{0,1}}.tar"):
        shards = find(source).shards
        assert [shard.name for shard in shards] == names
        assert [shard.address for shard in shards] == [f"file://{snapshot}/{name}" for name in names]
        assert [shard.nbytes for shard in shards] == [blob.stat().st_size] * 2


def test_a_source_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "src", 2, 1)
    first = folder / "train-000000.tar"
    for sources in ([first, first], [folder, first], [first, f"{folder}/../src/*0.tar"], [folder, folder]):
        with pytest.raises(InvalidInput, match="is named twice; name each source once"):
            find(sources)


def test_globs_enter_linked_folders(tmp_path: Path) -> None:
    write_shards(tmp_path / "elsewhere", 1, 1)
    write_shards(tmp_path / "src" / "a", 1, 1)
    (tmp_path / "src" / "b").symlink_to(tmp_path / "elsewhere")
    assert [shard.name for shard in find(f"{tmp_path}/src/*/*.tar").shards] == [
        "a/train-000000.tar", "b/train-000000.tar",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train.zip", "a zip archive, which is not read: unpack it and name the folder"),
        (
            "train.tar.zst",
            "compressed with zstd, which is not read: unpack it with `zstd -d` and name the .tar file",
        ),
        ("train.tar.7z", "a 7z archive"),
        ("one.JPG", "a single picture: name the folder of its class folders, or a shard"),
    ],
)
def test_other_files_are_named_as_what_they_are(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InvalidInput) as caught:
        find(tmp_path / name)
    assert f"{tmp_path / name} is {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04" + bytes(600), "not a tar archive, but a zip archive"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "not a tar archive, but compressed with zstd"),
        (encoded(picture(0), "JPEG"), "not a tar archive, but a single picture"),
        (b"<html>404</html>", "not a tar archive, but a page of HTML or XML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a tar archive, but a pointer of Git LFS"),
        (b"", "not a tar archive, but an empty file"),
        (b"anything else", "damaged shard"),
    ],
)
def test_shards_of_other_contents_are_named_as_what_they_are(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    (shard,) = find(tmp_path / "x.tar").shards
    with pytest.raises(DamagedShard, match=message):
        list(ShardReader(shard))


def test_commands_fifos_and_dangling_links_are_no_sources(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="pipe:curl x: commands are not run; name files or an address"):
        find("pipe:curl x")
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(
        InvalidInput, match=r"x\.tar is a FIFO, a socket or a device, but must be a file or a folder"
    ):
        find(tmp_path / "x.tar")
    (tmp_path / "y.tar").symlink_to("nowhere.tar")
    with pytest.raises(FileNotFoundError, match=r"y\.tar: a link to nowhere\.tar, which does not exist"):
        find(tmp_path / "y.tar")


def test_an_object_store_follows_the_same_rules() -> None:
    fs = fsspec.filesystem("memory")
    for name in ("a/1.png", "a/._1.png", "c/1.png", "b/1.gif", "__MACOSX/a/1.png"):
        fs.pipe_file(f"/odd-bucket/{name}", b"x")
    with pytest.raises(InvalidInput, match=r"b/ \(a class folder without pictures: it has 1 \.gif\)"):
        find("memory://odd-bucket")
    found = find("memory://odd-bucket", skip=True)
    assert (found.classes, found.shards[0].files) == (("a", "b", "c"), ("a/1.png", "c/1.png"))
    assert [(reason, count) for reason, count, _ in found.left_out] == [
        ("folders named __MACOSX are not read", 1),
        ("names that begin with a dot are not read", 1),
        (".gif files are not read", 1),
    ]
