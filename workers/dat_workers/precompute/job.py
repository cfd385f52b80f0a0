"""Sends a whole dataset through Q once (`precompute`). A job finds the missing shards and gives them to workers."""

from __future__ import annotations

import logging
import os
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Collection
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, Future, wait
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from dat_client.dataset_format.left_out import LeftOut, Row
from dat_client.dataset_format.manifest import ManifestEntry
from dat_workers.engines.config import DEFAULT_ENGINE, EngineConfig
from dat_workers.errors import InvalidInput
from dat_workers.precompute.checks import check_codec, check_kept_fields, with_repeated_keys
from dat_workers.precompute.contact_sheet import contact_sheet
from dat_workers.precompute.local_workers import LocalWorkers
from dat_workers.precompute.output_folder import OutputFolder
from dat_workers.precompute.progress import (
    COMPUTING,
    CONTACT_SHEET,
    LOADING,
    LOOKING,
    JobProgress,
    Tally,
    WorkerCounts,
)
from dat_workers.precompute.ray_workers import RayWorkers
from dat_workers.precompute.recipe import Recipe
from dat_workers.precompute.worker import SHARDS_AT_ONCE, ShardOptions, WorkerLost
from dat_workers.sources.addresses import naming_address, real_address
from dat_workers.sources.find import LOOKUP_THREADS, Paths, Source, below, find
from dat_workers.sources.folders import PICTURES_A_SHARD, Shard
from dat_workers.system.threads import DaemonThreads

log = logging.getLogger("dat_workers")

TICK_S = 0.5
MAX_TRIES = 3  # if this many workers ended while making a shard, the job fails
SHEET = "contact-sheet.html"


@dataclass(frozen=True)
class Summary:
    """The result of a job: the contents of DST for this source, and how much of it this run made.

    shards_kept: shards that were finished before, or by a different job. seconds: time from the first missing shard
    to the last, without loading the codec. others: shards in DST that do not come from this source. skipped_first:
    (shard, key, reason) of up to 20 skipped samples. lacking: (field, number of samples without it) of the fields
    that were to be kept. remade: (shard, reason) of shards that were there and were made again. left_out: files
    that are not samples, such as hidden names. removed: shards of a folder of pictures that fills fewer shards now.
    """

    shards: int
    shards_kept: int
    samples: int
    skipped: int
    nbytes: int
    images: int
    seconds: float
    workers_lost: int
    fingerprint: str
    others: int
    skipped_first: tuple[tuple[str, str, str], ...]
    lacking: tuple[tuple[str, int], ...] = ()
    remade: tuple[tuple[str, str], ...] = ()
    left_out: tuple[Row, ...] = ()
    removed: tuple[str, ...] = ()


class NoSamples(ValueError):
    """No sample of the source is usable, so the job has made nothing."""


