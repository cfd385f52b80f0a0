from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import resource
import ssl
import zipfile
from collections.abc import Callable
from dataclasses import replace
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import HTTPSHandler, Request
from urllib.response import addinfourl

import pytest
from torch import Tensor

from dat_workers.codecs import download as module
from dat_workers.codecs.download import DownloadError, download, pull
from dat_workers.codecs.registry import REGISTRY
from dat_workers.codecs.spec import CodecError, CodecSpec
from dat_workers.codecs.store import CodecStore

BODY = bytes(range(256)) * 2000  # 512 kB, several chunks
SHA = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "downloads" / "file"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACKOFF_S", 0.001)
    monkeypatch.setattr(module, "TIMEOUT_S", 5.0)


def fetch(source: Any, path: Path, attempts: int = module.ATTEMPTS, **options: Any) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ATTEMPTS", attempts)
        return download(source.url, path, **options)


def files(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir())


def test_whole_file(source: Any, path: Path) -> None:
    source.body = BODY
    seen: list[tuple[int, int | None]] = []
    assert fetch(source, path, progress=lambda done, total: seen.append((done, total))) == SHA
    assert path.read_bytes() == BODY
    assert files(path) == ["file"]
    assert seen[0] == (0, len(BODY))
    assert seen[-1] == (len(BODY), len(BODY))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_dropped_connections_are_resumed(source: Any, path: Path) -> None:
    source.body, source.drop_after = BODY, [200_000, 100_000, 150_000]
    assert fetch(source, path, attempts=2) == SHA  # each attempt gets further, so none counts
    assert path.read_bytes() == BODY
    ranges = [request.get("Range") for request in source.requests]
    assert ranges[0] is None
    assert len(ranges) == 4
    starts = [int(r.removeprefix("bytes=").removesuffix("-")) for r in ranges[1:]]
    assert 0 < starts[0] < starts[1] < starts[2] < len(BODY)
    assert source.requests[1]["If-Range"] == '"one"'


def test_gives_up_and_resumes_in_the_next_call(source: Any, path: Path) -> None:
    source.body, source.drop_after = BODY, [200_000, 0, 0]
    with pytest.raises(DownloadError, match=r"gave up after 3 attempts, [1-9][0-9]* bytes are kept") as caught:
        fetch(source, path, attempts=3)
    assert (caught.value.url, isinstance(caught.value, CodecError)) == (source.url, True)
    assert files(path) == ["file.part", "file.part.json"]
    kept = (path.parent / "file.part").stat().st_size
    assert fetch(source, path) == SHA
    assert source.requests[-1]["Range"] == f"bytes={kept}-"
    assert files(path) == ["file"]


@pytest.mark.parametrize("honours", [True, False])
def test_changed_source_starts_over(source: Any, path: Path, honours: bool) -> None:
    source.body, source.drop_after = BODY, [200_000]
    with pytest.raises(DownloadError):
        fetch(source, path, attempts=1)
    source.body, source.etag, source.honours_if_range = BODY[::-1], '"two"', honours
    assert fetch(source, path) == hashlib.sha256(BODY[::-1]).hexdigest()
    assert path.read_bytes() == BODY[::-1]


def test_another_address_does_not_continue_the_part(source: Any, path: Path) -> None:
    source.body, source.drop_after = BODY, [200_000]
    with pytest.raises(DownloadError):
        fetch(source, path, attempts=1)
    download(source.url + "?other", path)
    assert "Range" not in source.requests[-1]


@pytest.mark.parametrize("lacking", [{"ranges": False}, {"etag": ""}, {"etag": 'W/"one"'}])
def test_without_ranges_or_validator_it_starts_over(source: Any, path: Path, lacking: dict[str, Any]) -> None:
    for name, value in lacking.items():
        setattr(source, name, value)
    source.body, source.drop_after = BODY, [200_000]
    assert fetch(source, path) == SHA
    assert ("Range" in source.requests[1]) == ("ranges" in lacking)
    assert path.read_bytes() == BODY


def test_part_that_is_whole_already(source: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source.body = BODY
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError("no")))
        with pytest.raises(DownloadError, match="could not be stored"):
            fetch(source, path)
    assert fetch(source, path) == SHA
    assert source.requests[-1]["Range"] == f"bytes={len(BODY)}-"
    assert path.read_bytes() == BODY


