from __future__ import annotations

import json

import pytest

from dat_client.dataset_format.manifest import ManifestEntry, entry_path, shard_of_entry

LEFT_OUT = (("names that begin with a dot are not read", 2, ("._a.jpg", "._b.jpg")),)
ENTRY = ManifestEntry(
    "a/0.tar", 2, 1024, "5f", "0123", (("x", "no picture"),), ("s3://b/0.tar", 10, "c4"), LEFT_OUT
)


def test_an_entry_comes_back_from_its_file() -> None:
    assert ManifestEntry.from_json(ENTRY.to_json()) == ENTRY
    assert json.loads(ENTRY.to_json()) == {
        "shard": "a/0.tar", "samples": 2, "bytes": 1024, "sha256": "5f", "settings": "0123",
        "skipped": [{"key": "x", "reason": "no picture"}],
        "source": {"name": "s3://b/0.tar", "bytes": 10, "sha256": "c4"},
        "left_out": [{"reason": LEFT_OUT[0][0], "count": 2, "names": ["._a.jpg", "._b.jpg"]}],
    }  # fmt: skip


def test_members_that_a_newer_writer_added_are_ignored() -> None:
    record = json.loads(ENTRY.to_json()) | {"pictures": 7}
    assert ManifestEntry.from_json(json.dumps(record).encode()) == ENTRY


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        "3",
        '{"skipped": 3}',
        '{"skipped": [], "bytes": 1, "source": {"name": "x", "bytes": 1}}',
    ],
)
def test_text_that_is_no_entry_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - json's own words, or ours
        ManifestEntry.from_json(text.encode())


def test_entries_are_found_by_their_path() -> None:
    assert shard_of_entry(entry_path("val/0.tar").removeprefix("manifest")) == "val/0.tar"
    assert shard_of_entry("/.7f3a") is None
