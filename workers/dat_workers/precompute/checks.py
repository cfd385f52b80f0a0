"""Checks the arguments of a job before its codec is loaded, which may take a minute."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import replace

from dat_client.dataset_format.naming import key_and_suffix
from dat_client.dataset_format.tar_samples import DamagedShard, Sample
from dat_workers.codecs.store import CodecStore
from dat_workers.engines.config import EngineConfig
from dat_workers.engines.factory import check_config
from dat_workers.errors import InvalidInput
from dat_workers.precompute.recipe import Recipe
from dat_workers.precompute.worker import SampleFailed
from dat_workers.sources.find import Source
from dat_workers.sources.reader import ShardReader, repeated_key

FIRST_SHARDS = 8  # of a source, in which the kept fields are looked for
FIRST_SAMPLES = 100  # of these shards together
FIRST_BYTES = 64_000_000


def check_codec(recipe: Recipe, config: EngineConfig | None) -> None:
    """Raises CodecError, ValueError or InvalidInput if this machine cannot run the codec as the recipe needs it.

    `config` is None if the devices are not those of this process.
    """
    spec = CodecStore().spec(recipe.codec)
    if config is not None and spec.architecture != "identity":
        check_config(config)
    recipe.check_tokens(spec)


def check_kept_fields(source: Source, keep: Collection[str]) -> None:
    """Raises InvalidInput if `keep` names a field that none of the first samples of the source has.

    For a folder of pictures all fields are known: the suffixes and, with classes, `cls`. For shards, up to 100
    samples of the first shards are read, or 64 MB.
    """
    known: set[str] = set()
    number = 0
    if all(shard.files for shard in source.shards):
        known.update(key_and_suffix(name)[1] for shard in source.shards for name in shard.files)
        known.update(["cls"] if source.classes else [])
    else:
        for sample in first_samples(source):
            if known.issuperset(keep):
                return
            known.update(sample.fields)
            number += 1
    absent = [name for name in keep if name not in known]
    if absent and known:
        present, place = ", ".join(sorted(known)), f"the first {number} samples" if number else "the pictures"
        message = f"keep: none of {place} has a field {absent[0]!r}; their fields are {present}"
        raise InvalidInput("keep", absent[0], f"among {present}", message)


def first_samples(source: Source) -> Iterator[Sample]:
    """Yields some of the samples of the first shards; the job itself reports damaged ones."""
    number = nbytes = 0
    for shard in source.shards[:FIRST_SHARDS]:
        with suppress(DamagedShard):
            for sample in ShardReader(shard, source.classes):
                yield sample
                number, nbytes = number + 1, nbytes + sample.nbytes
                if number == FIRST_SAMPLES or nbytes > FIRST_BYTES:
                    return


def with_repeated_keys(source: Source, *, skip: bool) -> Source:
    """Returns the source with the pictures marked whose key an earlier picture has, also one in another shard.

    The keys of a folder of pictures are all known beforehand. Raises SampleFailed if there are any and `skip` is
    not set. The keys of tars need to differ within a shard only, as WebDataset has it.
    """
    first_of: dict[str, str] = {}
    shards = []
    for shard in source.shards:
        repeated = []
        for name in shard.files:
            first = first_of.setdefault(key_and_suffix(name)[0], name)
            if first != name:
                repeated.append((name, first))
        if repeated and not skip:
            (name, first), key = repeated[0], key_and_suffix(repeated[0][0])[0]
            raise SampleFailed(f"{shard.address}, sample {key}: {repeated_key(first)} ({name})")
        shards.append(replace(shard, repeated=tuple(repeated)) if repeated else shard)
    return replace(source, shards=tuple(shards))