def test_part_longer_than_the_source_is_dropped(source: Any, path: Path) -> None:
    path.parent.mkdir()
    path.with_name("file.part").write_bytes(BODY + b"more")
    path.with_name("file.part.json").write_text(json.dumps({"url": source.url, "validator": '"one"'}))
    source.body = BODY
    assert fetch(source, path) == SHA


@pytest.mark.parametrize("announced", [True, False])
def test_file_larger_than_the_codec_can_need(source: Any, path: Path, announced: bool) -> None:
    source.body, source.announces_length = BODY, announced
    with pytest.raises(DownloadError, match=r"the file has \d+ bytes or more; the limit is 100000 bytes"):
        download(source.url, path, largest_bytes=100_000)
    assert not path.exists()
    assert path.with_name("file.part").stat().st_size == 0
    assert download(source.url, path, largest_bytes=len(BODY)) == SHA


@pytest.mark.parametrize("status", [403, 404, 410, 416])
def test_final_statuses(source: Any, path: Path, status: int) -> None:
    source.status = status
    with pytest.raises(DownloadError, match=rf"{source.url}: .*HTTP status {status}") as caught:
        fetch(source, path)
    assert caught.value.status == status
    assert len(source.requests) == 1
    assert not path.exists()


def test_overloaded_server_is_asked_again(source: Any, path: Path) -> None:
    source.status = 503
    with pytest.raises(DownloadError, match=r"gave up after 3 attempts.*HTTP status 503"):
        fetch(source, path, attempts=3)
    assert len(source.requests) == 3


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"\n <!DOCTYPE html><html>Sign in", "application/octet-stream"),
        (b"<!-- --><script>location = 1</script>", "text/html; charset=utf-8"),
    ],
)
def test_web_page_instead_of_a_file(source: Any, path: Path, body: bytes, kind: str) -> None:
    source.body, source.content_type = body, kind
    with pytest.raises(DownloadError, match=r"the server sent a web page instead of a file.*status 200"):
        fetch(source, path)
    assert not path.exists()


def test_redirects(source: Any, path: Path) -> None:
    source.body, source.redirect_to = BODY, "/elsewhere?dl=1"
    assert fetch(source, path) == SHA
    source.redirect_to = "/file"
    with pytest.raises(DownloadError, match=r"would lead to an infinite loop.*HTTP status 302"):
        fetch(source, path)
    source.redirect_to = "file:///etc/hostname"
    with pytest.raises(DownloadError, match=r"Redirection to url 'file:///etc/hostname' is not allowed"):
        fetch(source, path)
    source.redirect_to = "ftp://127.0.0.1/x"
    with pytest.raises(DownloadError, match=r"redirects to ftp://127\.0\.0\.1/x, which is not protected"):
        fetch(source, path)


