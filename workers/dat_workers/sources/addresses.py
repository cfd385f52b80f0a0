"""Opens paths and fsspec addresses, and names them in the errors of their storage."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
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
def naming_address(address: str | Sequence[str]) -> Iterator[None]:
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
            path = os.path.realpath(path)  # so that a file has a single name
    except ImportError as error:
        raise InvalidInput("address", address, f"an address whose package is installed ({error})") from error
    except ValueError as error:
        raise InvalidInput("address", address, f"a path or an fsspec address ({error})") from error
    return fs, path


def file_sha256(fs: Any, path: str) -> str:
    """Returns the SHA-256 of a file's content. Raises OSError."""
    with fs.open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