def precompute(
    source: Paths,
    dst: str | Path,
    *,
    codec: str = "tiny-f8",
    outputs: Collection[str] = ("reconstruction",),
    picture: str = "jpg",
    quality: int = 95,
    resize: int | None = None,
    crop: int | None = None,
    augment: int = 0,
    replace_fraction: float = 0.0,
    variants: int = 1,
    seed: int = 0,
    upright: bool = False,
    keep: Collection[str] | None = None,
    workers: int = 1,
    ray: bool = False,
    gpus: float | None = None,
    skip: bool = False,
    overwrite: bool = False,
    check_hashes: bool = False,
    pictures_a_shard: int = PICTURES_A_SHARD,
    engine_config: EngineConfig = DEFAULT_ENGINE,
    report: Callable[[JobProgress], None] = lambda progress: None,
) -> Summary:
    """Writes Q(x) of all samples of `source` into shards of the same names in `dst`.

    >>> precompute("train-{000000..000007}.tar", "train-q", outputs=["indices"])         # doctest: +SKIP

    A job may be killed at any moment. The next run makes the missing shards, and the final bytes are the same as
    those of an uninterrupted run.

    Args:
        source: a path or an fsspec address of shards, of a folder of them or of a folder of pictures; a brace
            pattern; or several of these.
        dst: the folder to write, a path or an fsspec address.
        codec, outputs, ..., keep: the settings of the `Recipe`.
        ray: run the workers as actors in the Ray cluster that RAY_ADDRESS names, or in a local Ray that this job
            starts; each actor takes `gpus` GPUs.
        skip: leave out samples that are not usable and list them in the manifest; otherwise the first such sample
            ends the job with SampleFailed, and class folders, links and folders that cannot be read are refused.
        overwrite: replace the shards in `dst` that were made with a different recipe.
        check_hashes: compare finished shards and their sources by SHA-256 too, and not only by length.
        pictures_a_shard: the number of pictures of a folder that make a shard.
        report: called with the progress: when the codec begins to load, and then about twice a second.

    Everything that can be wrong with the arguments is found before the codec is loaded. A job that is refused
    leaves no `dst` behind that was not there before.

    Raises InvalidInput for arguments that are not usable, OtherRecipe if `dst` was made with different settings,
    SampleFailed, NoSamples if no sample is usable, CodecError, and OSError if a source cannot be read or `dst`
    cannot be written.
    """
    for name, value in (("outputs", outputs), ("keep", keep)):
        if isinstance(value, str):
            raise InvalidInput(name, repr(value), f"a list of names, such as [{value!r}]")
    if gpus is not None and (not ray or not 0 <= gpus < float("inf")):
        raise InvalidInput("gpus", gpus, "0 or more, and only with ray, whose actors it is for")
    recipe = Recipe(
        codec, outputs=tuple(outputs), picture=picture, quality=quality, resize=resize, crop=crop, augment=augment,
        replace_fraction=replace_fraction, variants=variants, seed=seed, upright=upright,
        keep=None if keep is None else tuple(keep),
    )  # fmt: skip
    if not 1 <= workers <= 1024:
        raise InvalidInput("workers", workers, "1 to 1024")
    with naming_address(source):
        found = find(source, pictures_a_shard=pictures_a_shard, skip=skip)
    if not found.shards:
        raise InvalidInput("source", source, "at least one shard")
    if any(shard.files for shard in found.shards):
        recipe = replace(recipe, classes=found.classes, pictures_a_shard=pictures_a_shard)
    dst = os.fspath(dst)
    if "{" in dst:
        raise InvalidInput("dst", dst, "a single folder, without a pattern: shards keep the names of their sources")
    folder = OutputFolder(dst)
    check_apart(found, folder)
    if not (ray and os.environ.get("RAY_ADDRESS")):  # the codecs and devices of a cluster are on its hosts
        check_codec(recipe, None if ray else engine_config)
    found = with_repeated_keys(found, skip=skip)
    with naming_address(source):
        check_kept_fields(found, recipe.keep or ())
    with ExitStack() as ended_in_reverse:
        ended_in_reverse.callback(folder.end)
        with naming_address(dst):
            folder.begin()
            if not overwrite:
                folder.recipe()  # raises if it cannot be read
        report(Tally(found.shards).progress(LOADING, WorkerCounts()))
        pool: LocalWorkers | RayWorkers
        pool = (
            RayWorkers(codec, engine_config, workers, gpus) if ray else LocalWorkers(codec, engine_config, workers)
        )
        ended_in_reverse.callback(pool.stop)
        recipe = pool.complete(recipe)
        with naming_address(dst):
            folder.settle_recipe(recipe, found.shards, overwrite=overwrite)
            return Job(found, folder, recipe, pool, skip, check_hashes, report).run()


def check_apart(source: Source, folder: OutputFolder) -> None:
    """Raises InvalidInput if a shard would overwrite its source, or if the next run would find it as a source."""
    dst = real_address(folder.full_address)
    for searched in source.folders:
        if f"{dst}/".startswith(f"{real_address(searched).rstrip('/')}/"):
            raise InvalidInput("dst", folder.address, f"a folder that is not within the source, {searched}")
    for shard in source.shards:
        if real_address(f"{dst}/{shard.name}") == real_address(shard.address):
            raise InvalidInput("dst", folder.address, f"a folder other than the one of the source {shard.address}")