def test_https_is_not_left_for_http(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    def redirect(handler: HTTPSHandler, request: Request) -> addinfourl:
        headers = Message()
        headers["Location"] = "http://127.0.0.1/file"
        response = addinfourl(io.BytesIO(), headers, request.full_url, 302)
        response.msg = "Found"
        return response

    monkeypatch.setattr(HTTPSHandler, "https_open", redirect)
    with pytest.raises(DownloadError, match=r"redirects to http://127\.0\.0\.1/file, which is not protected"):
        download("https://127.0.0.1/file", path)


def test_an_untrusted_certificate_ends_the_download(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    requests: list[str] = []

    def refuse(handler: HTTPSHandler, request: Request) -> addinfourl:
        requests.append(request.full_url)
        raise URLError(ssl.SSLCertVerificationError("self-signed certificate"))

    monkeypatch.setattr(HTTPSHandler, "https_open", refuse)
    with pytest.raises(DownloadError, match=r"cannot be trusted: .*self-signed certificate"):
        download("https://127.0.0.1/file", path)
    assert len(requests) == 1


def test_unusable_addresses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("file:///etc/hostname", "ftp://127.0.0.1/x", "last.ckpt"):
        with pytest.raises(DownloadError, match="only http and https"):
            download(url, path)
    for url in ("http:///x", "http://127.0.0.1:port/x", "http://127.0.0.1/a b"):
        with pytest.raises(DownloadError, match="the address cannot be used"):
            download(url, path)
    monkeypatch.setattr(module, "ATTEMPTS", 1)
    with pytest.raises(DownloadError, match="gave up after 1 attempts"):
        download("http://127.0.0.1:9/x", path)


def test_full_disk(source: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source.body = BODY
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        with pytest.raises(CodecError, match=r"file\.part: the disk is full"):
            fetch(source, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not path.exists()
    assert fetch(source, path) == SHA  # and what had arrived was of use
    assert source.requests[-1]["Range"].startswith("bytes=")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(CodecError, match="512000 bytes are still to come, 10 bytes are free"):
        fetch(source, path)


def test_one_process_at_a_time(source: Any, path: Path) -> None:
    source.body = BODY
    path.parent.mkdir()
    with path.with_name("file.part").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DownloadError, match="another process is downloading"):
            fetch(source, path)
    assert fetch(source, path) == SHA


def test_interrupted_by_the_user(source: Any, path: Path) -> None:
    source.body = BODY

    def interrupt(done: int, total: int | None) -> None:
        if done > 200_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(source, path, progress=interrupt)
    assert fetch(source, path) == SHA
    assert int(source.requests[-1]["Range"].removeprefix("bytes=").removesuffix("-")) > 200_000


@pytest.fixture
def registered(source: Any, spec: CodecSpec, monkeypatch: pytest.MonkeyPatch) -> CodecSpec:
    entry = replace(spec, source_url=source.url, source_member="model.ckpt")
    monkeypatch.setitem(REGISTRY, "toy", entry)
    return entry


@pytest.fixture
def published(tmp_path: Path, weights: dict[str, Tensor], lightning_checkpoint: Callable[..., Path]) -> bytes:
    inner = lightning_checkpoint(tmp_path / "inner.ckpt", weights)
    with zipfile.ZipFile(tmp_path / "vq.zip", "w") as archive:
        archive.write(inner, "model.ckpt")
    return (tmp_path / "vq.zip").read_bytes()


def test_pull(source: Any, registered: CodecSpec, published: bytes, tmp_path: Path) -> None:
    store = CodecStore(tmp_path / "home")
    source.body = published
    mark = pull("toy", store)
    codec = store.load("toy")
    sha = hashlib.sha256(published).hexdigest()
    assert codec.fingerprint == mark
    assert (codec.origin.source, codec.origin.sha256) == (source.url, sha)
    assert json.loads((store.home / "hashes.json").read_text()) == {source.url: sha}
    assert list((store.home / "downloads").iterdir()) == []
    assert pull("toy", store) == mark


def test_pull_compares_with_the_hash_first_seen(
    source: Any, registered: CodecSpec, published: bytes, tmp_path: Path
) -> None:
    store = CodecStore(tmp_path / "home")
    source.body = published
    pull("toy", store)
    mark = store.load("toy").fingerprint
    source.body = published + b"\0"
    old, new = (hashlib.sha256(body).hexdigest() for body in (published, source.body))
    with pytest.raises(CodecError, match=f"was {old} when first seen and is {new} now"):
        pull("toy", store)
    assert store.load("toy").fingerprint == mark
    assert json.loads((store.home / "hashes.json").read_text()) == {source.url: old}
    assert list((store.home / "downloads").iterdir()) == []


def test_pull_from_another_address(
    source: Any, registered: CodecSpec, published: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REGISTRY, "toy", replace(registered, source_url="http://127.0.0.1:9/x"))
    store = CodecStore(tmp_path / "home")
    source.body = published
    pull("toy", store, url=source.url)
    assert store.load("toy").origin.source == source.url


def test_pull_of_other_weights_installs_and_pins_nothing(
    source: Any, registered: CodecSpec, tmp_path: Path
) -> None:
    store = CodecStore(tmp_path / "home")
    source.body = b"no checkpoint at all"
    with pytest.raises(CodecError, match="not a checkpoint"):
        pull("toy", store)
    assert store.status("toy") == "not installed"
    assert not (store.home / "hashes.json").exists()
    assert list((store.home / "downloads").iterdir()) == []


def test_pull_of_what_is_not_downloaded(tmp_path: Path) -> None:
    store = CodecStore(tmp_path)
    for name in ("identity", "tiny-f8", "nothing-of-that-name"):
        with pytest.raises(CodecError, match=name):
            pull(name, store)
    with contextlib.suppress(FileNotFoundError):
        assert list((tmp_path / "downloads").iterdir()) == []
    (tmp_path / "hashes.json").write_text("[")
    with pytest.raises(CodecError, match=r"hashes\.json cannot be read"):
        module._read_hashes(store)
