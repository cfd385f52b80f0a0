"""Downloads published checkpoints, resumes interrupted downloads, and detects files that have changed.

None of the sources publishes a hash. The sha256 of the first file fetched from an address is therefore recorded in
`HOME/hashes.json`, and every later download from that address must match it.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import ssl
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from dat_workers.codecs.checkpoint import largest_checkpoint, load_published
from dat_workers.codecs.file import Origin
from dat_workers.codecs.registry import get
from dat_workers.codecs.spec import CodecError
from dat_workers.codecs.store import CodecStore
from dat_workers.system.files import write_atomically

if sys.platform != "win32":
    import fcntl

# called with the bytes received so far, and with the total bytes (None if the server sent no length)
ProgressCallback = Callable[[int, int | None], None]
Response = http.client.HTTPResponse | HTTPError

CHUNK_BYTES = 1 << 16  # if the connection drops, at most this many received bytes are lost
ATTEMPTS = 5  # a download fails after this many attempts in a row without a new byte
BACKOFF_S = 1.0  # wait before the second attempt; doubles for each attempt after that
TIMEOUT_S = 60.0  # limit for connecting, and for each read
TRANSIENT = (429, 500, 502, 503, 504)


class DownloadError(CodecError):
    """A download failed and is not retried; `status` is the HTTP status, or None if there was no response."""

    def __init__(self, url: str, problem: str, status: int | None = None) -> None:
        super().__init__(f"{url}: {problem}" + (f" (HTTP status {status})" if status is not None else ""))
        self.url, self.problem, self.status = url, problem, status

    def __reduce__(self) -> tuple[type[DownloadError], tuple[str, str, int | None]]:
        """Makes it picklable; by default pickle passes only the message to the constructor."""
        return type(self), (self.url, self.problem, self.status)


class _AttemptFailed(Exception):
    """An attempt to download failed, but the next attempt may succeed."""

    def __init__(self, problem: str, status: int | None = None) -> None:
        super().__init__(problem)
        self.status = status


def download(
    url: str, path: Path, progress: ProgressCallback | None = None, largest_bytes: int | None = None
) -> str:
    """Downloads `url` to `path` and returns the file's sha256 (hex); creates `path` only when the file is complete.

    >>> download("https://example.org/last.ckpt", Path("last.ckpt"))  # doctest: +SKIP

    If a connection drops or this function fails, the bytes received so far stay in `<path>.part`. The next attempt
    or call continues from there with Range and If-Range (RFC 9110, 13.1.5), or restarts the download from the
    beginning if the file at the address has changed. Attempts are repeated with exponential backoff. Raises
    DownloadError, with the address and the HTTP status, after ATTEMPTS attempts in a row without a new byte and for
    errors that a retry cannot fix, such as a file of more than `largest_bytes` bytes; raises CodecError if the disk
    is full.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise DownloadError(url, "only http and https addresses can be downloaded")
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("a+b") as file:
            partial = _PartialDownload(url, part, file, progress, largest_bytes)
            partial.lock()
            partial.complete()
            os.fsync(file.fileno())
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.replace(part, path)
            partial.validator_path.unlink(missing_ok=True)
            return digest
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _disk_full(part) from error
        raise DownloadError(url, f"the download could not be stored in {part}: {error}") from error


