"""Reads what a precomputed dataset says of itself: its recipe and its manifest."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fsspec.core import url_to_fs

from dat_client.dataset_format.manifest import (
    FORMAT,
    MANIFEST_FOLDER,
    RECIPE_FILE,
    check_settings,
    checked_entry,
    parsed_json,
    shard_of_entry,
)
from dat_client.errors import InvalidDataset, shown
from dat_client.webdataset.originals import address

NEEDED_SETTINGS = {"outputs", "picture", "resize", "crop", "augment", "variants"}
MANIFEST_THREADS = 16  # manifest entries that are fetched at the same time


def read_settings(dst: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the recipe of a dataset, from precompute.json: codec, outputs, geometry and views.

    Raises InvalidDataset if the file is missing, damaged or has a format number that this version cannot read, and
    OSError.
    """
    fs, path = url_to_fs(f"{address(dst)}/{RECIPE_FILE}")
    try:
        settings = parsed_json(fs.cat_file(path))
    except (FileNotFoundError, ValueError) as error:
        problem = f"not JSON ({error})" if isinstance(error, ValueError) else "missing"
        message = f"{os.fspath(dst)}: its {RECIPE_FILE} is {problem}, so dat precompute did not write this folder"
        raise InvalidDataset(message) from error
    found = settings.get("format") if isinstance(settings, dict) else None
    if type(found) is not int or found != FORMAT:
        message = f"{os.fspath(dst)}: format {shown(found)}, this dat-client reads {FORMAT}: update dat-client"
        raise InvalidDataset(message)
    if missing := NEEDED_SETTINGS - settings.keys():
        raise InvalidDataset(f"{os.fspath(dst)}: its {RECIPE_FILE} lacks {', '.join(sorted(missing))}")
    try:
        check_settings(settings)
    except ValueError as error:
        raise InvalidDataset(f"{os.fspath(dst)}: its {RECIPE_FILE} is damaged: {error}") from error
    return dict(settings)


def read_manifest(dst: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Returns the manifest entry (samples, bytes, sha256, skipped, ...) of each finished shard, sorted by name.

    Raises InvalidDataset for an entry that cannot be parsed or is that of another shard, and OSError.
    """
    fs, folder = url_to_fs(f"{address(dst)}/{MANIFEST_FOLDER}")
    try:
        paths = sorted(path for path in fs.find(folder) if shard_of_entry(path))
    except FileNotFoundError:
        paths = []
    with ThreadPoolExecutor(MANIFEST_THREADS) as threads:  # thousands of small files, perhaps in a remote store
        contents = list(threads.map(fs.cat_file, paths))
    manifest = {}
    for path, content in zip(paths, contents, strict=True):
        try:
            entry = checked_entry(content, shard_of_entry(path.removeprefix(folder)))
        except ValueError as error:
            message = f"{path} cannot be read: {error}; run dat precompute again to make this shard again"
            raise InvalidDataset(message) from error
        manifest[entry["shard"]] = entry
    return manifest
