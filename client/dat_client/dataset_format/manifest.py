"""The recipe file and the manifest entries of a precomputed dataset."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Self

FORMAT = 1  # the value of "format" in precompute.json
RECIPE_FILE = "precompute.json"
MANIFEST_FOLDER = "manifest"
SOURCE_KEYS = ("name", "bytes", "sha256")


@dataclass(frozen=True)
class ManifestEntry:
    """The manifest's record of one finished shard.

    Attributes:
        shard: the path of the shard below DST.
        samples: the number of samples in the shard.
        nbytes, sha256: the size in bytes and the SHA-256 of the shard's file.
        settings: the id of the recipe with which the shard was made.
        skipped: (key, reason) of each sample that was left out.
        source: address, size in bytes and SHA-256 of the file from which the shard was made.
    """

    shard: str
    samples: int
    nbytes: int
    sha256: str
    settings: str
    skipped: tuple[tuple[str, str], ...]
    source: tuple[str, int, str]

    def to_json(self) -> bytes:
        record = asdict(self)
        record |= {
            "bytes": record.pop("nbytes"),
            "skipped": [{"key": key, "reason": reason} for key, reason in self.skipped],
            "source": dict(zip(SOURCE_KEYS, self.source, strict=True)),
        }
        return (json.dumps(record, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """Parses a manifest entry. Raises ValueError if `text` is not the JSON of one."""
        try:
            record = json.loads(text)
            record["skipped"] = tuple((sample["key"], sample["reason"]) for sample in record["skipped"])
            record["nbytes"] = record.pop("bytes")
            record["source"] = tuple(record["source"][key] for key in SOURCE_KEYS)
            return cls(**{field.name: record[field.name] for field in fields(cls)})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a manifest entry ({type(error).__name__}: {error})") from error


def entry_path(shard: str) -> str:
    """Returns the path below DST of a shard's manifest entry.

    >>> entry_path("val/000.tar")
    'manifest/val/000.tar.json'
    """
    return f"{MANIFEST_FOLDER}/{shard}.json"


def shard_of_entry(path: str) -> str | None:
    """Returns the shard whose manifest entry is at `path` below DST/manifest; None if `path` is not an entry.

    >>> shard_of_entry("val/000.tar.json"), shard_of_entry(".000.tar.json.7f3a.tmp")
    ('val/000.tar', None)
    """
    return path.lstrip("/").removesuffix(".json") if path.endswith(".json") else None