@dataclass
class _PartialDownload:
    """An unfinished download: the received bytes in `path`, and in a second file the validator sent with them."""

    url: str
    path: Path
    file: IO[bytes]
    progress: ProgressCallback | None
    largest_bytes: int | None = None

    @property
    def validator_path(self) -> Path:
        return Path(f"{self.path}.json")

    def lock(self) -> None:
        """Locks the unfinished download, so that replicas that start together do not both write it.

        Raises DownloadError if another process has locked it.
        """
        if sys.platform == "win32":
            return
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            still_there = os.fstat(self.file.fileno()).st_ino == self.path.stat().st_ino
        except (BlockingIOError, FileNotFoundError):
            still_there = False
        if not still_there:
            problem = f"another process is downloading this file to {self.path}; try again when it has finished"
            raise DownloadError(self.url, problem)

    def complete(self) -> None:
        """Repeats `attempt` until the file is complete.

        Raises DownloadError after ATTEMPTS attempts in a row without a new byte.
        """
        failures, most_bytes = 0, self.size()
        while True:
            try:
                return self.attempt()
            except _AttemptFailed as error:
                size = self.size()
                failures = 1 if size > most_bytes else failures + 1
                most_bytes = max(most_bytes, size)
                if failures >= ATTEMPTS:
                    problem = f"gave up after {failures} attempts, {size} bytes are kept for the next call: {error}"
                    raise DownloadError(self.url, problem, error.status) from error
                time.sleep(BACKOFF_S * 2 ** (failures - 1))

    def attempt(self) -> None:
        """Fetches the missing bytes, or all bytes if it cannot continue. Raises _AttemptFailed or DownloadError."""
        validator = self.validator()
        received = self.size() if validator else 0
        headers = {"User-Agent": "dat-service"}
        if received:
            headers |= {"Range": f"bytes={received}-", "If-Range": validator}
        with _open(self.url, headers) as response:
            if response.status in TRANSIENT:
                raise _AttemptFailed("the server is overloaded or failing", response.status)
            if received and response.status in (206, 416):
                first, total = _content_range(response)
                if response.status == 416 and total == received:
                    return  # the file was already complete, and only had to be renamed
                # From a server that ignores If-Range, the bytes of a changed file would be appended.
                if response.status == 416 or first != received or _validator(response) not in ("", validator):
                    self.validator_path.unlink(missing_ok=True)
                    self.file.truncate(0)
                    problem = "the file at the download address changed; restarting the download from the beginning"
                    raise _AttemptFailed(problem, response.status)
            elif response.status == 200:
                length = response.headers.get("Content-Length", "")
                received, total = 0, int(length) if length.isdecimal() else None
                _check_is_file(self.url, response)
                self.file.truncate(0)
                self.validator_path.write_text(json.dumps({"url": self.url, "validator": _validator(response)}))
            else:
                reason = " ".join(response.reason.split())
                raise DownloadError(self.url, f"the server did not send the file: {reason}", response.status)
            self.receive(response, received, total)

    def receive(self, response: Response, received: int, total: int | None) -> None:
        """Appends the response's bytes to the file.

        Raises _AttemptFailed if the connection drops, and DownloadError if the file is larger than `largest_bytes`.
        """
        self.check_size(total)
        if total is not None and total - received > _free_bytes(self.path):
            raise _disk_full(self.path, total - received)
        while True:
            if self.progress:
                self.progress(received, total)
            try:
                chunk = response.read(CHUNK_BYTES)
            except (OSError, http.client.HTTPException) as error:
                raise _AttemptFailed(f"{type(error).__name__}: {error}") from error
            if not chunk:
                break
            if not received and chunk.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
                raise DownloadError(self.url, "the server sent a web page instead of a file", response.status)
            self.check_size(received + len(chunk))
            self.file.write(chunk)
            received += len(chunk)
        self.file.flush()
        if total is not None and received != total:
            raise _AttemptFailed(f"the connection ended after {received} of {total} bytes")

    def check_size(self, nbytes: int | None) -> None:
        if self.largest_bytes is not None and nbytes is not None and nbytes > self.largest_bytes:
            self.file.truncate(0)
            problem = (
                f"the file has {nbytes} bytes or more; the limit is {self.largest_bytes} bytes, the most that a "
                "checkpoint of this codec can need; nothing was kept"
            )
            raise DownloadError(self.url, problem)

    def size(self) -> int:
        self.file.flush()
        return os.fstat(self.file.fileno()).st_size

    def validator(self) -> str:
        """Returns the validator of the bytes received so far, or "" if the download cannot continue from them."""
        try:
            values = json.loads(self.validator_path.read_text())
            return str(values["validator"]) if values["url"] == self.url else ""
        except (OSError, ValueError, KeyError, TypeError):
            return ""


