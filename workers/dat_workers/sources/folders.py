"""Lists a folder at any address, and divides a folder of pictures into shards."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, Self

from fsspec.implementations.local import LocalFileSystem

from dat_client.dataset_format.folders import LinkCycle, Listing, Pictures, list_folder, other_types
from dat_client.dataset_format.naming import PICTURE_SUFFIXES, passed_over_name
from dat_workers.errors import InvalidInput

PICTURES_A_SHARD = 1000


@dataclass(frozen=True)
class Shard:
    """One source shard: the `address` of a tar, or `files` below `address`, a folder of pictures.

    name: the path of the output shard, relative to DST. nbytes: the size of the source, or 0 if its storage does
    not report sizes. repeated: the files whose key an earlier picture has, perhaps in another shard, each with the
    name of that picture. problems: (key, reason) of folders and links that no sample can stand for.
    """

    name: str
    address: str
    nbytes: int
    files: tuple[str, ...] = ()
    problems: tuple[tuple[str, str], ...] = ()
    repeated: tuple[tuple[str, str], ...] = ()

    @property
    def origin(self) -> str:
        """The source as the manifest records it: the address and, for pictures, a digest of their names."""
        return f"{self.address}#{self.digest}" if self.files else self.address

    @property
    def digest(self) -> str:
        """Twelve hex digits that stand for the names of the pictures; "" for a tar."""
        if not self.files:
            return ""
        # What other shards hold decides about a picture that repeats a key of theirs.
        elsewhere = [name for pair in self.repeated if pair[1] not in self.files for name in pair]
        names = hashlib.sha256("\n".join([*self.files, *elsewhere]).encode("utf-8", "surrogateescape"))
        return names.hexdigest()[:12]

    def with_problems(self, problems: dict[str, str]) -> Self:
        """Returns a copy whose reader reports these problems, reasons by key, before its samples."""
        return replace(self, problems=(*self.problems, *problems.items()))


def list_address(fs: Any, path: str) -> Listing:
    """Returns everything below a folder. Raises InvalidInput for a link to a folder that contains it."""
    if not isinstance(fs, LocalFileSystem):
        return _list_remote(fs, path)
    try:
        return list_folder(path)
    except LinkCycle as error:
        raise InvalidInput("source", path, "folders without a cycle of links", str(error)) from error


def _list_remote(fs: Any, path: str) -> Listing:
    """Lists a folder of a remote storage; on an object store, a folder is there if a file is in it."""
    root = path.rstrip("/") + "/"
    listing = Listing()
    folders: set[str] = set()
    passed: set[str] = set()
    for found, info in sorted(fs.find(path, withdirs=True, detail=True).items()):
        name = found.removeprefix(root)
        if found.rstrip("/") + "/" == root:
            continue
        parts = name.rstrip("/").split("/")
        reasons = [passed_over_name(part) for part in parts]
        if any(reasons):
            first = next(i for i, reason in enumerate(reasons) if reason)
            whole = "/".join(parts[: first + 1])
            if whole not in passed:
                listing.left_out.add(reasons[first], whole)
            passed.add(whole)
            continue
        is_folder = info["type"] == "directory" or name.endswith("/")
        folders.update("/".join(parts[:depth]) for depth in range(1, len(parts) + is_folder))
        if not is_folder:
            listing.files[name] = info.get("size") or 0
    listing.folders = sorted(folders)
    return listing


def divide_pictures(
    address: str, root: str, listing: Listing, pictures: Pictures, pictures_a_shard: int
) -> list[Shard]:
    """Divides the pictures of a folder into shards. Raises InvalidInput for a folder without pictures."""
    names = pictures.names
    if not names:
        suffixes = ", ".join(PICTURE_SUFFIXES)
        held = other_types(listing)
        raise InvalidInput("source", root, "", f"{root} holds neither shards nor pictures ({suffixes}){held}")
    shards = []
    for i, start in enumerate(range(0, len(names), pictures_a_shard)):
        part = names[start : start + pictures_a_shard]
        shards.append(Shard(f"{i:06d}.tar", address, sum(listing.files.get(name, 0) for name in part), part))
    read = set(names)
    shards[0] = shards[0].with_problems({name: why for name, why in pictures.problems.items() if name not in read})
    return shards
