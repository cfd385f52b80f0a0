"""Takes a checkpoint out of a zip archive, unless the sizes that the archive declares are implausible.

A zip archive of a few megabytes can unpack to many gigabytes. Weights hardly compress, so such an archive is
refused by its list of members, before any member is unpacked.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from dat_client.errors import shown
from dat_workers.codecs.spec import CodecError

# Random fp32 numbers unpack to 1.1 times their packed size, and fp16 numbers widened to fp64 to 3.2 times.
MOST_TIMES_PACKED = 16
ALWAYS_ALLOWED_BYTES = 64 << 20  # small archives may compress better, for example if all weights are zero
MOST_PICKLE_BYTES = 64 << 20  # `data.pkl` holds names and shapes; the largest published one has about 1 MB
CHUNK_BYTES = 1 << 20

# zipfile raises RuntimeError for an encrypted archive, and its subclass NotImplementedError for a compression
# method that Python does not support.
_DAMAGE = (zipfile.BadZipFile, RuntimeError, EOFError, zlib.error)


@contextmanager
def unpacked(path: Path, pattern: str, largest_bytes: int | None = None) -> Iterator[Path]:
    """Yields the path of a checkpoint that torch can map into memory: `path` itself, or a temporary copy.

    `path` may be any file. If it is a zip archive that is not itself a checkpoint, its single member that matches
    `pattern` is unpacked. If a checkpoint is a zip archive with compressed members, it is rewritten without
    compression. `largest_bytes` is the largest size that a checkpoint of the expected codec can have; None if the
    codec is unknown.

    Raises CodecError for a damaged archive, for names that occur twice, and, before anything is unpacked, for an
    archive whose members are larger than `largest_bytes` or than MOST_TIMES_PACKED times the file.
    """
    if not zipfile.is_zipfile(path):
        yield path
        return
    # The copy lies beside the archive because it has about 1 GB, and /tmp may be held in memory.
    beside = path.parent if os.access(path.parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=beside, prefix=".unzip-") as folder:
        limit = _Limit(path.stat().st_size, largest_bytes)
        file = path
        if not _is_checkpoint(file):
            file = _extract(file, pattern, Path(folder) / "member.ckpt", limit)
        if zipfile.is_zipfile(file) and _is_checkpoint(file):
            file = _without_compression(file, path, Path(folder) / "stored.ckpt", limit)
        yield file


class _Limit:
    """The largest number of bytes to which one archive may unpack, with the reason for it."""

    def __init__(self, packed_bytes: int, largest_bytes: int | None) -> None:
        times = max(ALWAYS_ALLOWED_BYTES, MOST_TIMES_PACKED * packed_bytes)
        self.bytes, self.reason = (
            times,
            f"{MOST_TIMES_PACKED} times the size of the file, as weights hardly compress",
        )
        if times == ALWAYS_ALLOWED_BYTES:
            self.reason = "the limit of a small archive, as weights hardly compress"
        if largest_bytes is not None and largest_bytes < times:
            self.bytes, self.reason = largest_bytes, "the most that a checkpoint of this codec can need"

    def check(self, path: Path, members: str, nbytes: int) -> None:
        if nbytes > self.bytes:
            raise CodecError(
                f"{path}: {members} would unpack to {nbytes} bytes; the limit is {self.bytes} bytes "
                f"({self.reason}). Nothing was unpacked. If you trust the archive, unpack it yourself and import "
                "the checkpoint in it"
            )


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except _DAMAGE as error:
        raise CodecError(f"{path} could not be unpacked: {error}") from error


def _is_checkpoint(path: Path) -> bool:
    """Returns True if a zip archive was written by `torch.save`."""
    with _opened(path) as archive:
        return any(PurePosixPath(name).name == "data.pkl" for name in archive.namelist())


def _extract(path: Path, pattern: str, target: Path, limit: _Limit) -> Path:
    """Unpacks one member as `target`, because names inside an archive must not become paths."""
    with _opened(path) as archive:
        matches = [info for info in archive.infolist() if PurePosixPath(info.filename).match(pattern)]
        if len(matches) != 1:
            names = [shown(name) for name in archive.namelist()]
            listed = ", ".join(names[:5]) + (f", and {len(names) - 5} more" if len(names) > 5 else "")
            raise CodecError(
                f"{path} must contain exactly one file matching {pattern}; found {len(matches)}. "
                f"Files there: {listed or 'none'}"
            )
        limit.check(path, pattern, matches[0].file_size)
        with archive.open(matches[0]) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, CHUNK_BYTES)
    return target


def _without_compression(file: Path, path: Path, target: Path, limit: _Limit) -> Path:
    """Checks a checkpoint's members; returns `file`, or a copy of it as `target` if a member is compressed.

    torch would unpack compressed members into memory, whatever their size, and it maps stored ones.
    """
    with _opened(file) as archive:
        members = archive.infolist()
        repeated = [name for name, times in Counter(archive.namelist()).items() if times > 1]
        if repeated:
            raise CodecError(
                f"{path} is not a checkpoint that can be read: its archive holds {shown(repeated[0])} more than "
                "once, so programs would disagree about its content"
            )
        pickles = [info for info in members if PurePosixPath(info.filename).name == "data.pkl"]
        if (size := max(info.file_size for info in pickles)) > MOST_PICKLE_BYTES:
            raise CodecError(
                f"{path}: the list of its weights, data.pkl, has {size} bytes; "
                f"the limit is {MOST_PICKLE_BYTES} bytes"
            )
        if all(info.compress_type == zipfile.ZIP_STORED for info in members):
            return file
        limit.check(path, "its members", sum(info.file_size for info in members))
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as copy:
            for info in members:
                with archive.open(info) as source, copy.open(info.filename, "w", force_zip64=True) as sink:
                    shutil.copyfileobj(source, sink, CHUNK_BYTES)
    return target
