"""What `dat precompute` wrote, for a PyTorch DataLoader: Q(x) or its tokens, x, labels; no service is asked.

    from dat_client.webdataset import load

    data = load("s3://bucket/imagenet-q", source="s3://bucket/imagenet", shuffle=2000)
    for x, x_hat, labels in DataLoader(data, batch_size=128, num_workers=8):
        ...

The shards are plain WebDataset and `webdataset.WebDataset` reads them as well. `load` adds what it cannot know:
which shards are finished, which of several views to take, and how x was cut from the source. Reading, grouping
and shuffling are webdataset's own.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

try:
    import numpy as np
    import torch
    import webdataset as wds
    from fsspec.core import url_to_fs
    from PIL import Image
    from torch.utils.data import IterableDataset
    from webdataset import utils
except ImportError as error:
    raise ImportError(
        "dat_client.webdataset needs webdataset, fsspec, Pillow and PyTorch: pip install 'dat-client[webdataset]'"
    ) from error

from dat_client.errors import InvalidDataset, shown
from dat_client.shards import (
    address,
    field_of,
    fields_of,
    of_pictures,
    originals,
    origins,
    picture_of,
    read_shard,
    where,
)

__all__ = ["load", "prepared", "read_manifest", "read_settings", "view_of"]

FORMAT = 1  # of precompute.json
COUNTED = 1024  # worker processes whose epochs are told apart
LISTED = 16  # manifest entries that are fetched at once


def load(
    dst: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    image: bool = False,
    tokens: bool = False,
    label: str = "cls",
    view: str | int = "random",
    shuffle: int = 0,
    seed: int = 0,
) -> Any:
    """The samples of DST as a webdataset pipeline, an IterableDataset with `.map`, `.repeat`, `.with_epoch`, ...

        load(dst)                     # (x̂, label)
        load(dst, image=True)         # (x, x̂, label), x as `--outputs image` stored it
        load(dst, source=src)         # (x, x̂, label), x cut from the source's shards as it was for Q
        load(dst, tokens=True)        # (indices, label), for `client.decode` in the training process

    x and x̂ are uint8 [3,H,W], indices int32 [h,w], tensors all; the label is an int. An epoch has every sample
    once: shards are dealt to ranks (torchrun, torch.distributed) and DataLoader's workers, always the same to
    each. So ranks may end some batches apart; `.repeat()` or `.with_epoch(n)` gives all of them the same number.

    Args:
        dst: what `dat precompute` wrote: a folder or an fsspec address. Shards without a manifest entry are not
            read.
        source: what it was made from, here or moved: a folder of shards or of pictures, an fsspec address, a brace
            pattern or a glob. Samples are paired by shard name and key; what precompute skipped is passed over.
        image: give x from DST itself.
        tokens: give indices in place of x̂.
        label: the field with the label, an integer as text.
        view: of several views of a sample `random` takes one, another in each epoch; `all` makes each a
            sample of its own; an int is the view of that number.
        shuffle: how many samples are mixed in memory, encoded; shards then come in random order too. 0: as stored.
        seed: of order and views. An epoch is a pass over this object, and each has an order of its own.

    Raises InvalidDataset for a DST that does not hold what is asked for (while iterating too, with shard and
    key), OSError.
    """
    if view not in ("random", "all") and not (type(view) is int and view >= 0):
        raise InvalidDataset(f"view: must be 'random', 'all' or the number of a view, got {shown(view)}")
    if image and source is not None:
        raise InvalidDataset("image and source: both say where x comes from, give one of them")
    settings = read_settings(dst)
    asked = ["indices" if tokens else "reconstruction"] + (["image"] if image else [])
    for output in asked:
        if output not in settings["outputs"]:
            held = ", ".join(settings["outputs"])
            raise InvalidDataset(f"{os.fspath(dst)}: holds {held}, no {output} (dat precompute --outputs)")
    manifest = read_manifest(dst)
    if not manifest:
        raise InvalidDataset(f"{os.fspath(dst)}: no shard is finished: its manifest is empty")
    made_by = {entry["settings"] for entry in manifest.values()}
    if len(made_by) > 1:
        message = f"{os.fspath(dst)}: shards of {len(made_by)} different settings: let dat precompute finish"
        raise InvalidDataset(message)
    sources = None if source is None else origins(source, manifest, of_pictures(settings))
    counts = {shard: int(entry["samples"]) for shard, entry in manifest.items()}
    field = "indices.npy" if tokens else str(settings["picture"])
    samples = _Samples(address(dst), settings, counts, sources, image, field, label, view, max(0, shuffle), seed)
    return wds.FluidWrapper(samples)


def read_settings(dst: str | os.PathLike[str]) -> dict[str, Any]:
    """DST/precompute.json: codec, outputs, geometry, views. Raises InvalidDataset where there is none."""
    fs, path = url_to_fs(f"{address(dst)}/precompute.json")
    try:
        settings: dict[str, Any] = json.loads(fs.cat_file(path))
    except FileNotFoundError as error:
        message = f"{os.fspath(dst)}: no precompute.json in it, so it is not what dat precompute wrote"
        raise InvalidDataset(message) from error
    if settings.get("format") != FORMAT:
        found = shown(settings.get("format"))
        raise InvalidDataset(f"{os.fspath(dst)}: format {found}, this dat-client reads {FORMAT}: update it")
    return settings


def read_manifest(dst: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """The finished shards of DST, sorted by name: samples, bytes, sha256, what was skipped and why."""
    fs, folder = url_to_fs(f"{address(dst)}/manifest")
    try:
        found = sorted(path for path in fs.find(folder) if path.endswith(".json"))
    except FileNotFoundError:
        found = []
    with ThreadPoolExecutor(LISTED) as threads:  # thousands of small files, far away perhaps
        entries = [json.loads(content) for content in threads.map(fs.cat_file, found)]
    return {entry["shard"]: entry for entry in entries}


def prepared(picture: Image.Image, settings: Mapping[str, Any]) -> Image.Image:
    """The RGB picture as --resize and --crop made it before Q: torchvision's Resize and CenterCrop.

    >>> prepared(Image.new("RGB", (100, 60)), {"resize": 30, "crop": None}).size
    (50, 30)
    """
    size, crop = settings["resize"], settings["crop"]
    if size:
        short, long = sorted(picture.size)
        scaled = (size, int(size * long / short))
        picture = picture.resize(scaled if picture.width <= picture.height else scaled[::-1], _BILINEAR)
    if crop:
        left, top = (round((extent - crop) / 2) for extent in picture.size)
        picture = picture.crop((left, top, left + crop, top + crop))
    return picture


def view_of(picture: Image.Image, view: Mapping[str, Any]) -> Image.Image:
    """One view of --augment: of the RGB picture the `box` (left, top, width, height), scaled to `size`, flipped.

    >>> view_of(Image.new("RGB", (100, 60)), {"box": [10, 0, 40, 60], "size": [32, 24], "flip": True}).size
    (24, 32)
    """
    left, top, width, height = view["box"]
    rows, columns = view["size"]
    picture = picture.resize((columns, rows), _BILINEAR, box=(left, top, left + width, top + height))
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view["flip"] else picture


_BILINEAR = Image.Resampling.BILINEAR


class _Item(NamedTuple):
    """A view of a sample, still encoded: this is what waits in the shuffle buffer."""

    where: str
    q: bytes
    x: bytes | None
    view: Mapping[str, Any] | None
    label: int


def _no_epochs() -> torch.Tensor:
    """Without persistent_workers a process lives for one epoch and could not count them: shared memory can."""
    counts = torch.zeros(COUNTED, dtype=torch.int64)
    counts.share_memory_()  # type: ignore[no-untyped-call]
    return counts


@dataclass(eq=False)
class _Samples(IterableDataset[tuple[Any, ...]]):
    """One pass gives the samples of this rank and worker. `counts`: the shards and how many samples they have."""

    dst: str
    settings: Mapping[str, Any]
    counts: Mapping[str, int]
    sources: Mapping[str, str] | None
    image: bool
    field: str
    label: str
    view: str | int
    shuffle: int
    seed: int
    epochs: torch.Tensor = dataclasses.field(default_factory=_no_epochs)
    ranks: tuple[int, int] = (0, 1)

    def __getstate__(self) -> dict[str, Any]:
        """A worker process that is spawned does not know its trainer's process group, so it is told."""
        return {**self.__dict__, "ranks": self._place()[:2]}

    def _place(self) -> tuple[int, int, int, int]:
        """Rank, ranks, worker, workers."""
        rank, world, worker, workers = utils.pytorch_worker_info()
        if world == 1:
            rank, world = self.ranks
        return rank, world, worker, workers

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        rank, world, worker, workers = self._place()
        if world * workers > len(self.counts):
            of = f"{world} ranks x {workers} workers"
            raise InvalidDataset(
                f"{self.dst}: {len(self.counts)} shards for {of}, some would get none: fewer workers"
            )
        epoch = int(self.epochs[worker % COUNTED])
        self.epochs[worker % COUNTED] += 1
        # Dealt before they are shuffled: so each comes once, whatever the others have counted or drawn.
        shards = list(self.counts)[rank::world][worker::workers]
        rng = random.Random(f"{self.seed} {epoch} {rank} {worker}")
        if self.shuffle:
            rng.shuffle(shards)
        items = (item for shard in shards for sample in self._samples(shard) for item in self._views(sample, epoch))
        return map(self._decoded, wds.shuffle(self.shuffle, rng=rng)(items) if self.shuffle else items)

    def _samples(self, shard: str) -> Iterator[dict[str, Any]]:
        """The samples of a shard, each with its x where that comes from the source."""
        url = f"{self.dst}/{shard}"
        origin = self.sources[shard] if self.sources is not None else None
        original_of = originals(origin, of_pictures(self.settings)) if origin else None
        count = 0
        for sample in read_shard(url):
            count += 1
            if original_of is not None:
                sample["__source__"] = original_of(sample["__key__"])
                if sample["__source__"] is None:
                    message = f"sample {sample['__key__']} is not in {origin}, or not in the order of {url}"
                    raise InvalidDataset(f"source: {message}")
            yield sample
        if count != self.counts[shard]:
            raise InvalidDataset(f"{url}: {count} samples, {self.counts[shard]} by the manifest: make it again")

    def _views(self, sample: dict[str, Any], epoch: int) -> Iterator[_Item]:
        """The views of a sample that are asked for."""
        place = where(sample)
        if self.field in sample:
            prefixes = [""]
        else:
            numbered = (re.fullmatch(rf"(\d+)\.{re.escape(self.field)}", field) for field in sample)
            prefixes = [f"{number}." for number in sorted(int(found[1]) for found in numbered if found)]
        if self.view == "all":
            chosen = list(range(len(prefixes)))
        elif isinstance(self.view, int):
            chosen = [self.view]
        else:  # by the key, so that it does not depend on who reads the shard
            chosen = [random.Random(f"{self.seed} {epoch} {sample['__key__']}").randrange(len(prefixes) or 1)]
        if not prefixes:
            raise InvalidDataset(f"{place}: no {self.field}, only {fields_of(sample)}")
        if max(chosen) >= len(prefixes):
            raise InvalidDataset(f"{place}: view {self.view} of {len(prefixes)}, they count from 0")
        label = field_of(sample, self.label)
        if not re.fullmatch(rb"\s*-?\d+\s*", label):
            raise InvalidDataset(f"{place}: {self.label} is {shown(label)}, must be an integer")
        boxed = self.sources is not None and self.settings["augment"]
        views = json.loads(field_of(sample, "views.json")) if boxed else None
        for number in chosen:
            prefix, x = prefixes[number], None
            if self.image:
                stored = f"{prefix}image."
                x = field_of(sample, *([name for name in sample if name.startswith(stored)] or [f"{stored}*"]))
            elif self.sources is not None:
                x = picture_of(sample["__source__"])
            yield _Item(place, sample[prefix + self.field], x, views and views[number], int(label))

    def _decoded(self, item: _Item) -> tuple[Any, ...]:
        try:
            if self.field == "indices.npy":
                indices = np.load(io.BytesIO(item.q), allow_pickle=False)
                q = torch.from_numpy(indices.astype(np.int32))
            else:
                q = _tensor(_opened(item.q))
            if item.x is None:
                return q, item.label
            picture = _opened(item.x)
            if not self.image:
                picture = view_of(picture, item.view) if item.view else prepared(picture, self.settings)
            x = _tensor(picture)
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            raise InvalidDataset(f"{item.where}: {type(error).__name__}: {error}") from error
        if self.field != "indices.npy" and x.shape != q.shape:
            sizes = f"{x.shape[2]}x{x.shape[1]}, Q(x) {q.shape[2]}x{q.shape[1]}"
            raise InvalidDataset(f"{item.where}: x has {sizes} pixels: made from another source")
        return x, q, item.label


def _opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def _tensor(picture: Image.Image) -> torch.Tensor:
    """uint8 [3,H,W]."""
    return torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy())