class _SafeRedirects(HTTPRedirectHandler):
    """Refuses redirects from https to http, which urllib would follow."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage, newurl: str
    ) -> Request | None:
        if urlsplit(newurl).scheme not in ("https", req.type):
            problem = f"the server redirects to {newurl}, which is not protected by TLS; use an https address"
            raise DownloadError(req.full_url, problem, code)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, headers: dict[str, str]) -> Response:
    """Sends a GET request and returns the response, whatever its status. Raises _AttemptFailed or DownloadError."""
    try:
        response: Response = build_opener(_SafeRedirects).open(Request(url, headers=headers), timeout=TIMEOUT_S)
        return response
    except HTTPError as error:
        return error
    except DownloadError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, ssl.SSLError):
            raise DownloadError(url, f"the connection cannot be trusted: {reason}") from error
        if isinstance(reason, str | ValueError | http.client.InvalidURL):
            raise DownloadError(url, f"the address cannot be used: {reason}") from error
        raise _AttemptFailed(f"{type(reason).__name__}: {reason}") from error


def _check_is_file(url: str, response: Response) -> None:
    media_type = response.headers.get("Content-Type", "")
    if media_type.split(";")[0].strip().lower() in ("text/html", "application/xhtml+xml"):
        problem = f"the server sent a web page instead of a file (Content-Type {media_type})"
        raise DownloadError(url, problem, response.status)
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        problem = f"the response has Content-Encoding {encoding}; it must not be encoded"
        raise DownloadError(url, problem, response.status)


def _validator(response: Response) -> str:
    """Returns the validator for If-Range: a strong ETag, else Last-Modified, else ""."""
    etag: str = response.headers.get("ETag", "")
    if etag and not etag.startswith("W/"):
        return etag
    return str(response.headers.get("Last-Modified", ""))


def _content_range(response: Response) -> tuple[int | None, int | None]:
    """Returns (first byte, total bytes) from the Content-Range header; a number that is absent is None."""
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    first, total = match.groups() if match else (None, None)
    return int(first) if first else None, int(total) if total and total != "*" else None


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(path.parent).free


def _disk_full(part: Path, needed: int | None = None) -> CodecError:
    missing = f"{needed} bytes are still to come, " if needed is not None else ""
    free = _free_bytes(part)
    return CodecError(f"{part}: the disk is full or a size limit is reached ({missing}{free} bytes are free)")


def pull(name: str, store: CodecStore, progress: ProgressCallback | None = None, url: str | None = None) -> str:
    """Downloads a codec of the registry, checks it, installs it and returns its fingerprint.

    >>> pull("vqgan-openimages-f8-16384", CodecStore())  # doctest: +SKIP

    `url` replaces the registry's address. The downloaded file is deleted in the end, whether it was installed or
    refused. Raises CodecNotFound for an unknown name, DownloadError, CodecError for a file whose sha256 differs
    from that of the first file fetched from that address (nothing is installed then), and CodecError as
    `checkpoint.load_published` and `CodecStore.add` do.
    """
    spec = get(name)
    source = url or spec.source_url
    if source is None:
        raise CodecError(f"codec {name!r} has no address to download from; its status is: {store.status(name)}")
    path = store.home / "downloads" / f"{name}.download"
    digest = download(source, path, progress, largest_checkpoint(spec))
    try:
        hashes = _read_hashes(store)
        if hashes.get(source, digest) != digest:
            raise CodecError(
                f"the file at {source} changed: its sha256 was {hashes[source]} when first seen and is {digest} "
                "now. Nothing was installed; to accept the new file, remove the line of this address from "
                f"{store.home / 'hashes.json'}"
            )
        fingerprint = store.add(spec, load_published(path, spec), Origin.now(source, digest))
        if source not in hashes:
            _write_hashes(store, {**hashes, source: digest})
    finally:
        path.unlink(missing_ok=True)
    return fingerprint


def _read_hashes(store: CodecStore) -> dict[str, str]:
    path = store.home / "hashes.json"
    try:
        hashes: Any = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CodecError(f"{path} cannot be read: {error}") from error
    if not isinstance(hashes, dict):
        found = type(hashes).__name__
        raise CodecError(f"{path} must hold a JSON object that maps addresses to hashes, but holds a {found}")
    return hashes


def _write_hashes(store: CodecStore, hashes: dict[str, str]) -> None:
    path = store.home / "hashes.json"
    try:
        write_atomically(path, f"{json.dumps(hashes, indent=1, sort_keys=True)}\n".encode())
    except OSError as error:
        raise CodecError(f"{path} could not be written: {error}") from error
