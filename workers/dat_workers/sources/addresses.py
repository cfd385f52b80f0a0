"""Opens paths and fsspec addresses, and names them in the errors of their storage."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dat_client.errors import shown
from dat_workers.errors import InvalidInput

OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "hf"}
# Exceptions of these packages are not errors of a storage.
NOT_STORAGE = ("builtins", "dat_workers", "numpy", "ray", "torch")


@contextmanager
def naming_address(address: object) -> Iterator[None]:
    """Raises storage errors that omit the address, such as missing credentials, as OSError with the address."""
    try:
        yield
    except Exception as error:
        from_storage = isinstance(error, OSError) or type(error).__module__.partition(".")[0] not in NOT_STORAGE
        names_address = isinstance(error, OSError) and "://" in str(error)
        if not from_storage or names_address or "://" not in str(address):
            raise
        raise OSError(f"{shown(address)}: {type(error).__name__}: {error}") from error


def is_object_store(address: str) -> bool:
    """Returns True if an address is in an object store, which has no folders."""
    return address.partition("://")[0] in OBJECT_STORES


def open_address(address: str) -> tuple[Any, str]:
    """Returns the file system of an address and the path in it.

    Raises InvalidInput for an empty address, which fsspec would take for the working directory, for an unknown
    protocol, and if the protocol's package is missing.
    """
    if not address:
        raise InvalidInput("address", "''", "a path or an fsspec address")
    try:
        # No cache is used, because other processes may write too, and a cached listing may be outdated.
        options = {"use_listings_cache": False} if is_object_store(address) else {}
        fs, path = fsspec.core.url_to_fs(address, **options)
        if isinstance(fs, LocalFileSystem):
            path = absolute(path)
    except ImportError as error:
        raise InvalidInput("address", address, f"an address whose package is installed ({error})") from error
    except ValueError as error:
        raise InvalidInput("address", address, f"a path or an fsspec address ({error})") from error
    return fs, path


def absolute(path: str) -> str:
    """Returns an absolute path without `.` and `..`. Links keep their names, except before a `..`.

    >>> absolute("/data/./train-000000.tar")
    '/data/train-000000.tar'
    """
    parts = path.split("/")
    if ".." in parts:  # the parent of a link's target is meant
        last = len(parts) - parts[::-1].index("..")
        path = "/".join([os.path.realpath("/".join(parts[:last])), *parts[last:]])
    return os.path.abspath(path)


def real_address(address: str) -> str:
    """Returns the address of the file or folder itself, where an address leads to it by links."""
    fs, path = open_address(address)
    return str(fs.unstrip_protocol(os.path.realpath(path) if isinstance(fs, LocalFileSystem) else path))


def file_sha256(fs: Any, path: str) -> str:
    """Returns the SHA-256 of a file's content. Raises OSError."""
    with fs.open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
