"""Loads the datasets that `dat precompute` wrote (Q(x) or its tokens, x, labels) into a PyTorch DataLoader.

    from dat_client.webdataset import load

    data = load("s3://bucket/imagenet-q", source="s3://bucket/imagenet", shuffle=2000)
    for x, x_hat, labels in DataLoader(data, batch_size=128, num_workers=8):
        ...

No service is needed. The shards are ordinary WebDataset shards, so `webdataset.WebDataset` reads them too. `load`
adds three things: it reads finished shards only, it chooses among the views of a sample, and it cuts x from the
source as it was cut for Q. Shuffling and the methods of the pipeline are webdataset's.

    stored.py      what DST holds: its recipe and its manifest
    samples.py     reads, joins and decodes the samples of one DataLoader worker
    shares.py      which samples each rank and worker reads
    pipeline.py    webdataset's pipeline, with a length
    originals.py   finds x in the source
"""

from __future__ import annotations

import os
from typing import Any

try:
    from dat_client.dataset_format.views import prepared, view_of
    from dat_client.webdataset.originals import Originals, address
    from dat_client.webdataset.pipeline import Pipeline
    from dat_client.webdataset.samples import Samples
    from dat_client.webdataset.stored import read_manifest, read_settings
except ImportError as error:
    raise ImportError(
        "dat_client.webdataset needs webdataset, fsspec, Pillow and PyTorch: pip install 'dat-client[webdataset]'"
    ) from error

from dat_client.dataset_format.naming import INDICES_FIELD
from dat_client.errors import InvalidDataset, shown

__all__ = ["load", "prepared", "read_manifest", "read_settings", "view_of"]


def load(
    dst: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    image: bool = False,
    tokens: bool = False,
    label: str | None = "cls",
    view: str | int = "random",
    shuffle: int = 0,
    seed: int = 0,
) -> Any:
    """Returns the samples of `dst` as a webdataset pipeline: an IterableDataset with `.map`, `.repeat` and more.

        load(dst)                     # (x̂, label)
        load(dst, image=True)         # (x, x̂, label), x as `--outputs image` stored it
        load(dst, source=src)         # (x, x̂, label), x cut from the source as it was cut for Q
        load(dst, tokens=True)        # (indices, label), for `client.decode` in the training process
        load(dst, label=None)         # x̂ alone; (x, x̂) with `image` or `source`; indices alone with `tokens`

    x and x̂ are uint8 tensors [3,H,W], indices are int32 tensors [h,w], and the label is an int. An epoch yields
    every sample once. Ranks (torchrun, torch.distributed) and the DataLoader workers of a rank share the samples,
    in each epoch in the same way: whole shards are dealt where there is one for each of them, and samples
    otherwise, in which case each of them reads all shards of its rank. Some ranks may have fewer batches in an
    epoch than others; use `.repeat()` or `.with_epoch(n)` to give all ranks the same number.

    `len(load(dst))` is the number of samples of this rank in an epoch, from the manifest (views count if `view` is
    `all`). A DataLoader computes its own length, in batches, from it. That is exact with up to one worker; with w
    workers an epoch may have up to w - 1 batches more, because each worker ends with a batch that is not full (or
    leaves it out if `drop_last` is set).

    Args:
        dst: the folder or fsspec address that `dat precompute` wrote. Shards without a manifest entry are not read.
        source: the data from which `dst` was made, which may have moved: a folder of shards or of pictures, an
            fsspec address, a brace pattern or a glob. A sample's original is found by shard name and key. Samples
            of the source that `dat precompute` skipped are not yielded; of samples with the same key in a shard, or
            of pictures that differ only in their suffix, the first is the one that it used.
        image: True to yield x as it is stored in `dst`; it cannot be combined with `source`.
        tokens: True to yield indices instead of x̂.
        label: the name of the field that holds the label, an integer as text; None to yield no label.
        view: which of a sample's views to yield. `random` draws one at random in each epoch, `all` yields each view
            as a separate sample, and an int yields the view of that number, from 0.
        shuffle: how many encoded samples to hold in memory for shuffling; the order of the shards is then shuffled
            too. 0 keeps the stored order.
        seed: the seed for the order and for `random` views. Each pass over the returned object is a new epoch with
            a new order.

    Raises InvalidDataset if `dst` or `source` is damaged or lacks the requested data, and OSError. The first sample
    is checked at once. Faults of other samples are raised during iteration, with the names of the shard and the
    sample.
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
    counts = {shard: int(entry["samples"]) for shard, entry in manifest.items()}
    if not any(counts.values()):
        message = f"{os.fspath(dst)}: its {len(counts)} shards hold no sample; its manifest says why"
        raise InvalidDataset(message)
    originals = None if source is None else Originals.locate(source, manifest, settings)
    field = INDICES_FIELD if tokens else str(settings["picture"])
    samples = Samples(address(dst), settings, counts, originals, image, field, label, view, max(0, shuffle), seed)
    samples.check_first_sample()
    return Pipeline(samples)
