"""Reads the samples of a precomputed dataset in a PyTorch DataLoader."""

from __future__ import annotations

import dataclasses
import io
import random
import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import IterableDataset
from webdataset import utils

from dat_client.dataset_format.manifest import parsed_json
from dat_client.dataset_format.naming import INDICES_FIELD, VIEWS_FIELD, number_of_views, view_prefix
from dat_client.dataset_format.pictures import decode
from dat_client.dataset_format.tar_samples import Sample
from dat_client.dataset_format.views import prepared, view_of
from dat_client.errors import InvalidDataset, shown
from dat_client.webdataset.originals import Originals, read_shard
from dat_client.webdataset.shares import Share, split, total

EPOCH_COUNTERS = 1024  # worker processes beyond this number share counters


class _EncodedView(NamedTuple):
    """One encoded view of a sample, as the shuffle buffer holds it. `place` names shard and key in messages."""

    place: str
    q: bytes
    x: bytes | None
    crop: Mapping[str, Any] | None
    label: int | None


def _new_epoch_counters() -> torch.Tensor:
    """Returns epoch counters in shared memory, because a worker process may live for only one epoch.

    (DataLoader starts new workers for each epoch unless persistent_workers is true.)
    """
    counters = torch.zeros(EPOCH_COUNTERS, dtype=torch.int64)
    counters.share_memory_()  # type: ignore[no-untyped-call]
    return counters


@dataclass(eq=False)
class Samples(IterableDataset[Any]):
    """Yields the samples of the current rank and DataLoader worker; each pass over it is one epoch.

    Attributes:
        counts: the number of samples of each shard.
        originals: finds x in the source; None if x is not read from the source.
        field: the field that is decoded to x̂ or to indices.
        label: the field that is the label; None to yield no label.
        ranks: the rank and the number of ranks of the process that created this object.
    """

    dst: str
    settings: Mapping[str, Any]
    counts: Mapping[str, int]
    originals: Originals | None
    image: bool
    field: str
    label: str | None
    view: str | int
    shuffle: int
    seed: int
    epochs: torch.Tensor = dataclasses.field(default_factory=_new_epoch_counters)
    ranks: tuple[int, int] = (0, 1)

    def __getstate__(self) -> dict[str, Any]:
        """Adds the rank to the state: a spawned worker process does not know its trainer's process group."""
        return {**self.__dict__, "ranks": self._place()[:2]}

    def _place(self) -> tuple[int, int, int, int]:
        """Returns rank, number of ranks, worker and number of workers."""
        rank, world, worker, workers = utils.pytorch_worker_info()
        if world == 1:
            rank, world = self.ranks
        return rank, world, worker, workers

    @property
    def views(self) -> int:
        """The number of views that each sample has."""
        return number_of_views(self.settings["augment"], self.settings["variants"])

    def __len__(self) -> int:
        """Returns the number of samples that this rank yields in an epoch, in all its workers together."""
        rank, world, _, _ = self._place()
        return total(self._of_rank(rank, world)) * (self.views if self.view == "all" else 1)

    def _of_rank(self, rank: int, world: int) -> list[Share]:
        """Returns what a rank reads. Raises InvalidDataset if a rank would get no sample."""
        shares = [(shard, range(count)) for shard, count in self.counts.items()]
        of_ranks = [split(shares, i, world) for i in range(world)]
        if empty := [i for i, share in enumerate(of_ranks) if not total(share)]:
            raise InvalidDataset(
                f"{self.dst}: has {total(shares)} samples in {len(shares)} shards for {world} ranks, so rank "
                f"{empty[0]} would get none: use fewer ranks"
            )
        return of_ranks[rank]

    def __iter__(self) -> Iterator[Any]:
        rank, world, worker, workers = self._place()
        epoch = int(self.epochs[worker % EPOCH_COUNTERS])
        self.epochs[worker % EPOCH_COUNTERS] += 1
        # Shards are assigned before they are shuffled, so that each is read exactly once even if processes are in
        # different epochs.
        shares = split(self._of_rank(rank, world), worker, workers)
        rng = random.Random(f"{self.seed} {epoch} {rank} {worker}")
        if self.shuffle:
            rng.shuffle(shares)
        views = (view for share in shares for view in self._views(share, epoch))
        return map(self._decoded, wds.shuffle(self.shuffle, rng=rng)(views) if self.shuffle else views)

    def check_first_sample(self) -> None:
        """Raises InvalidDataset if the first sample lacks a field, or if its label is not an integer."""
        shard = next(shard for shard, count in self.counts.items() if count)
        url = f"{self.dst}/{shard}"
        with closing(read_shard(url)) as samples:
            for sample in samples:
                next(iter(self._views_of(sample, f"{url}, sample {sample.key}", None, 0)))
                return

    def _views(self, share: Share, epoch: int) -> Iterator[_EncodedView]:
        """Yields the requested views of some samples of a shard, with the originals if there is a source."""
        shard, positions = share
        url = f"{self.dst}/{shard}"
        find_picture = self.originals.finder(shard) if self.originals is not None else None
        count = 0
        for position, sample in enumerate(read_shard(url)):
            count += 1
            if position not in positions:  # another reader's
                continue
            place = f"{url}, sample {sample.key}"
            if sample.problem:
                raise InvalidDataset(f"{place}: {sample.problem}")
            picture = find_picture(sample.key) if find_picture else None
            yield from self._views_of(sample, place, picture, epoch)
        if count != self.counts[shard]:
            raise InvalidDataset(f"{url}: {count} samples, {self.counts[shard]} by the manifest: make it again")

    def _views_of(self, sample: Sample, place: str, picture: bytes | None, epoch: int) -> Iterator[_EncodedView]:
        """Yields the requested views of one sample. `picture` is its original; None without a source."""

        def field(name: str) -> bytes:
            if name not in sample.fields:
                present = ", ".join(sorted(sample.fields)) or "a key"
                advice = "; label= names another field as the label, label=None reads without labels"
                raise InvalidDataset(f"{place}: no {name}, only {present}{advice if name == self.label else ''}")
            return sample.fields[name]

        if self.view == "all":
            chosen = list(range(self.views))
        elif isinstance(self.view, int):
            chosen = [self.view]
        else:  # seeded with the sample's key, so that the view does not depend on the process that reads the shard
            seed = f"{self.seed} {epoch} {sample.key}".encode("utf-8", "surrogateescape")
            chosen = [random.Random(seed).randrange(self.views)]
        if max(chosen) >= self.views:
            raise InvalidDataset(f"{place}: view {self.view} of {self.views} does not exist: the first is 0")
        label = None if self.label is None else _label(field(self.label), f"{place}: {self.label}")
        cut = picture is not None and self.settings["augment"]
        crops = _crops(field(VIEWS_FIELD), self.views, f"{place}: {VIEWS_FIELD}") if cut else None
        for number in chosen:
            prefix = view_prefix(number, self.views)
            if self.image:
                stored = f"{prefix}image."
                picture = field(next((name for name in sample.fields if name.startswith(stored)), f"{stored}*"))
            crop = crops[number] if crops else None
            yield _EncodedView(place, field(prefix + self.field), picture, crop, label)

    def _decoded(self, view: _EncodedView) -> Any:
        """Returns what the trainer gets of a view: a tuple, or x̂ or the indices alone."""
        try:
            q = _indices(view.q) if self.field == INDICES_FIELD else _tensor(decode(view.q))
            items: list[Any] = [q]
            if view.x is not None:
                picture = decode(view.x, upright=bool(self.settings.get("upright")))
                if not self.image:
                    picture = prepared(picture, self.settings) if view.crop is None else view_of(picture, view.crop)
                items.insert(0, _tensor(picture))
        except Exception as error:  # Pillow's decoders raise almost any exception on damaged files
            raise InvalidDataset(f"{view.place}: {type(error).__name__}: {error}") from error
        if view.x is not None and self.field != INDICES_FIELD and items[0].shape != q.shape:
            sizes = f"{items[0].shape[2]}x{items[0].shape[1]}, Q(x) {q.shape[2]}x{q.shape[1]}"
            raise InvalidDataset(f"{view.place}: x has {sizes} pixels: Q(x) was not made from this source")
        if view.label is not None:
            items.append(view.label)
        return tuple(items) if len(items) > 1 else q