@dataclass
class Job:
    """Gives missing shards to workers until all are finished."""

    source: Source
    folder: OutputFolder
    recipe: Recipe
    pool: LocalWorkers | RayWorkers
    skip: bool
    check_hashes: bool
    report: Callable[[JobProgress], None]

    def __post_init__(self) -> None:
        self.options = ShardOptions(self.recipe, self.folder.full_address, self.folder.job, self.skip)
        self.began = time.monotonic()
        self.done: dict[str, ManifestEntry] = {}
        self.shards_kept = self.workers_lost = 0
        self.tally = Tally(self.source.shards)

    def run(self) -> Summary:
        missing = self._missing_shards()
        if self.folder.shared or not self.folder.local:  # jobs that share the folder start with different shards
            random.Random(self.folder.job).shuffle(missing)
        self.began = time.monotonic()
        removed = self.folder.remove_left_behind(self.source.shards)
        if missing or removed:
            self.folder.remove_file(SHEET)  # it shows shards that will be replaced
        self._make(deque(missing))
        progress = self.progress()
        if not self.folder.has(SHEET):
            self.report(replace(progress, phase=CONTACT_SHEET))
            self.folder.write(SHEET, contact_sheet(self.source, self.folder, self.recipe, self.pool.decode))
        entries = [self.done[shard.name] for shard in self.source.shards]
        left_out = LeftOut(self.source.left_out)
        lacking: Counter[str] = Counter()
        for shard, entry in zip(self.source.shards, entries, strict=True):
            left_out.update(below(shard.address, entry.left_out))
            lacking.update(dict(entry.lacking))
        skipped = [(entry.shard, key, reason) for entry in entries for key, reason in entry.skipped]
        if not any(entry.samples for entry in entries):
            reasons = [f"{shard}, {key or 'after the last sample'}: {why}" for shard, key, why in skipped[:3]]
            raise NoSamples("; ".join([f"not one sample could be made, {len(skipped)} were skipped", *reasons]))
        return Summary(
            len(entries), self.shards_kept, sum(entry.samples for entry in entries), len(skipped),
            sum(entry.nbytes for entry in entries), progress.images, progress.seconds, self.workers_lost,
            self.recipe.fingerprint, len(self.folder.shard_names() - set(self.done)), tuple(skipped[:20]),
            tuple(sorted(lacking.items())), tuple(sorted(self.folder.remade.items())), left_out.rows,
            removed,
        )  # fmt: skip

    def progress(self, phase: str = COMPUTING) -> JobProgress:
        progress = self.tally.progress(phase, self.pool.counts())
        return replace(progress, workers_lost=self.workers_lost, seconds=time.monotonic() - self.began)

    def _missing_shards(self) -> list[Shard]:
        """Returns the shards that are not finished, and records those that are."""
        shards, threads = self.source.shards, DaemonThreads(LOOKUP_THREADS, "look")
        looks = [threads.submit(self._finished_entry, shard) for shard in shards]
        try:
            waiting = set(looks)
            while waiting:
                looked, waiting = wait(waiting, timeout=TICK_S, return_when=FIRST_EXCEPTION)
                for look in looked:
                    look.result()
                self.report(replace(self.progress(LOOKING), shards_looked=len(looks) - len(waiting)))
        finally:
            for look in looks:
                look.cancel()
        for shard, look in zip(shards, looks, strict=True):
            self._keep(shard, look.result())
        return [shard for shard in shards if shard.name not in self.done]

    def _finished_entry(self, shard: Shard) -> ManifestEntry | None:
        return self.folder.finished_entry(shard, self.recipe, hashes=self.check_hashes)

    def _keep(self, shard: Shard, entry: ManifestEntry | None) -> bool:
        """Records a shard that an earlier run or a different job has finished; returns False if `entry` is None."""
        if entry is None:
            return False
        self._record(shard, entry)
        self.shards_kept += 1
        return True

    def _make(self, missing: deque[Shard]) -> None:
        """Gives the missing shards to workers, and the shards of a lost worker to the remaining workers."""
        busy: dict[Future[ManifestEntry], tuple[int, Shard]] = {}
        tries: Counter[str] = Counter()
        reported_at = 0.0
        while missing or busy:
            load = Counter(worker for worker, _ in busy.values())
            worker = min(self.pool.ready() if missing else (), key=lambda i: load[i], default=None)
            if worker is not None and load[worker] < SHARDS_AT_ONCE:
                shard = missing.popleft()
                if tries[shard.name] or not self._keep(shard, self._finished_entry(shard)):
                    busy[self.pool.submit(worker, shard, self.options)] = (worker, shard)
                continue
            if not busy:  # all workers are being replaced
                time.sleep(TICK_S)
            finished, _ = wait(busy, timeout=TICK_S, return_when=FIRST_COMPLETED)
            for future in finished:
                _, shard = busy.pop(future)
                try:
                    self._accept(shard, future.result())
                except WorkerLost as error:
                    self.workers_lost += 1
                    tries[shard.name] += 1
                    if tries[shard.name] >= MAX_TRIES:
                        error.add_note(f"precompute: {MAX_TRIES} workers ended while they made {shard.address}")
                        raise
                    log.warning("%s; shard %s is made again", error, shard.name)
                    missing.appendleft(shard)
            if time.monotonic() - reported_at >= TICK_S:
                self.report(self.progress())
                reported_at = time.monotonic()
        self.report(self.progress())

    def _accept(self, shard: Shard, entry: ManifestEntry) -> None:
        """Records a shard that a worker has finished. Raises OSError if DST holds a different file of that name."""
        recorded = self.folder.entry(shard.name)
        if recorded is None or (recorded.sha256, recorded.settings) != (entry.sha256, entry.settings):
            raise OSError(
                f"{shard.name} was written, but {self.folder.address} holds a different file of that name: DST "
                "must be a folder that all hosts share, and that no other job overwrites"
            )
        self._record(shard, entry)

    def _record(self, shard: Shard, entry: ManifestEntry) -> None:
        self.done[shard.name] = entry
        self.tally.finish(shard, entry)
