"""Runs jobs from S3 to S3: moto stands in for S3, s3fs and botocore are those of a user."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs
from moto.server import ThreadedMotoServer

from dat_client.webdataset import load
from dat_workers.precompute import precompute
from tests.workers.precompute.shards import contents, write_shards


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Starts an S3 with an empty bucket, `bucket`."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem(use_listings_cache=False)
    fs.mkdir("bucket")
    yield fs
    fs.rm("bucket", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_s3_on_both_sides(tmp_path: Path, s3: Any) -> None:
    source = write_shards(tmp_path / "src", 3, 2)
    s3.put(str(source), "bucket/train", recursive=True)
    address, dst = "s3://bucket/train/train-{000000..000002}.tar", "s3://bucket/made/q"
    options: dict[str, Any] = {"codec": "identity", "crop": 32, "picture": "png"}
    precompute(address, dst, **options)
    precompute(str(source), str(tmp_path / "dst"), **options)
    stored = {path.removeprefix("bucket/made/q/"): s3.cat_file(path) for path in s3.find("bucket/made/q")}
    assert set(stored) == set(contents(tmp_path / "dst"))
    for name in ("train-000000.tar", "train-000002.tar", "precompute.json", "contact-sheet.html"):
        assert stored[name] == (tmp_path / "dst" / name).read_bytes()
    s3.rm_file("bucket/made/q/train-000001.tar")
    s3.pipe_file("bucket/made/q/train-000002.tar", b"x")
    again = precompute("s3://bucket/train", dst, **options)
    assert (again.shards_kept, again.images) == (1, 4)
    assert s3.cat_file("bucket/made/q/train-000002.tar") == stored["train-000002.tar"]
    found = list(load(dst, source="s3://bucket/train"))
    assert [label for _, _, label in found] == list(range(6))
    assert all((x == q).all() for x, q, _ in found)


def test_a_source_that_changed_is_found_by_its_hash(tmp_path: Path, s3: Any) -> None:
    source = write_shards(tmp_path / "src", 2, 2)
    s3.put(str(source), "bucket/train", recursive=True)
    precompute("s3://bucket/train", "s3://bucket/q", codec="identity")
    before = json.loads(s3.cat_file("bucket/q/manifest/train-000001.tar.json"))
    content = (source / "train-000001.tar").read_bytes()
    at = content.index(b"3", content.index(b"0003.cls") + 512)
    s3.pipe_file("bucket/train/train-000001.tar", content[:at] + b"8" + content[at + 1 :])
    assert precompute("s3://bucket/train", "s3://bucket/q", codec="identity").shards_kept == 2
    again = precompute("s3://bucket/train", "s3://bucket/q", codec="identity", check_hashes=True)
    assert again.shards_kept == 1
    assert [label for _, label in load("s3://bucket/q")] == [0, 1, 2, 8]
    assert json.loads(s3.cat_file("bucket/q/manifest/train-000001.tar.json"))["sha256"] != before["sha256"]


def test_errors_of_s3_name_the_address(s3: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="s3://bucket/nothing: no such shard or folder"):
        precompute("s3://bucket/nothing", str(tmp_path / "dst"), codec="identity")
    source = write_shards(tmp_path / "src", 1, 1)
    with pytest.raises(OSError, match="no-such-bucket"):
        precompute(str(source), "s3://no-such-bucket/q", codec="identity")
    assert not s3.exists("no-such-bucket")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(OSError, match="'s3://bucket/q': NoCredentialsError"):
        precompute(str(source), "s3://bucket/q", codec="identity")
