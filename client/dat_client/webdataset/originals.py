"""Finds the original pictures from which `dat precompute` made a dataset, in shards or in a folder of pictures."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any

from fsspec.core import url_to_fs

from dat_client.dataset_format.naming import expand, key_and_suffix, picture_field, source_name
from dat_client.dataset_format.tar_samples import DamagedShard, Sample, samples_in_tar
from dat_client.errors import InvalidDataset
from dat_client.wire.vocabulary import PICTURE_SUFFIXES, TAR_SUFFIXES


def address(folder: str | os.PathLike[str]) -> str:
    """Returns an fsspec address unchanged, and a local path as an absolute one, without a trailing slash.

    Worker processes may have a working directory different from the trainer's.
    """
    text = os.fspath(folder)
    return (text if "://" in text else os.path.abspath(os.path.expanduser(text))).rstrip("/")


def read_shard(url: str) -> Iterator[Sample]:
    """Yields the samples of a shard, plain or compressed.

    Raises InvalidDataset if the shard is damaged, and OSError if it cannot be read.
    """
    fs, path = url_to_fs(url)
    with fs.open(path, "rb") as stream:
        try:
            yield from samples_in_tar(stream)
        except DamagedShard as error:
            raise InvalidDataset(f"{url}: not a whole tar file ({error}); copy or make it again") from error


def made_from_pictures(settings: Mapping[str, Any]) -> bool:
    """Returns True if the dataset was made from a folder of pictures, False if it was made from shards."""
    return bool(settings.get("pictures_a_shard"))


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


def picture_finder(origin: str, pictures: bool) -> Callable[[str], bytes | None]:
    """Returns a function that finds the encoded original picture of a sample by the sample's key.

    The function returns None if the source has no sample of that key. `origin` is an address from `locate_sources`.
    A shard is read only once, from front to back, so keys must be requested in the shard's order. The function
    raises InvalidDataset if a sample has no picture or several, and OSError.
    """
    if pictures:
        return partial(_picture_in_folder, origin)
    samples = read_shard(origin)

    def picture_in_shard(key: str) -> bytes | None:
        sample = next((sample for sample in samples if sample.key == key), None)
        if sample is None:
            return None
        try:
            return sample.fields[picture_field(sample.fields)]
        except ValueError as error:
            raise InvalidDataset(f"{origin}, sample {key}: {error}") from error

    return picture_in_shard


def _picture_in_folder(origin: str, key: str) -> bytes | None:
    folder, _, last = key.rpartition("/")
    url = f"{origin}/{folder}".rstrip("/")
    names = _pictures_of(url).get(last, [])
    if len(names) > 1:
        raise InvalidDataset(f"source: {len(names)} files of {url} have the key {key}, must be one: rename some")
    if not names:
        return None
    fs, path = url_to_fs(f"{url}/{names[0]}")
    content: bytes = fs.cat_file(path)
    return content


@lru_cache(maxsize=1)  # keys come folder by folder, and one folder may hold the pictures of many shards
def _pictures_of(url: str) -> dict[str, list[str]]:
    """Returns the file names of the pictures in a folder, grouped by the last part of their key."""
    fs, path = url_to_fs(url)
    found: dict[str, list[str]] = {}
    for name in map(posixpath.basename, fs.ls(path, detail=False)):
        if name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith("."):
            found.setdefault(key_and_suffix(name)[0], []).append(name)
    return found
