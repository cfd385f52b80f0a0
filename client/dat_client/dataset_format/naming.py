"""Converts between the names of shards, of samples (keys) and of fields in a dataset."""

from __future__ import annotations

import glob
import posixpath
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

# The files of a folder, and the fields of a shard, that are pictures: those that torchvision's ImageFolder takes.
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
PREFERRED_FIELDS = ("jpg", "jpeg", "png", "webp")  # where a sample has one of these, bmp, tif, ... are other data
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")

INDICES_FIELD = "indices.npy"
VIEWS_FIELD = "views.json"

# webdataset's rule: a key ends before the first dot of the file's name, and the field is the text after that dot.
# Files whose name begins with a dot (macOS adds some) have no key.
MEMBER_NAME = re.compile(r"^((?:.*/|)[^./][^./]*)[.]([^/]*)$", re.DOTALL)
METADATA_NAME = re.compile(r"__[^/]*__($|/)")  # webdataset skips such members
MAC_FOLDER = "__MACOSX"  # it holds what macOS adds to an archive, under the names of the archive's own files


def key_and_field(member: str) -> tuple[str, str] | None:
    """Splits the name of a file in a shard into key and field, as webdataset does; None if it has no field.

    >>> key_and_field("val/n01440764_36.seg.PNG")
    ('val/n01440764_36', 'seg.png')
    """
    match = MEMBER_NAME.match(member)
    if match is None or METADATA_NAME.match(member) or MAC_FOLDER in member.split("/"):
        return None
    return match[1], match[2].lower()


def passed_over_name(name: str) -> str:
    """Returns the reason why a file or folder of this name is never read, or "" if it may be read.

    `name` is one part of a path.

    >>> passed_over_name("._1.jpg"), passed_over_name("1.jpg")
    ('names that begin with a dot are not read', '')
    """
    if name.startswith("."):
        return "names that begin with a dot are not read"
    return f"folders named {MAC_FOLDER} are not read" if name == MAC_FOLDER else ""


def suffix_reason(path: str, suffixes: tuple[str, ...] = PICTURE_SUFFIXES) -> str:
    """Returns the reason why the suffix of a file keeps it from being read, or "" if it is one of `suffixes`.

    >>> suffix_reason("cat/1.GIF"), suffix_reason("cat/1.JPG")
    ('.gif files are not read', '')
    """
    if path.lower().endswith(suffixes):
        return ""
    suffix = posixpath.splitext(path)[1].lower()
    return f"{suffix} files are not read" if suffix else "files without a suffix are not read"


def member_reason(member: str) -> str:
    """Returns the reason why a file of a shard is not a field of a sample, or "" if it is one.

    >>> member_reason("__MACOSX/a/._1.jpg"), member_reason("a/1.jpg")
    ('folders named __MACOSX are not read', '')
    """
    if key_and_field(member) is not None:
        return ""
    parts = member.split("/")
    if MAC_FOLDER in parts:
        return passed_over_name(MAC_FOLDER)
    if METADATA_NAME.match(member):
        return "names between two pairs of underscores are not read"
    return passed_over_name(parts[-1]) or "files without a suffix are not read"


def key_and_suffix(path: str) -> tuple[str, str]:
    """Splits the path of a picture in a folder into the key of its sample and its suffix.

    Dots before the suffix become `_` in the key, because in a shard the key ends at the first dot.

    >>> key_and_suffix("tabby/img.7.JPG")
    ('tabby/img_7', 'jpg')
    """
    stem, suffix = posixpath.splitext(path)
    folder, slash, name = stem.rpartition("/")
    return folder + slash + name.replace(".", "_"), suffix[1:].lower()


def picture_field(fields: Collection[str]) -> str:
    """Returns the name of the only picture among a sample's fields, or of the only one without a dot.

    jpg, jpeg, png and webp come before the other types: a tif beside a jpg is taken for other data.

    >>> picture_field(["cls", "jpg", "seg.png", "tif"])
    'jpg'

    Raises ValueError if no field is a picture, or if this rule leaves more than one.
    """
    pictures = [name for name in fields if f".{name}".endswith(PICTURE_SUFFIXES)]
    candidates = [name for name in pictures if "." not in name] or pictures
    candidates = [name for name in candidates if name.endswith(PREFERRED_FIELDS)] or candidates
    if len(candidates) == 1:
        return candidates[0]
    present = (", ".join(fields) or "nothing")[:200]
    found, hint = ("several pictures", "; keys end at the first dot of a name") if pictures else ("no picture", "")
    raise ValueError(f"{found} ({', '.join(PICTURE_SUFFIXES)}) among its fields: {present}{hint}")


def number_of_views(augment: int, variants: int) -> int:
    """Returns the number of views of each sample: max(1, augment) crops, each in `variants` variants."""
    return max(1, augment) * variants


def view_prefix(view: int, views: int) -> str:
    """Returns the prefix of a view's field names; it is empty if a sample has only one view.

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
    """Returns the name, below the folder of sources, of a shard's source: the inverse of `output_name`.

    >>> source_name("val/000.tar", "s3://elsewhere/imagenet/val/000.TAR.GZ")
    'val/000.TAR.GZ'
    """
    stem = shard.removesuffix(".tar")
    return stem + posixpath.basename(source_address)[len(posixpath.basename(stem)) :]


def expand(pattern: str, open_address: Callable[[str], tuple[Any, str]]) -> Iterator[tuple[str, list[str]]]:
    """Expands the braces of a pattern; yields each resulting address with the list of addresses that it matches.

    The wildcards * ? [ of an address are matched against the files that exist. Locally, links to folders are
    followed, and * does not match a name that begins with a dot. An address without wildcards matches itself,
    whether it exists or not. If a file or folder of exactly the given name exists, its braces and wildcards
    are taken as ordinary characters. `open_address` returns the fsspec file system of an address and the path in
    it. Raises ValueError if braces are not in pairs.
    """
    from braceexpand import braceexpand  # not part of a plain dat-client, nor is fsspec
    from fsspec.implementations.local import LocalFileSystem

    def exists(address: str) -> bool:
        fs, path = open_address(address)
        return bool(fs.exists(path))

    for address in braceexpand(pattern) if "{" in pattern and not exists(pattern) else [pattern]:
        fs, path = open_address(address)
        if any(character in path for character in "*?[") and not fs.exists(path):
            # fsspec's glob would not enter a linked folder on a local disk, and not say so.
            found = glob.glob(path, recursive=True) if isinstance(fs, LocalFileSystem) else fs.glob(path)
            yield address, [fs.unstrip_protocol(match) for match in sorted(found)]
        else:
            yield address, [address]
