"""Samples of WebDataset shards, and the originals that `dat precompute` made them from: in shards or a folder."""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any

from fsspec.core import url_to_fs
from webdataset import shardlists, tariterators

from dat_client.errors import InvalidDataset

PICTURES = (".jpg", ".jpeg", ".png", ".webp")  # of a source, what x is read from
TARS = (".tar.gz", ".tgz", ".tar")

Sample = dict[str, Any]
"""Fields as bytes, and webdataset's own: `__key__`, `__url__`."""


def address(folder: str | os.PathLike[str]) -> str:
    """An fsspec address, or an absolute path: a worker process may have another working directory."""
    text = os.fspath(folder)
    return (text if "://" in text else os.path.abspath(os.path.expanduser(text))).rstrip("/")


def read_shard(url: str) -> Iterator[Sample]:
    """The samples of one shard, which may be compressed. Raises InvalidDataset for what is none, OSError."""
    fs, path = url_to_fs(url)
    with fs.open(path, "rb") as stream:
        files = tariterators.tar_file_expander([{"url": url, "stream": stream}])
        try:
            yield from tariterators.group_by_keys(files)
        except tarfile.TarError as error:
            raise InvalidDataset(f"{url}: not a whole tar file: {error.args[0]}") from error
        except ValueError as error:  # of two files of one name
            raise InvalidDataset(f"{url}: {error.args[0]}") from error


def of_pictures(settings: Mapping[str, Any]) -> bool:
    """Whether the source was a folder of pictures, not of shards."""
    return bool(settings.get("pictures_a_shard"))


def origins(source: str | os.PathLike[str], manifest: Mapping[str, Any], pictures: bool) -> dict[str, str]:
    """Where each shard's originals are: the address of a shard, or, where there were none, of a folder of pictures.

    `source` is the folder of either, a brace pattern or a glob; names are compared, so it may have moved since.
    Raises InvalidDataset where a pattern has no shard of that name, or two.
    """
    text = os.fspath(source)
    if pictures:
        return dict.fromkeys(manifest, address(text))
    pattern = any(c in text for c in "{*?[") and not _exists(text)
    if not pattern and not text.lower().endswith(TARS):
        return {shard: f"{address(text)}/{_its_name(shard, entry)}" for shard, entry in manifest.items()}
    named: dict[str, list[str]] = {}
    for one in map(address, shardlists.expand_urls(text) if pattern else [text]):
        fs, path = url_to_fs(one)
        urls = (
            [fs.unstrip_protocol(p) for p in fs.glob(path)] if pattern and any(c in path for c in "*?[") else [one]
        )
        for url in urls:
            named.setdefault(posixpath.basename(url), []).append(url)
    found = {}
    for shard, entry in manifest.items():
        name = _its_name(shard, entry)
        same = [url for url in named.get(posixpath.basename(name), []) if url.endswith(f"/{name}")]
        if len(same) != 1:
            raise InvalidDataset(f"source: {len(same)} of {text} are named {name}, must be one")
        found[shard] = same[0]
    return found


def _its_name(shard: str, entry: Mapping[str, Any]) -> str:
    """That of the shard it was made from: of any suffix, or none."""
    stem = shard.removesuffix(".tar")
    made_from = posixpath.basename(str(entry["source"].get("name", shard)))
    return stem + made_from[len(posixpath.basename(stem)) :]


def _exists(text: str) -> bool:
    fs, path = url_to_fs(address(text))
    return bool(fs.exists(path))


def originals(origin: str, pictures: bool) -> Callable[[str], Sample | None]:
    """Gives the original of a key, None where there is none; keys are asked for in the order they were read in."""
    if pictures:
        return partial(_in_folder, origin)
    samples = read_shard(origin)
    return lambda key: next((sample for sample in samples if sample["__key__"] == key), None)


def _in_folder(origin: str, key: str) -> Sample | None:
    """The picture of a key: its path without the suffix, dots in its name written `_`."""
    folder, _, stem = key.rpartition("/")
    url = f"{origin}/{folder}".rstrip("/")
    paths = _pictures_of(url).get(stem, [])
    if len(paths) > 1:
        raise InvalidDataset(f"source: {len(paths)} files of {url} have the key {key}, must be one")
    if not paths:
        return None
    fs, path = url_to_fs(f"{url}/{paths[0]}")
    return {"__key__": key, "__url__": url, posixpath.splitext(path)[1][1:].lower(): fs.cat_file(path)}


@lru_cache(maxsize=1)  # keys come folder by folder; one folder may have those of many shards
def _pictures_of(url: str) -> dict[str, list[str]]:
    """Names of the pictures in a folder, by the last part of their key."""
    fs, path = url_to_fs(url)
    found: dict[str, list[str]] = {}
    for name in map(posixpath.basename, fs.ls(path, detail=False)):
        stem, suffix = posixpath.splitext(name)
        if suffix.lower() in PICTURES and not name.startswith("."):
            found.setdefault(stem.replace(".", "_"), []).append(name)
    return found


def where(sample: Sample) -> str:
    """Names a sample in messages."""
    return f"{sample['__url__']}, sample {sample['__key__']}"


def field_of(sample: Sample, *names: str) -> bytes:
    """The first of the fields that the sample has. Raises InvalidDataset."""
    for name in names:
        if name in sample:
            content: bytes = sample[name]
            return content
    raise InvalidDataset(f"{where(sample)}: no {' or '.join(names)}, only {fields_of(sample)}")


def picture_of(sample: Sample) -> bytes:
    """The picture of an original: the one that `dat precompute` took. Raises InvalidDataset."""
    found = [name for name in sample if f".{name}".endswith(PICTURES)]
    plain = [name for name in found if "." not in name] or found
    if len(plain) != 1:
        raise InvalidDataset(f"{where(sample)}: {len(plain)} pictures, must be one, among {fields_of(sample)}")
    return field_of(sample, plain[0])


def fields_of(sample: Sample) -> str:
    """Names them."""
    return ", ".join(sorted(name for name in sample if not name.startswith("__"))) or "a key"
