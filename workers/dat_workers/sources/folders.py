"""Lists a folder at any address, and divides a folder of pictures into shards."""

from __future__ import annotations

import hashlib
import posixpath
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Self

from fsspec.implementations.local import LocalFileSystem

from dat_client.dataset_format.folders import LinkCycle, Listing, list_folder
from dat_client.dataset_format.left_out import LeftOut
from dat_client.dataset_format.naming import PICTURE_SUFFIXES, passed_over_name, suffix_reason
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
        if not self.files:
            return self.address
        # What other shards hold decides about a picture that repeats a key of theirs.
        elsewhere = [name for pair in self.repeated if pair[1] not in self.files for name in pair]
        names = hashlib.sha256("\n".join([*self.files, *elsewhere]).encode("utf-8", "surrogateescape"))
        return f"{self.address}#{names.hexdigest()[:12]}"

    def with_problems(self, problems: dict[str, str]) -> Self:
        """Returns a copy whose reader reports these problems, reasons by key, before its samples."""
        return replace(self, problems=(*self.problems, *problems.items()))


@dataclass(frozen=True)
class PictureFolder:
    """A folder of pictures: its shards, its classes (None if there are none), and the reason of each problem."""

    shards: list[Shard]
    classes: tuple[str, ...] | None
    problems: dict[str, str]


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
    address: str, root: str, listing: Listing, pictures_a_shard: int, *, labelled: bool, left_out: LeftOut
) -> PictureFolder:
    """Divides a folder of pictures into shards; its sub-folders, if they hold the pictures, are the classes.

    A link that leads nowhere and is named like a picture is one of the pictures, so that it is listed in its shard.
    Where the pictures are `labelled`, a class folder without pictures is a problem: with every class, it has the
    position that torchvision's ImageFolder(allow_empty=True) gives it. Raises InvalidInput for a folder without
    pictures, and for one with pictures both in and beside class folders if they are labelled.
    """
    others: dict[str, Counter[str]] = {}
    for name in listing.files:
        if reason := suffix_reason(name):
            left_out.add(reason, f"{root}/{name}")
            others.setdefault(name.split("/")[0], Counter())[posixpath.splitext(name)[1].lower()] += 1
    names = sorted(name for name in (*listing.files, *listing.problems) if not suffix_reason(name))
    problems = dict(listing.problems)
    classes: tuple[str, ...] | None = None
    if labelled:
        loose = next((name for name in names if "/" not in name), None)
        classed = next((name for name in names if "/" in name), None)
        if loose and classed:
            raise InvalidInput(
                "source", loose, f"pictures in a folder of their class ({classed.split('/')[0]}/...), like the rest"
            )
        top_folders = tuple(name for name in listing.folders if "/" not in name)
        classes = top_folders if top_folders and not loose else None
        filled = {name.split("/")[0] for name in (*names, *listing.problems)}
        for name in classes or ():
            if name not in filled:
                problems[f"{name}/"] = f"a class folder without pictures{_listed(others.get(name))}"
    if not names:
        held = _listed(sum(others.values(), Counter()))
        suffixes = ", ".join(PICTURE_SUFFIXES)
        raise InvalidInput("source", root, "", f"{root} holds neither shards nor pictures ({suffixes}){held}")
    shards = []
    for i, start in enumerate(range(0, len(names), pictures_a_shard)):
        part = tuple(names[start : start + pictures_a_shard])
        shards.append(Shard(f"{i:06d}.tar", address, sum(listing.files.get(name, 0) for name in part), part))
    pictures = set(names)
    shards[0] = shards[0].with_problems({name: why for name, why in problems.items() if name not in pictures})
    return PictureFolder(shards, classes, problems)


def _listed(suffixes: Counter[str] | None) -> str:
    """Returns the number of other files by suffix, as the end of a sentence."""
    if not suffixes:
        return ""
    return ": it has " + ", ".join(f"{n} {suffix or 'without a suffix'}" for suffix, n in suffixes.most_common(5))
