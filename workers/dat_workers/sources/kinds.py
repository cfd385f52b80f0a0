"""Recognises data that are not shards, by name or by their first bytes, and says what to do with them."""

from __future__ import annotations

from dat_client.dataset_format.naming import PICTURE_SUFFIXES, TAR_SUFFIXES
from dat_workers.errors import InvalidInput

ZIP = "a zip archive, which is not read: unpack it and name the folder"
ZSTD = "compressed with zstd, which is not read: unpack it with `zstd -d` and name the .tar file"
SEVEN_ZIP = "a 7z archive, which is not read: unpack it and name the folder"
RAR = "a RAR archive, which is not read: unpack it and name the folder"
PICTURE = "a single picture: name the folder of its class folders, or a shard"

SUFFIXES = {".zip": ZIP, ".zst": ZSTD, ".tzst": ZSTD, ".7z": SEVEN_ZIP, ".rar": RAR}
FIRST_BYTES = 32  # the longest beginning that is compared
BEGINNINGS = (
    (b"PK\x03\x04", ZIP),
    (b"PK\x05\x06", ZIP),  # an empty one
    (b"\x28\xb5\x2f\xfd", ZSTD),
    (b"7z\xbc\xaf\x27\x1c", SEVEN_ZIP),
    (b"Rar!\x1a\x07", RAR),
    (b"\xff\xd8\xff", PICTURE),
    (b"\x89PNG\r\n\x1a\n", PICTURE),
    (b"GIF8", PICTURE),
    (b"RIFF", PICTURE),
    (b"II*\0", PICTURE),
    (b"MM\0*", PICTURE),
    (b"version https://git-lfs", "a pointer of Git LFS instead of the data: run `git lfs pull`"),
    (b"<", "a page of HTML or XML, perhaps a server's error: download the shard again"),
)


def advice_by_name(path: str) -> str:
    """Returns the kind of a file and what to do with it, or "" if its name may be that of a shard.

    >>> advice_by_name("train.tar.zst")
    'compressed with zstd, which is not read: unpack it with `zstd -d` and name the .tar file'
    """
    lower = path.lower()
    if lower.endswith(TAR_SUFFIXES):
        return ""
    if lower.endswith(PICTURE_SUFFIXES):
        return PICTURE
    return next((advice for suffix, advice in SUFFIXES.items() if lower.endswith(suffix)), "")


def advice_by_content(first_bytes: bytes) -> str:
    """Returns the kind of a file that is not a tar archive, and what to do with it; "" if it is unknown.

    >>> advice_by_content(b"PK" + bytes([3, 4]) + bytes(28))
    'a zip archive, which is not read: unpack it and name the folder'
    """
    if not first_bytes:
        return "an empty file: make or copy it again"
    return next((advice for beginning, advice in BEGINNINGS if first_bytes.startswith(beginning)), "")


def refuse_command(source: str) -> None:
    """Raises InvalidInput for `pipe:COMMAND`, which webdataset would run."""
    if source.startswith("pipe:"):
        raise InvalidInput(
            "source",
            source,
            "",
            f"{source}: commands are not run; name files or an address such as s3://bucket/train",
        )
