"""Names in a dataset: of shards, of a sample's key and of its fields."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

from dat_client.wire.vocabulary import PICTURE_SUFFIXES, TAR_SUFFIXES

INDICES_FIELD = "indices.npy"
VIEWS_FIELD = "views.json"

# webdataset's rule: a key reaches to the first dot of the file's name, and the rest is the field. Files whose name
# begins with a dot (macOS adds some) have no key.
MEMBER_NAME = re.compile(r"^((?:.*/|)[^./][^./]*)[.]([^/]*)$", re.DOTALL)
METADATA_NAME = re.compile(r"__[^/]*__($|/)")  # webdataset skips such members


def key_and_field(member: str) -> tuple[str, str] | None:
    """Splits the name of a shard's member into key and field, as webdataset does; None where it has no field.

    >>> key_and_field("val/n01440764_36.seg.PNG")
    ('val/n01440764_36', 'seg.png')
    """
    match = MEMBER_NAME.match(member)
    return (match[1], match[2].lower()) if match and not METADATA_NAME.match(member) else None


def key_and_suffix(path: str) -> tuple[str, str]:
    """Splits the path of a picture in a folder into the key of its sample and its suffix.

    Dots of the file's name become `_`, because a key ends at the first dot of a name.

    >>> key_and_suffix("tabby/img.7.JPG")
    ('tabby/img_7', 'jpg')
    """
    stem, suffix = posixpath.splitext(path)
    folder, slash, name = stem.rpartition("/")
    return folder + slash + name.replace(".", "_"), suffix[1:].lower()


def picture_field(fields: Collection[str]) -> str:
    """Returns the name of the field that holds a sample's picture: the only one, or the only one without a dot.

    >>> picture_field(["cls", "jpg", "seg.png"])
    'jpg'

    Raises ValueError where there is none, or more than one.
    """
    pictures = [name for name in fields if f".{name}".endswith(PICTURE_SUFFIXES)]
    candidates = [name for name in pictures if "." not in name] or pictures
    if len(candidates) == 1:
        return candidates[0]
    present = (", ".join(fields) or "nothing")[:200]
    found, hint = ("several pictures", "; keys end at the first dot of a name") if pictures else ("no picture", "")
    raise ValueError(f"{found} ({', '.join(PICTURE_SUFFIXES)}) among its fields: {present}{hint}")


def number_of_views(augment: int, variants: int) -> int:
    """Returns how many views each sample has: one centre view or `augment` crops, each in `variants` variants."""
    return max(1, augment) * variants


def view_prefix(view: int, views: int) -> str:
    """Returns what precedes the field names of a view; nothing where a sample has a single view.

    >>> view_prefix(2, 4) + INDICES_FIELD
    '2.indices.npy'
    """
    return f"{view}." if views > 1 else ""


def output_name(source_name: str) -> str:
    """Returns the name of the shard that is made from a source shard; it always ends in .tar.

    >>> output_name("val/000.TAR.GZ")
    'val/000.tar'
    """
    suffix = next((s for s in TAR_SUFFIXES if source_name.lower().endswith(s)), "")
    return source_name[: len(source_name) - len(suffix)] + ".tar"


def source_name(shard: str, source_address: str) -> str:
    """Returns the name that a shard's source has below the folder of sources; the inverse of `output_name`.

    >>> source_name("val/000.tar", "s3://elsewhere/imagenet/val/000.TAR.GZ")
    'val/000.TAR.GZ'
    """
    stem = shard.removesuffix(".tar")
    return stem + posixpath.basename(source_address)[len(posixpath.basename(stem)) :]


def expand(pattern: str, open_address: Callable[[str], tuple[Any, str]]) -> Iterator[tuple[str, list[str]]]:
    """Yields each address that the braces of a pattern stand for, with the addresses that its wildcards match.

    A file or folder that exists stands for itself, whatever characters its name has; an address without wildcards
    matches itself, whether it exists or not. `open_address` returns an address's fsspec file system and the path
    in it. Raises ValueError for braces that are not in pairs.
    """
    from braceexpand import braceexpand  # not part of a plain dat-client

    def exists(address: str) -> bool:
        fs, path = open_address(address)
        return bool(fs.exists(path))

    for address in braceexpand(pattern) if "{" in pattern and not exists(pattern) else [pattern]:
        fs, path = open_address(address)
        if any(character in path for character in "*?[") and not fs.exists(path):
            yield address, [fs.unstrip_protocol(match) for match in sorted(fs.glob(path))]
        else:
            yield address, [address]
