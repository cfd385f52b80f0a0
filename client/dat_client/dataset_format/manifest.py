"""The recipe file and the manifest entries of a precomputed dataset."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

from dat_client.dataset_format.left_out import Row
from dat_client.errors import shown

FORMAT = 1  # the value of "format" in precompute.json
RECIPE_FILE = "precompute.json"
MANIFEST_FOLDER = "manifest"


class Rule(NamedTuple):
    """Decides which values a field of a JSON object may have; `limit` describes them in error messages."""

    limit: str
    holds: Callable[[Any], bool]


def _integer(least: int) -> Rule:
    return Rule(f"an integer of at least {least}", lambda value: type(value) is int and value >= least)


def _optional(rule: Rule) -> Rule:
    return Rule(f"{rule.limit}, or null", lambda value: value is None or rule.holds(value))


TEXT = Rule("a text", lambda value: isinstance(value, str))
TEXTS = Rule(
    "a list of texts", lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value)
)
NUMBER = Rule("a number", lambda value: type(value) in (int, float))
OBJECT = Rule("an object", lambda value: isinstance(value, dict))
LIST = Rule("a list", lambda value: isinstance(value, list))

SETTINGS = {
    "codec": TEXT, "fingerprint": TEXT, "engine": TEXT, "device": TEXT, "dtype": TEXT, "tricks": TEXT,
    "threads": _integer(0), "outputs": TEXTS, "picture": TEXT, "quality": _integer(1),
    "resize": _optional(_integer(1)), "crop": _optional(_integer(1)), "augment": _integer(0),
    "replace_fraction": NUMBER, "variants": _integer(1), "seed": _integer(0), "keep": _optional(TEXTS),
    "classes": _optional(TEXTS), "pictures_a_shard": _optional(_integer(1)),
    "upright": Rule("true or false", lambda value: isinstance(value, bool)),
}  # fmt: skip
ENTRY = {
    "shard": TEXT, "samples": _integer(0), "bytes": _integer(0), "sha256": TEXT, "settings": TEXT,
    "skipped": LIST, "source": OBJECT, "left_out": LIST,
}  # fmt: skip
SKIPPED = {"key": TEXT, "reason": TEXT}
LEFT_OUT = {"reason": TEXT, "count": _integer(1), "names": TEXTS}
SOURCE = {"name": TEXT, "bytes": _integer(0), "sha256": TEXT}


def parsed_json(text: str | bytes) -> Any:
    """Returns the value of a JSON text. Raises ValueError if it is not JSON, or nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its brackets are nested too deeply") from error


def check_fields(record: Any, rules: Mapping[str, Rule]) -> None:
    """Raises ValueError if `record` is not an object that has all fields of `rules`, with values they allow."""
    if not isinstance(record, dict):
        raise ValueError(f"{shown(record)} is not a JSON object")
    for name, rule in rules.items():
        if name not in record:
            raise ValueError(f"{name} is missing")
        if not rule.holds(record[name]):
            raise ValueError(f"{name} is {shown(record[name])}, must be {rule.limit}")


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises ValueError if one of the settings of a recipe has a wrong type; settings may be absent."""
    check_fields(settings, {name: rule for name, rule in SETTINGS.items() if name in settings})


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
        left_out: files of the source shard that belong to no sample: reason, number, and the first names.
        lacking: (field, number of samples that lack it) of the fields that were to be kept.
    """

    shard: str
    samples: int
    nbytes: int
    sha256: str
    settings: str
    skipped: tuple[tuple[str, str], ...]
    source: tuple[str, int, str]
    left_out: tuple[Row, ...] = ()
    lacking: tuple[tuple[str, int], ...] = ()

    def to_json(self) -> bytes:
        record = asdict(self)
        record |= {
            "bytes": record.pop("nbytes"),
            "skipped": [{"key": key, "reason": reason} for key, reason in self.skipped],
            "source": dict(zip(SOURCE, self.source, strict=True)),
            "left_out": [dict(zip(LEFT_OUT, row, strict=True)) for row in self.left_out],
            "lacking": dict(self.lacking),
        }
        if not self.lacking:
            del record["lacking"]
        return (json.dumps(record, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, text: bytes, shard: str | None = None) -> Self:
        """Parses the manifest entry of `shard`, or of any shard if that is None; raises as `checked_entry` does."""
        record = checked_entry(text, shard)
        return cls(
            record["shard"], record["samples"], record["bytes"], record["sha256"], record["settings"],
            tuple((sample["key"], sample["reason"]) for sample in record["skipped"]),
            (record["source"]["name"], record["source"]["bytes"], record["source"]["sha256"]),
            tuple((row["reason"], row["count"], tuple(row["names"])) for row in record["left_out"]),
            tuple(record.get("lacking", {}).items()),
        )  # fmt: skip


def checked_entry(text: bytes, shard: str | None = None) -> dict[str, Any]:
    """Parses the manifest entry of `shard`, or of any shard if that is None, and returns it as the JSON has it.

    Older entries have no `left_out`; it is then added, empty. Raises ValueError if `text` is not an entry's JSON.
    """
    record = parsed_json(text)
    if isinstance(record, dict):
        record.setdefault("left_out", [])
    check_fields(record, ENTRY)
    check_fields(record["source"], SOURCE)
    for sample in record["skipped"]:
        check_fields(sample, SKIPPED)
    for row in record["left_out"]:
        check_fields(row, LEFT_OUT)
    lacking = record.get("lacking", {})
    check_fields({"lacking": lacking}, {"lacking": OBJECT})
    check_fields(lacking, dict.fromkeys(lacking, _integer(1)))
    if shard is not None and record["shard"] != shard:
        raise ValueError(f"it is the entry of {shown(record['shard'])}, not of {shard}")
    entry: dict[str, Any] = record
    return entry


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
