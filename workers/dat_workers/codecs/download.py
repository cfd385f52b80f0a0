"""Fetching published checkpoints: resumable, and compared with the hash first seen.

None of the sources publishes a hash, so the first one seen is kept (`HOME/hashes.json`) and every later
download of the same address must match it. HTTP is urllib3's (a dependency of this package).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3

from dat_workers.codecs.checkpoint import load_published
from dat_workers.codecs.file import Origin
from dat_workers.codecs.registry import get
from dat_workers.codecs.spec import CodecError
from dat_workers.codecs.store import CodecStore
from dat_workers.system.files import write_atomically

if sys.platform != "win32":
    import fcntl

Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all where the server says so

CHUNK_BYTES = 1 << 16  # what a dropped connection loses at most
MAX_REDIRECTS = 10
TRANSIENT = (429, 500, 502, 503, 504)


class DownloadError(CodecError):
    """A download failed for good; `status` is the HTTP status, where there was an answer."""

    def __init__(self, url: str, problem: str, status: int | None = None) -> None:
        said = f" (HTTP status {status})" if status is not None else ""
        super().__init__(f"{url}: {problem}{said}")
        self.url = url
        self.status = status


class _Dropped(Exception):
    """This attempt failed; another may do."""

    def __init__(self, problem: str, status: int | None = None) -> None:
        super().__init__(problem)
        self.status = status


def download(
    url: str,
    path: Path,
    progress: Progress | None = None,
    *,
    attempts: int = 5,
    backoff_s: float = 1.0,
    timeout_s: float = 60.0,
) -> str:
    """Downloads `url` to `path` and returns its sha256 (hex); `path` appears only when whole.

    >>> download("https://example.org/last.ckpt", Path("last.ckpt"))  # doctest: +SKIP

    What arrived is kept in `<path>.part`, across dropped connections (`attempts` in a row without a new
    byte, with exponential backoff) and across calls. It is resumed with Range and If-Range (RFC 9110,
    13.1.5): if the source has changed meanwhile, the download starts over. Raises DownloadError with
    address and status, CodecError where the disk is full.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise DownloadError(url, "only http and https addresses can be downloaded")
    part = path.with_name(path.name + ".part")
    note = path.with_name(path.name + ".part.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("a+b") as file:
            _lock(file, part, url)
            digest = _until_whole(url, file, note, progress, attempts, backoff_s, timeout_s)
            file.flush()
            os.fsync(file.fileno())
            os.replace(part, path)
            note.unlink(missing_ok=True)
            return digest
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _full(part, None) from error
        raise DownloadError(url, f"could not be kept in {part}: {error}") from error


def _until_whole(
    url: str,
    file: IO[bytes],
    note: Path,
    progress: Progress | None,
    attempts: int,
    backoff_s: float,
    timeout_s: float,
) -> str:
    failures, farthest = 0, _size(file)
    while True:
        try:
            return _attempt(url, file, note, progress, timeout_s)
        except _Dropped as dropped:
            reached = _size(file)
            failures = 1 if reached > farthest else failures + 1
            farthest = max(farthest, reached)
            if failures >= attempts:
                problem = f"gave up after {failures} attempts, {reached} bytes are kept for the next: {dropped}"
                raise DownloadError(url, problem, dropped.status) from dropped
            time.sleep(backoff_s * 2 ** (failures - 1))


def _attempt(url: str, file: IO[bytes], note: Path, progress: Progress | None, timeout_s: float) -> str:
    kept = _noted(note, url)
    done = _size(file) if kept else 0
    headers = {"Accept-Encoding": "identity", "User-Agent": "dat-service"}
    if done:
        headers |= {"Range": f"bytes={done}-", "If-Range": kept}
    try:
        with contextlib.closing(_open(url, headers, timeout_s)) as response:
            if response.status in TRANSIENT:
                raise _Dropped("the server is overloaded or failing", response.status)
            if done and response.status in (206, 416):
                first, total = _range_of(response)
                if response.status == 416 and total == done:
                    return _digest(file).hexdigest()  # all had arrived, only the renaming was missing
                # a server that ignores If-Range would splice two files together
                if response.status == 416 or first != done or _validator(response) not in ("", kept):
                    _forget(file, note)
                    raise _Dropped("the source changed; starting over", response.status)
            elif response.status == 200:
                done, total = 0, _length(response)
                _check_is_file(url, response)
                file.truncate(0)
                note.write_text(json.dumps({"url": url, "validator": _validator(response)}))
            else:
                raise DownloadError(url, "the server did not send the file", response.status)
            return _receive(url, response, file, done, total, progress)
    except urllib3.exceptions.SSLError as error:
        raise DownloadError(url, f"no trustworthy connection: {error}") from error
    except urllib3.exceptions.LocationValueError as error:
        raise DownloadError(url, f"no usable address: {error}") from error
    except urllib3.exceptions.HTTPError as error:
        raise _Dropped(f"{type(error).__name__}: {error}") from error


def _receive(
    url: str,
    response: urllib3.BaseHTTPResponse,
    file: IO[bytes],
    done: int,
    total: int | None,
    progress: Progress | None,
) -> str:
    if total is not None and total - done > shutil.disk_usage(Path(file.name).parent).free:
        raise _full(Path(file.name), total - done)
    digest = _digest(file)
    if progress:
        progress(done, total)
    for chunk in response.stream(CHUNK_BYTES, decode_content=False):
        if not done and chunk.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
            raise DownloadError(url, "a web page came instead of a file", response.status)
        file.write(chunk)
        digest.update(chunk)
        done += len(chunk)
        if progress:
            progress(done, total)
    file.flush()
    if total is not None and done != total:
        raise _Dropped(f"{done} of {total} bytes came")
    return digest.hexdigest()


def _open(url: str, headers: dict[str, str], timeout_s: float) -> urllib3.BaseHTTPResponse:
    """GET with redirects followed by hand: urllib3 would also follow one from https to http."""
    for _ in range(MAX_REDIRECTS):
        parts = urlsplit(url)
        proxy = getproxies().get(parts.scheme)
        direct = not proxy or proxy_bypass(parts.hostname or "")
        pool = urllib3.PoolManager() if direct else urllib3.ProxyManager(str(proxy))
        response = pool.request(
            "GET",
            url,
            headers=headers,
            preload_content=False,
            decode_content=False,
            redirect=False,
            retries=False,
            timeout=urllib3.Timeout(connect=timeout_s, read=timeout_s),
        )
        location = response.get_redirect_location()
        if not location:
            return response
        response.close()
        target = urljoin(url, location)
        if urlsplit(target).scheme != "https" and urlsplit(target).scheme != parts.scheme:
            raise DownloadError(url, f"redirects to {target}, which is not protected", response.status)
        url = target
    raise DownloadError(url, f"more than {MAX_REDIRECTS} redirects")


def _check_is_file(url: str, response: urllib3.BaseHTTPResponse) -> None:
    kind = response.headers.get("Content-Type", "")
    if kind.split(";")[0].strip().lower() in ("text/html", "application/xhtml+xml"):
        raise DownloadError(url, f"a web page came instead of a file (Content-Type {kind})", response.status)
    if response.headers.get("Content-Encoding", "identity") != "identity":
        encoding = response.headers["Content-Encoding"]
        raise DownloadError(url, f"came with Content-Encoding {encoding}, not asked for", response.status)


def _validator(response: urllib3.BaseHTTPResponse) -> str:
    """What If-Range may carry: a strong ETag, else Last-Modified."""
    etag: str = response.headers.get("ETag", "")
    if etag and not etag.startswith("W/"):
        return etag
    return str(response.headers.get("Last-Modified", ""))


def _noted(note: Path, url: str) -> str:
    try:
        values = json.loads(note.read_text())
        return str(values["validator"]) if values["url"] == url else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # nothing is known of the part, so it is not resumed


def _forget(file: IO[bytes], note: Path) -> None:
    note.unlink(missing_ok=True)
    file.truncate(0)


def _range_of(response: urllib3.BaseHTTPResponse) -> tuple[int | None, int | None]:
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    if not match:
        return None, None
    return (int(match[1]) if match[1] else None), (int(match[2]) if match[2] != "*" else None)


def _length(response: urllib3.BaseHTTPResponse) -> int | None:
    value = response.headers.get("Content-Length", "")
    return int(value) if value.isdecimal() else None


def _size(file: IO[bytes]) -> int:
    file.flush()
    return os.fstat(file.fileno()).st_size


def _digest(file: IO[bytes]) -> hashlib._Hash:
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest


def _lock(file: IO[bytes], part: Path, url: str) -> None:
    """One process a download: two replicas that start together share the store's folder."""
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = os.fstat(file.fileno()).st_ino == part.stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        ours = False
    if not ours:
        raise DownloadError(url, f"another process is downloading it ({part}); try again when it is done")


def _full(part: Path, needed: int | None) -> CodecError:
    free = shutil.disk_usage(part.parent).free
    more = f"{needed} bytes are still to come, " if needed is not None else ""
    return CodecError(f"{part}: the disk is full or a limit is reached ({more}{free} bytes are free)")


def pull(name: str, store: CodecStore, progress: Progress | None = None, url: str | None = None) -> str:
    """Downloads a codec of the registry, checks and installs it; returns its fingerprint.

    >>> pull("vqgan-openimages-f8-16384", CodecStore())  # doctest: +SKIP

    `url` replaces the registry's address. The download itself is removed again. Raises UnknownCodec,
    DownloadError, CodecError for a file whose sha256 is not the one first seen at that address (nothing
    is installed), and as `checkpoint.load_published` and `CodecStore.add` do.
    """
    spec = get(name)
    source = url or spec.source_url
    if source is None:
        raise CodecError(f"codec {name!r} is not downloaded from anywhere: {store.status(name)}")
    path = store.home / "downloads" / f"{name}.download"
    found = download(source, path, progress)
    try:
        hashes = _read_hashes(store)
        if hashes.get(source, found) != found:
            raise CodecError(
                f"{source} has changed: its sha256 was {hashes[source]} when first seen and is {found} now. "
                f"Nothing was installed; to accept it, remove its line from {store.home / 'hashes.json'}"
            )
        mark = store.add(spec, load_published(path, spec), Origin.now(source, found))
        if source not in hashes:
            _write_hashes(store, {**hashes, source: found})
    finally:
        path.unlink(missing_ok=True)
    return mark


def _read_hashes(store: CodecStore) -> dict[str, str]:
    path = store.home / "hashes.json"
    try:
        hashes = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CodecError(f"{path} cannot be read: {error}") from error
    if not isinstance(hashes, dict):
        raise CodecError(f"{path} must map addresses to hashes, it holds a {type(hashes).__name__}")
    return hashes


def _write_hashes(store: CodecStore, hashes: dict[str, str]) -> None:
    path = store.home / "hashes.json"
    try:
        write_atomically(path, f"{json.dumps(hashes, indent=1, sort_keys=True)}\n".encode())
    except OSError as error:
        raise CodecError(f"{path} could not be written: {error}") from error
