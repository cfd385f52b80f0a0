"""Finds the original pictures from which `dat precompute` made a dataset, in shards or in a folder of pictures."""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Self

from fsspec.core import url_to_fs

from dat_client.dataset_format.naming import (
    TAR_SUFFIXES,
    expand,
    key_and_suffix,
    passed_over_name,
    picture_field,
    source_name,
    suffix_reason,
)
from dat_client.dataset_format.tar_samples import DamagedShard, Sample, samples_in_tar
from dat_client.errors import InvalidDataset


def address(folder: str | os.PathLike[str]) -> str:
    """Returns an fsspec address unchanged, and a local path as an absolute one, without a trailing slash.

    Worker processes may have a working directory different from the trainer's.
    """
    text = os.fspath(folder)
    return (text if "://" in text else os.path.abspath(os.path.expanduser(text))).rstrip("/")


def read_shard(url: str) -> Generator[Sample, None, None]:
    """Yields the samples of a shard, plain or compressed.

    Raises InvalidDataset if the shard is damaged, and OSError if it cannot be read.
    """
    fs, path = url_to_fs(url)
    with fs.open(path, "rb") as stream:
        try:
            yield from samples_in_tar(stream)
        except DamagedShard as error:
            raise InvalidDataset(f"{url}: not a whole tar file ({error}); copy or make it again") from error


@dataclass(frozen=True)
class Originals:
    """Finds the original pictures of a dataset's samples in the source.

    Attributes:
        sources: for each shard of the dataset, the address of its source: a shard, or a folder of pictures.
        pictures: True if the dataset was made from a folder of pictures.
        skipped: how many samples of each key the manifest lists as skipped; used for folders of pictures only.
    """

    sources: Mapping[str, str]
    pictures: bool
    skipped: Mapping[str, int]

    @classmethod
    def locate(
        cls, source: str | os.PathLike[str], manifest: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> Self:
        """Finds the source of each shard of the manifest in `source`, as `locate_sources` does."""
        pictures = bool(settings.get("pictures_a_shard"))
        skipped = Counter(sample["key"] for entry in manifest.values() for sample in entry["skipped"])
        return cls(locate_sources(source, manifest, pictures), pictures, skipped if pictures else {})

    def finder(self, shard: str) -> Callable[[str], bytes]:
        """Returns a function that returns the encoded original of a sample of `shard`, given the sample's key.

        A source shard is read only once, from front to back, so keys must be requested in the shard's order. Where
        the source has a key twice, the first one is meant: `dat precompute` skips the others. The function raises
        InvalidDataset if the source has no sample of that key, or if it has no picture or several, and OSError.
        """
        if self.pictures:
            return partial(self._picture_in_folder, self.sources[shard])
        return partial(_picture_in_shard, self.sources[shard], read_shard(self.sources[shard]), shard)

    def _picture_in_folder(self, origin: str, key: str) -> bytes:
        folder, _, last = key.rpartition("/")
        fs, root = url_to_fs(origin)
        path = f"{root}/{folder}".rstrip("/")  # joined here: "::" in an address would have a meaning
        names = _pictures_of(fs, path).get(last, [])
        if not names:
            raise InvalidDataset(f"source: sample {key} is not in {origin}")
        if len(names) - 1 > self.skipped.get(key, 0):
            raise InvalidDataset(
                f"source: {len(names)} files of {path} have the key {key}, and {self.skipped.get(key, 0)} of them "
                "are listed as skipped in the manifest, so it is not known which one Q(x) was made from: rename or "
                "remove what was added, or let dat precompute finish"
            )
        content: bytes = fs.cat_file(f"{path}/{names[0]}")
        return content


def locate_sources(source: str | os.PathLike[str], manifest: Mapping[str, Any], pictures: bool) -> dict[str, str]:
    """Returns, for each shard of the manifest, the address of the source from which it was made.

    If `pictures` is true, the dataset was made from a folder of pictures: `source` is that folder, and its address
    is returned for all shards. Otherwise `source` is a folder of shards, one shard, a brace pattern or a glob.
    Shards are matched by name, so the source may have moved. Raises InvalidDataset if the source of a shard is
    missing from `source`, or if several shards of `source` have its name.
    """
    text = os.fspath(source)
    if pictures:
        return dict.fromkeys(manifest, address(text))
    names = {shard: source_name(shard, str(entry["source"]["name"])) for shard, entry in manifest.items()}
    try:
        urls = [address(url) for _, matches in expand(text, lambda url: url_to_fs(address(url))) for url in matches]
    except ValueError as error:
        raise InvalidDataset(f"source: {text} has braces that are not in pairs: {error}") from error
    is_shard = text.lower().endswith(TAR_SUFFIXES) or posixpath.basename(text) in names.values()
    if urls == [address(text)] and not is_shard:
        return {shard: f"{urls[0]}/{name}" for shard, name in names.items()}
    by_name: dict[str, list[str]] = {}
    for url in urls:
        by_name.setdefault(posixpath.basename(url), []).append(url)
    found = {}
    for shard, name in names.items():
        matches = [url for url in by_name.get(posixpath.basename(name), []) if url.endswith(f"/{name}")]
        if len(matches) != 1:
            raise InvalidDataset(f"source: {len(matches)} of {text} are named {name}, must be exactly one")
        found[shard] = matches[0]
    return found


def _picture_in_shard(origin: str, samples: Iterator[Sample], shard: str, key: str) -> bytes:
    """Reads `samples` up to the one of this key, and returns its picture."""
    sample = next((sample for sample in samples if sample.key == key), None)
    if sample is None:
        raise InvalidDataset(f"source: sample {key} is not in {origin}, or not in the order of {shard}")
    try:
        return sample.fields[picture_field(sample.fields)]
    except ValueError as error:
        raise InvalidDataset(f"{origin}, sample {key}: {error}") from error


@lru_cache(maxsize=1)  # keys come folder by folder, and one folder may hold the pictures of many shards
def _pictures_of(fs: Any, path: str) -> dict[str, list[str]]:
    """Returns the file names of the pictures in a folder, grouped by the last part of their key and sorted."""
    found: dict[str, list[str]] = {}
    for info in fs.ls(path, detail=True):
        name = posixpath.basename(info["name"])
        if passed_over_name(name) or suffix_reason(name):
            continue
        # A link of a local folder has the type "other".
        if info["type"] == "file" or (info["type"] != "directory" and fs.isfile(info["name"])):
            found.setdefault(key_and_suffix(name)[0], []).append(name)
    return {key: sorted(names) for key, names in found.items()}
