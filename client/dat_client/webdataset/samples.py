"""Reads the samples of a precomputed dataset in a PyTorch DataLoader."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import IterableDataset
from webdataset import utils

from dat_client.dataset_format.naming import INDICES_FIELD, VIEWS_FIELD, number_of_views, view_prefix
from dat_client.dataset_format.tar_samples import Sample
from dat_client.dataset_format.views import prepared, view_of
from dat_client.errors import InvalidDataset, shown
from dat_client.webdataset.originals import made_from_pictures, picture_finder, read_shard

EPOCH_COUNTERS = 1024  # worker processes beyond this number share counters


class _EncodedView(NamedTuple):
    """One encoded view of a sample, as the shuffle buffer holds it. `place` names shard and key in messages."""

    place: str
    q: bytes
    x: bytes | None
    crop: Mapping[str, Any] | None
    label: int


def _new_epoch_counters() -> torch.Tensor:
    """Returns epoch counters in shared memory, because a worker process may live for only one epoch.

    (DataLoader starts new workers for each epoch unless persistent_workers is true.)
    """
    counters = torch.zeros(EPOCH_COUNTERS, dtype=torch.int64)
    counters.share_memory_()  # type: ignore[no-untyped-call]
    return counters


@dataclass(eq=False)
class Samples(IterableDataset[tuple[Any, ...]]):
    """Yields the samples of the current rank and DataLoader worker; each pass over it is one epoch.

    Attributes:
        counts: the number of samples of each shard.
        sources: the address of each shard's originals; None if x is not read from the source.
        field: the field that is decoded to x̂ or to indices.
        ranks: the rank and the number of ranks of the process that created this object.
    """

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

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        rank, world, worker, workers = self._place()
        if world * workers > len(self.counts):
            readers = f"{world} ranks x {workers} workers"
            raise InvalidDataset(
                f"{self.dst}: {len(self.counts)} shards for {readers}, some would get none: use fewer workers"
            )
        epoch = int(self.epochs[worker % EPOCH_COUNTERS])
        self.epochs[worker % EPOCH_COUNTERS] += 1
        # Shards are assigned before they are shuffled, so that each is read exactly once even if processes are in
        # different epochs.
        shards = list(self.counts)[rank::world][worker::workers]
        rng = random.Random(f"{self.seed} {epoch} {rank} {worker}")
        if self.shuffle:
            rng.shuffle(shards)
        views = (view for shard in shards for view in self._views(shard, epoch))
        return map(self._decoded, wds.shuffle(self.shuffle, rng=rng)(views) if self.shuffle else views)

    def _views(self, shard: str, epoch: int) -> Iterator[_EncodedView]:
        """Yields the requested views of a shard's samples, with the original pictures if there is a source."""
        url = f"{self.dst}/{shard}"
        origin = self.sources[shard] if self.sources is not None else None
        find_picture = picture_finder(origin, made_from_pictures(self.settings)) if origin else None
        count = 0
        for sample in read_shard(url):
            count += 1
            if sample.problem:
                raise InvalidDataset(f"{url}, sample {sample.key}: {sample.problem}")
            picture = find_picture(sample.key) if find_picture else None
            if find_picture and picture is None:
                message = f"sample {sample.key} is not in {origin}, or not in the order of {url}"
                raise InvalidDataset(f"source: {message}")
            yield from self._views_of(sample, f"{url}, sample {sample.key}", picture, epoch)
        if count != self.counts[shard]:
            raise InvalidDataset(f"{url}: {count} samples, {self.counts[shard]} by the manifest: make it again")

    def _views_of(self, sample: Sample, place: str, picture: bytes | None, epoch: int) -> Iterator[_EncodedView]:
        """Yields the requested views of one sample. `picture` is its original; None without a source."""

        def field(name: str) -> bytes:
            if name not in sample.fields:
                present = ", ".join(sorted(sample.fields)) or "a key"
                raise InvalidDataset(f"{place}: no {name}, only {present}")
            return sample.fields[name]

        views = number_of_views(self.settings["augment"], self.settings["variants"])
        if self.view == "all":
            chosen = list(range(views))
        elif isinstance(self.view, int):
            chosen = [self.view]
        else:  # seeded with the sample's key, so that the view does not depend on the process that reads the shard
            chosen = [random.Random(f"{self.seed} {epoch} {sample.key}").randrange(views)]
        if max(chosen) >= views:
            raise InvalidDataset(f"{place}: view {self.view} of {views} does not exist: the first is 0")
        label = field(self.label)
        if not re.fullmatch(rb"\s*-?\d+\s*", label):
            raise InvalidDataset(f"{place}: {self.label} is {shown(label)}, must be an integer to be the label")
        crops = json.loads(field(VIEWS_FIELD)) if picture is not None and self.settings["augment"] else None
        for number in chosen:
            prefix = view_prefix(number, views)
            if self.image:
                stored = f"{prefix}image."
                picture = field(next((name for name in sample.fields if name.startswith(stored)), f"{stored}*"))
            yield _EncodedView(place, field(prefix + self.field), picture, crops and crops[number], int(label))

    def _decoded(self, view: _EncodedView) -> tuple[Any, ...]:
        try:
            if self.field == INDICES_FIELD:
                indices = np.load(io.BytesIO(view.q), allow_pickle=False)
                q = torch.from_numpy(indices.astype(np.int32))
            else:
                q = _tensor(_opened(view.q))
            if view.x is None:
                return q, view.label
            picture = _opened(view.x)
            if not self.image:
                picture = view_of(picture, view.crop) if view.crop else prepared(picture, self.settings)
            x = _tensor(picture)
        except Exception as error:  # Pillow's decoders raise almost any exception on damaged files
            raise InvalidDataset(f"{view.place}: {type(error).__name__}: {error}") from error
        if self.field != INDICES_FIELD and x.shape != q.shape:
            sizes = f"{x.shape[2]}x{x.shape[1]}, Q(x) {q.shape[2]}x{q.shape[1]}"
            raise InvalidDataset(f"{view.place}: x has {sizes} pixels: Q(x) was not made from this source")
        return x, q, view.label


def _opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def _tensor(picture: Image.Image) -> torch.Tensor:
    """Returns an RGB picture as a uint8 tensor [3,H,W]."""
    return torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy())
