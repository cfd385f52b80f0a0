"""`dat precompute` as a user types it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dat_service.cli.main import app
from tests.conftest import DAT
from tests.workers.precompute.shards import contents, encoded, picture, sample_files, write_shards, write_tar


def run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["precompute", *map(str, arguments), "--threads", "1"])
    assert done.exit_code == code, done.output
    return done.output


def run_as_a_process(*arguments: object) -> str:
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    command = [*DAT, "precompute", *map(str, arguments), "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("only root may mount a small file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_dataset_and_again(tmp_path: Path) -> None:
    source, dst = write_shards(tmp_path / "src", 2), tmp_path / "dst"
    first = run_as_a_process(f"{source}/train-{{000000..000001}}.tar", dst)
    assert f"{dst}: 10 samples in 2 shards" in first
    assert "this run: 2 shards, 10 images in" in first
    assert f"look at {dst}/contact-sheet.html" in first
    before = contents(dst)
    again = run(*sorted(source.glob("*.tar")), dst)  # as a shell expands the braces
    assert "this run: 0 shards, 0 images" in again
    assert "2 shards were there" in again
    assert contents(dst) == before
    assert "quality: 95, now 90" in run(source, dst, "--quality", "90", code=1)


def test_errors_are_one_line(tmp_path: Path) -> None:
    bad = write_tar(tmp_path / "src" / "a.tar", [("k.png", b"no picture")])
    message = run(bad, tmp_path / "dst", "--codec", "identity", code=1)
    assert "a.tar, sample k: png: 10 bytes" in message
    assert message.splitlines()[-1] == "--on-error skip leaves such samples out"
    nothing = run(bad, tmp_path / "dst", "--codec", "identity", "--on-error", "skip", code=1)
    assert "not one sample could be made, 1 were skipped; a.tar, k: png: 10 bytes" in nothing
    bad = write_tar(tmp_path / "src" / "a.tar", [("k.png", b"no picture"), *sample_files(0)])
    skipped = run(bad, tmp_path / "other", "--codec", "identity", "--on-error", "skip")
    assert "1 samples skipped:\n  a.tar, k: png: 10 bytes" in skipped


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--outputs", "pictures"], "outputs: 'pictures' is not usable"),
        (["--augment", "2"], "augment: 2 is not usable; expected a crop"),
        (["--on-error", "ignore"], "--on-error: 'ignore' is not usable; expected fail or skip"),
        (["--codec", "no-such-codec"], "no-such-codec"),
        (["--keep", "clss"], "keep: none of the first 1 samples has a field 'clss'; their fields are cls, png"),
        (["--keep", ""], "keep: '' is not usable"),
        (["--keep", "cls,,json"], "keep: '' is not usable"),
        (["--keep", "../x"], "keep: '../x' is not usable"),
        (["--engine", "gpu"], "engine is 'gpu'"),
        (["--device", "gpu"], "device is 'gpu'"),
        (["--dtype", "int8"], "dtype is 'int8'"),
        (["--codec", "identity", "--outputs", "indices"], "a codec that has a codebook"),
    ],
)
def test_contradictory_options_are_refused(tmp_path: Path, options: list[str], message: str) -> None:
    source = write_shards(tmp_path / "src", 1, 1)
    out = run(source, tmp_path / "dst", *options, code=1)
    assert message in out.splitlines()[-1]
    assert "loading" not in out
    assert not (tmp_path / "dst").exists()


def test_an_empty_address_is_not_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell passes one where a variable is not set."""
    source = write_shards(tmp_path / "src", 1, 1)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for arguments in ((source, ""), ("", tmp_path / "dst")):
        assert "address: '' is not usable" in run(*arguments, "--codec", "identity", code=1)
    assert not list(Path().iterdir())


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    source = write_shards(tmp_path / "src", 1, 1)
    assert "file" in run(source, tmp_path / "file" / "dst", "--codec", "identity", code=1).splitlines()[-1]


def test_a_disk_that_is_full(tmp_path: Path, small_disk: Path) -> None:
    source, dst = write_shards(tmp_path / "src", 4, 8, side=64), small_disk / "dst"
    message = run(source, dst, "--codec", "identity", "--format", "png", code=1)
    assert "No space left on device" in message.splitlines()[-1]
    left = contents(dst)
    whole = [name for name in left if name.endswith(".tar")]
    assert not [name for name in left if ".precompute-" in name]
    assert len(whole) < 4
    # A whole shard without an entry counts as missing: the disk had room for the shard, but not for its entry.
    assert {f"manifest/{name}.json" for name in whole} >= {name for name in left if name.startswith("manifest")}


def test_progress_says_what_it_counts(tmp_path: Path) -> None:
    out = run(write_shards(tmp_path / "src", 2), tmp_path / "dst", "--codec", "identity")
    assert out.splitlines()[:2] == [
        "loading identity ...",
        "100.0% of the bytes of SRC, 10 samples, 2 of 2 shards; drawing the contact sheet ...",
    ]
    for i in range(3):
        (tmp_path / "photos" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / "a" / f"{i}.png").write_bytes(encoded(picture(i)))
    out = run(tmp_path / "photos", tmp_path / "photos-q", "--codec", "identity")
    assert "\n3 of 3 samples (100.0%), 1 of 1 shards; drawing the contact sheet ...\n" in out


def test_what_is_lacking_and_what_is_made_again_is_said(tmp_path: Path) -> None:
    source, dst = write_shards(tmp_path / "src", 2), tmp_path / "dst"
    write_tar(source / "z.tar", [(b"cafe\xe9.png".decode("utf-8", "surrogateescape"), b"")])
    options = ("--codec", "identity", "--on-error", "skip", "--keep", "cls")
    assert "z.tar, cafe\\udce9: " in run(source, dst, *options)
    write_tar(source / "train-000001.tar", [*sample_files(7), ("8.png", encoded(picture(8)))])
    (dst / "manifest" / "train-000000.tar.json").write_text("{")
    out = run(source, dst, *options)
    assert "1 of 7 samples have no field cls, which --keep names\n2 shards were there and were made again:\n" in out
    assert "\n  train-000000.tar: its manifest entry cannot be read: Expecting" in out
    assert re.search(r"\n  train-000001.tar: its source had \d+ bytes and has \d+ now\n", out)
