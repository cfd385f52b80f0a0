"""Lists a folder of pictures or of shards by the rule that all readers share.

- Names that begin with a dot (`.DS_Store`, `._1.jpg`) and folders named `__MACOSX` are passed over.
- Links are followed, as torchvision's ImageFolder follows them. A link to a folder that contains it is refused.
- FIFOs, sockets and devices are passed over; they are never opened, because reading one may wait forever.
- Links that lead nowhere and folders that cannot be listed are problems, which the caller must report.
"""

from __future__ import annotations

import os
import posixpath
import stat
from collections import Counter
from dataclasses import dataclass, field

from dat_client.dataset_format.left_out import LeftOut
from dat_client.dataset_format.naming import passed_over_name, suffix_reason

SPECIAL_FILES = (
    (stat.S_ISFIFO, "FIFOs are not read"),
    (stat.S_ISSOCK, "sockets are not read"),
    (lambda mode: True, "devices are not read"),
)


class LinkCycle(ValueError):
    """A link in a folder leads to a folder that contains the link, so the folder has no end."""


@dataclass
class Listing:
    """Everything below a folder, named by the path below it with `/` between the parts.

    Attributes:
        files: the size in bytes of each regular file.
        folders: all folders, the empty ones too, without a slash at the end.
        problems: the reason for each name that should have been read and cannot be.
        left_out: names that are passed over.
    """

    files: dict[str, int] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    left_out: LeftOut = field(default_factory=LeftOut)


def list_folder(folder: str) -> Listing:
    """Returns everything below a local folder; each file is looked up once.

    Raises LinkCycle for a link to a folder that contains it, and OSError if `folder` itself cannot be listed.

    >>> list_folder("/data/imagenet/train").folders[0]                            # doctest: +SKIP
    'n01440764'
    """
    listing = Listing()
    # The second part has the real path of the root, and that of each folder in which a link was followed.
    waiting: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(folder),))]
    while waiting:
        below, entered = waiting.pop()
        try:
            with os.scandir(os.path.join(folder, below)) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if not below:
                raise
            listing.problems[f"{below}/"] = f"this folder cannot be listed: {error.strerror}"
            continue
        for entry in found:
            name = f"{below}/{entry.name}" if below else entry.name
            if reason := passed_over_name(entry.name):
                listing.left_out.add(reason, name)
                continue
            try:
                mode = _mode(entry)
            except OSError as error:
                listing.problems[name] = _problem(entry, error)
                continue
            if stat.S_ISDIR(mode):
                listing.folders.append(name)
                waiting.append((name, _entered(entry, entered) if entry.is_symlink() else entered))
            elif stat.S_ISREG(mode):
                listing.files[name] = entry.stat().st_size
            else:
                listing.left_out.add(next(reason for is_kind, reason in SPECIAL_FILES if is_kind(mode)), name)
    listing.files = dict(sorted(listing.files.items()))
    listing.problems = dict(sorted(listing.problems.items()))
    listing.folders.sort()
    return listing


def _mode(entry: os.DirEntry[str]) -> int:
    """Returns the file mode of an entry, after links. A plain folder is recognised without a look at the disk."""
    if entry.is_dir(follow_symlinks=False):
        return stat.S_IFDIR
    return entry.stat().st_mode  # the entry remembers it


def _problem(entry: os.DirEntry[str], error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"a link to {os.readlink(entry.path)}: {reason}" if entry.is_symlink() else reason


def _entered(link: os.DirEntry[str], entered: tuple[str, ...]) -> tuple[str, ...]:
    """Returns `entered` with the folder of a link and its target. Raises LinkCycle if the target holds the link.

    Every endless descent passes a link whose target contains a folder in which a link was followed before, so no
    other check is needed.
    """
    target = os.path.realpath(link.path)
    chain = (*entered, os.path.realpath(os.path.dirname(link.path)))
    if any(f"{folder}/".startswith(f"{target.rstrip('/')}/") for folder in chain):
        raise LinkCycle(
            f"{link.path} is a link to {os.readlink(link.path)}, a folder that contains this link: "
            "remove the link, or name folders without it"
        )
    return (*chain, target)


class LoosePictures(ValueError):
    """A folder has pictures both beside its class folders and in them, so the class of the former is unknown."""


@dataclass(frozen=True)
class Pictures:
    """The pictures of a folder.

    Attributes:
        names: their paths below the folder, sorted. A link that leads nowhere and is named like a picture is one of
            them, so that it is found and reported when it is read.
        classes: the names of the class folders, whose positions are the labels; None if there are none.
        problems: the reason for each name that should have been read and cannot be; for labelled pictures, for each
            class without pictures too.
        left_out: files of other types.
    """

    names: tuple[str, ...]
    classes: tuple[str, ...] | None
    problems: dict[str, str]
    left_out: LeftOut


def pictures_of(listing: Listing, *, labelled: bool = True) -> Pictures:
    """Returns the pictures of a listed folder.

    Classes are the class folders as they stand: each has the position that torchvision's
    ImageFolder(allow_empty=True) gives it. Raises LoosePictures if the pictures are `labelled`.
    """
    left_out = LeftOut()
    for name in listing.files:
        if reason := suffix_reason(name):
            left_out.add(reason, name)
    names = tuple(sorted(name for name in (*listing.files, *listing.problems) if not suffix_reason(name)))
    problems = dict(listing.problems)
    if not labelled:
        return Pictures(names, None, problems, left_out)
    loose = next((name for name in names if "/" not in name), None)
    classed = next((name for name in names if "/" in name), None)
    if loose and classed:
        raise LoosePictures(f"{loose} is in no folder of a class, unlike {classed}: move it into one")
    classes = tuple(name for name in listing.folders if "/" not in name)
    if loose or not classes:
        return Pictures(names, None, problems, left_out)
    filled = {name.split("/")[0] for name in (*names, *listing.problems)}
    for name in classes:
        if name not in filled:
            problems[f"{name}/"] = f"a class folder without pictures{other_types(listing, f'{name}/')}"
    return Pictures(names, classes, problems, left_out)


def other_types(listing: Listing, prefix: str = "") -> str:
    """Returns how many files of each other type are below `prefix`, as the end of a sentence, "" if none are."""
    counts = Counter(
        posixpath.splitext(name)[1].lower() or "without a suffix"
        for name in listing.files
        if name.startswith(prefix) and suffix_reason(name)
    )
    return ": it has " + ", ".join(f"{n} {suffix}" for suffix, n in counts.most_common(5)) if counts else ""
