"""Loads the datasets that `dat precompute` wrote (Q(x) or its tokens, x, labels) into a PyTorch DataLoader.

    from dat_client.webdataset import load

    data = load("s3://bucket/imagenet-q", source="s3://bucket/imagenet", shuffle=2000)
    for x, x_hat, labels in DataLoader(data, batch_size=128, num_workers=8):
        ...

No service is needed. The shards are ordinary WebDataset shards, so `webdataset.WebDataset` reads them too. `load`
adds three things: it reads finished shards only, it chooses among the views of a sample, and it cuts x from the
source as it was cut for Q. Shuffling and the methods of the pipeline are webdataset's.
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

from dat_client.dataset_format.manifest import FORMAT, MANIFEST_FOLDER, RECIPE_FILE, ManifestEntry, shard_of_entry
from dat_client.dataset_format.naming import INDICES_FIELD, VIEWS_FIELD, number_of_views, view_prefix
from dat_client.dataset_format.tar_samples import Sample
from dat_client.dataset_format.views import prepared, view_of
from dat_client.errors import InvalidDataset, shown
from dat_client.originals import address, locate_sources, made_from_pictures, picture_finder, read_shard

__all__ = ["load", "prepared", "read_manifest", "read_settings", "view_of"]

EPOCH_COUNTERS = 1024  # worker processes beyond this number share counters
NEEDED_SETTINGS = {"outputs", "picture", "resize", "crop", "augment", "variants"}
MANIFEST_THREADS = 16  # manifest entries that are fetched at the same time


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
    """Returns the samples of `dst` as a webdataset pipeline: an IterableDataset with `.map`, `.repeat` and more.

        load(dst)                     # (x̂, label)
        load(dst, image=True)         # (x, x̂, label), x as `--outputs image` stored it
        load(dst, source=src)         # (x, x̂, label), x cut from the source as it was cut for Q
        load(dst, tokens=True)        # (indices, label), for `client.decode` in the training process

    x and x̂ are uint8 tensors [3,H,W], indices are int32 tensors [h,w], and the label is an int. An epoch yields
    every sample once. Whole shards are assigned to ranks (torchrun, torch.distributed) and DataLoader workers, in
    each epoch in the same way. Some ranks may therefore have fewer batches in an epoch than others; use `.repeat()`
    or `.with_epoch(n)` to give all ranks the same number.

    Args:
        dst: the folder or fsspec address that `dat precompute` wrote. Shards without a manifest entry are not read.
        source: the data from which `dst` was made, which may have moved: a folder of shards or of pictures, an
            fsspec address, a brace pattern or a glob. A sample's original is found by shard name and key. Samples
            of the source that `dat precompute` skipped are not yielded.
        image: True to yield x as it is stored in `dst`; it cannot be combined with `source`.
        tokens: True to yield indices instead of x̂.
        label: the name of the field that holds the label, an integer as text.
        view: which of a sample's views to yield. `random` draws one at random in each epoch, `all` yields each view
            as a separate sample, and an int yields the view of that number, from 0.
        shuffle: how many encoded samples to hold in memory for shuffling; the order of the shards is then shuffled
            too. 0 keeps the stored order.
        seed: the seed for the order and for `random` views. Each pass over the returned object is a new epoch with
            a new order.

    Raises InvalidDataset if `dst` or `source` is damaged or lacks the requested data, and OSError. Faults of single
    samples are raised during iteration, with the names of the shard and the sample.
    """
    if view not in ("random", "all") and not (type(view) is int and view >= 0):
        raise InvalidDataset(f"view: must be 'random', 'all' or the number of a view, got {shown(view)}")
    if image and source is not None:
        raise InvalidDataset("image and source: both say where x comes from, so give one of them")
    settings = read_settings(dst)
    for output in ["indices" if tokens else "reconstruction"] + (["image"] if image else []):
        if output not in settings["outputs"]:
            stored = ", ".join(settings["outputs"])
            raise InvalidDataset(f"{os.fspath(dst)}: holds {stored}, no {output}: see dat precompute --outputs")
    manifest = read_manifest(dst)
    if not manifest:
        raise InvalidDataset(f"{os.fspath(dst)}: no shard is finished, the manifest is empty; run dat precompute")
    recipes = {entry["settings"] for entry in manifest.values()}
    if len(recipes) > 1:
        message = f"{os.fspath(dst)}: has shards of {len(recipes)} different settings; let dat precompute finish"
        raise InvalidDataset(message)
    sources = None if source is None else locate_sources(source, manifest, made_from_pictures(settings))
    counts = {shard: int(entry["samples"]) for shard, entry in manifest.items()}
    field = INDICES_FIELD if tokens else str(settings["picture"])
    samples = _Samples(address(dst), settings, counts, sources, image, field, label, view, max(0, shuffle), seed)
    return wds.FluidWrapper(samples)


def read_settings(dst: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the recipe of a dataset, from precompute.json: codec, outputs, geometry and views.

    Raises InvalidDataset if the file is missing, damaged or has a format number that this version cannot read, and
    OSError.
    """
    fs, path = url_to_fs(f"{address(dst)}/{RECIPE_FILE}")
    try:
        settings = json.loads(fs.cat_file(path))
    except (FileNotFoundError, ValueError) as error:
        problem = f"not JSON ({error})" if isinstance(error, ValueError) else "missing"
        message = f"{os.fspath(dst)}: its {RECIPE_FILE} is {problem}, so dat precompute did not write this folder"
        raise InvalidDataset(message) from error
    found = settings.get("format") if isinstance(settings, dict) else None
    if found != FORMAT:
        message = f"{os.fspath(dst)}: format {shown(found)}, this dat-client reads {FORMAT}: update dat-client"
        raise InvalidDataset(message)
    if missing := NEEDED_SETTINGS - settings.keys():
        raise InvalidDataset(f"{os.fspath(dst)}: its {RECIPE_FILE} lacks {', '.join(sorted(missing))}")
    return dict(settings)


def read_manifest(dst: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Returns the manifest entry (samples, bytes, sha256, skipped, ...) of each finished shard, sorted by name.

    Raises InvalidDataset for an entry that cannot be parsed, and OSError.
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
            manifest[ManifestEntry.from_json(content).shard] = json.loads(content)
        except ValueError as error:
            message = f"{path} cannot be read: {error}; run dat precompute again to make this shard again"
            raise InvalidDataset(message) from error
    return manifest


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
class _Samples(IterableDataset[tuple[Any, ...]]):
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