def _label(content: bytes, place: str) -> int:
    """Returns the label that a field holds as text. Raises InvalidDataset if it is not an integer of 64 bits."""
    label = int(content) if re.fullmatch(rb"\s*-?\d{1,19}\s*", content) else None
    if label is None or not -(2**63) <= label < 2**63:
        raise InvalidDataset(f"{place} is {shown(content)}, must be an integer to be the label")
    return label


def _crops(content: bytes, views: int, place: str) -> list[Mapping[str, Any]]:
    """Returns the crop of each view from a sample's views.json. Raises InvalidDataset if it is damaged."""
    try:
        crops = parsed_json(content)
    except ValueError as error:
        raise InvalidDataset(f"{place} is damaged: {error}") from error
    whole = isinstance(crops, list) and all(
        isinstance(crop, dict) and {"box", "size", "flip"} <= crop.keys() for crop in crops
    )
    if not whole or len(crops) != views:
        raise InvalidDataset(f"{place} is {shown(crops)}, must be a list of {views} crops (box, size, flip)")
    return list(crops)


def _indices(content: bytes) -> torch.Tensor:
    """Returns the tokens of a .npy file as an int32 tensor [h,w]. Raises ValueError if they are anything else."""
    indices = np.load(io.BytesIO(content), allow_pickle=False)
    if not isinstance(indices, np.ndarray) or indices.dtype != np.uint16 or indices.ndim != 2:
        found = f"{indices.dtype} {list(indices.shape)}" if isinstance(indices, np.ndarray) else "several arrays"
        raise ValueError(f"{INDICES_FIELD} holds {found}, must be uint16 [h,w]")
    return torch.from_numpy(indices.astype(np.int32))


def _tensor(picture: Image.Image) -> torch.Tensor:
    """Returns an RGB picture as a uint8 tensor [3,H,W]."""
    return torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy())
