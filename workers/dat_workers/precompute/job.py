"""`precompute`: a whole dataset through Q once, shards in, shards out."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace

from dat_workers.engines.config import DEFAULT_ENGINE, EngineConfig
from dat_workers.errors import InvalidInput
from dat_workers.precompute.contact_sheet import contact_sheet
from dat_workers.precompute.folder import Entry, Folder
from dat_workers.precompute.pool import LocalPool, Pool, WorkerLost
from dat_workers.precompute.recipe import Recipe
from dat_workers.precompute.sources import LOOKED_AT_ONCE, PICTURES_A_SHARD, Shard, Source, find, reached
from dat_workers.precompute.worker import SHARDS_AT_ONCE, Orders
from dat_workers.system.threads import Threads

log = logging.getLogger("dat_workers")

TICK_S = 0.5
TRIES = 3  # a shard under which so many workers ended is not given to another
SHEET = "contact-sheet.html"


@dataclass(frozen=True)
class State:
    """How far a job is. `shards` and `nbytes` (of sources) count those that were there too; `images` and `seconds`
    are of this run alone."""

    shards: int
    shards_done: int
    nbytes: int
    nbytes_done: int
    images: int
    skipped: int
    workers_lost: int
    seconds: float

    @property
    def share(self) -> float:
        """Done, 0 to 1, by bytes of the sources where their storage says them."""
        if not self.shards or self.shards_done == self.shards:
            return 1.0
        if not self.nbytes:
            return self.shards_done / self.shards
        return min(1.0, self.nbytes_done / self.nbytes)


@dataclass(frozen=True)
class Summary:
    """What DST holds of this source, and what this run did for it.

    seconds: of the making alone. others: shards in DST that are not of this source. skipped_first: (shard, key,
    reason) of up to 20.
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


def precompute(
    source: str | Sequence[str],
    dst: str,
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
    keep: Collection[str] | None = None,
    workers: int = 1,
    ray: bool = False,
    gpus: float | None = None,
    skip: bool = False,
    overwrite: bool = False,
    check_hashes: bool = False,
    pictures_a_shard: int = PICTURES_A_SHARD,
    engine_config: EngineConfig = DEFAULT_ENGINE,
    report: Callable[[State], None] = lambda state: None,
) -> Summary:
    """Writes Q(x) of all samples of `source` into shards of the same names in `dst`.

    >>> precompute("train-{000000..000007}.tar", "train-q", outputs=["indices"])         # doctest: +SKIP

    source, dst: a path or an fsspec address; source also a brace pattern, a folder of pictures, or several of
    these. The settings of the recipe as in `Recipe`. `skip`: samples that cannot be used are left out and named in
    the manifest; else the first one ends the job. `ray`: workers are actors on the Ray that RAY_ADDRESS names, or
    on one of the job's own. `report` is told the state about twice a second.

    May be killed at any moment: the next run goes on with the shards that are missing, and the bytes that it leaves
    are the same. Raises InvalidInput, OtherRecipe, SampleFailed, OSError, CodecError.
    """
    recipe = Recipe(
        codec, outputs=tuple(outputs), picture=picture, quality=quality, resize=resize, crop=crop, augment=augment,
        replace_fraction=replace_fraction, variants=variants, seed=seed,
        keep=None if keep is None else tuple(keep),
    )  # fmt: skip
    if not 1 <= workers <= 1024:
        raise InvalidInput("workers", workers, "1 to 1024")
    with reached(source):
        found = find(source, pictures_a_shard=pictures_a_shard)
    if not found.shards:
        raise InvalidInput("source", source, "at least one shard")
    if any(shard.files for shard in found.shards):
        recipe = replace(recipe, classes=found.classes, pictures_a_shard=pictures_a_shard)
    if "{" in dst:
        raise InvalidInput("dst", dst, "one folder: shards keep their names")
    folder = Folder(dst)
    check_apart(found, folder)
    with reached(dst):
        folder.begin()
    try:
        if ray:
            from dat_workers.precompute.ray_pool import RayPool

            pool: Pool = RayPool(codec, engine_config, workers, gpus)
        else:
            pool = LocalPool(codec, engine_config, workers)
        try:
            recipe = pool.complete(recipe)
            with reached(dst):
                folder.settle(recipe, found.shards, overwrite=overwrite)
                return Job(found, folder, recipe, pool, skip, check_hashes, report).run()
        finally:
            pool.stop()
    finally:
        folder.end()


def check_apart(source: Source, folder: Folder) -> None:
    """Raises InvalidInput where a shard would overwrite its source, or be found as input by the next run."""
    dst = folder.full_address
    for searched in source.folders:
        if f"{dst}/".startswith(f"{searched.rstrip('/')}/"):
            raise InvalidInput("dst", folder.address, f"a folder that is not within the source, {searched}")
    for shard in source.shards:
        if f"{dst}/{shard.name}" == shard.address:
            raise InvalidInput("dst", folder.address, f"another folder than that of the source, {shard.address}")


class Job:
    """Gives shards to workers until all are there."""

    def __init__(
        self,
        source: Source,
        folder: Folder,
        recipe: Recipe,
        pool: Pool,
        skip: bool,
        check_hashes: bool,
        report: Callable[[State], None],
    ) -> None:
        self.source, self.folder, self.recipe, self.pool = source, folder, recipe, pool
        self.check_hashes = check_hashes
        self.orders = Orders(recipe, folder.full_address, folder.job, skip)
        self.report = report
        self.began = time.monotonic()
        self.done: dict[str, Entry] = {}
        self.kept = self.kept_bytes = self.lost = 0
        self.total = sum(shard.nbytes for shard in source.shards)

    def run(self) -> Summary:
        missing = self._missing()
        if self.folder.others or not self.folder.local:  # each begins with what the others are not at
            random.Random(self.folder.job).shuffle(missing)
        self.began = time.monotonic()
        if missing:
            self.folder.remove_file(SHEET)  # it shows what was
        self._make(deque(missing))
        state = self.state()
        if not self.folder.has(SHEET):
            self.folder.write(SHEET, contact_sheet(self.source, self.folder, self.recipe, self.pool.decode))
        entries = [self.done[shard.name] for shard in self.source.shards]
        skipped = [(entry.shard, key, reason) for entry in entries for key, reason in entry.skipped]
        return Summary(
            len(entries), self.kept, sum(entry.samples for entry in entries), len(skipped),
            sum(entry.nbytes for entry in entries), state.images, state.seconds, self.lost,
            self.recipe.fingerprint, len(self.folder.names() - set(self.done)), tuple(skipped[:20]),
        )  # fmt: skip

    def state(self) -> State:
        counts = self.pool.progress()
        # a shard that was made twice was read twice
        read = min(self.kept_bytes + counts.nbytes, self.total)
        return State(
            len(self.source.shards), len(self.done), self.total, read, counts.images, counts.skipped,
            self.lost, time.monotonic() - self.began,
        )  # fmt: skip

    def _missing(self) -> list[Shard]:
        """Shards that are not there yet, or not as they should be."""
        shards, threads = self.source.shards, Threads(LOOKED_AT_ONCE, "look")
        for start in range(0, len(shards), LOOKED_AT_ONCE):
            some = shards[start : start + LOOKED_AT_ONCE]
            for shard, entry in zip(some, threads.map(self._look, some), strict=True):
                self._keep(shard, entry)
            self.report(self.state())
        return [shard for shard in shards if shard.name not in self.done]

    def _look(self, shard: Shard) -> Entry | None:
        return self.folder.done(shard, self.recipe, hashes=self.check_hashes)

    def _keep(self, shard: Shard, entry: Entry | None) -> bool:
        """Counts a shard that is there, made by a run before or by another job."""
        if entry is None:
            return False
        self.done[shard.name] = entry
        self.kept += 1
        self.kept_bytes += shard.nbytes
        return True

    def _make(self, missing: deque[Shard]) -> None:
        busy: dict[Future[Entry], tuple[int, Shard]] = {}
        tries: Counter[str] = Counter()
        told = 0.0
        while missing or busy:
            load = Counter(worker for worker, _ in busy.values())
            worker = min(self.pool.ready() if missing else (), key=lambda i: load[i], default=None)
            if worker is not None and load[worker] < SHARDS_AT_ONCE:
                shard = missing.popleft()
                if tries[shard.name] or not self._keep(shard, self._look(shard)):
                    busy[self.pool.submit(worker, shard, self.orders)] = (worker, shard)
                continue
            if not busy:  # all workers are being replaced
                time.sleep(TICK_S)
            ready, _ = wait(busy, timeout=TICK_S, return_when=FIRST_COMPLETED)
            for future in ready:
                _, shard = busy.pop(future)
                try:
                    self._enter(shard, future.result())
                except WorkerLost as error:
                    self.lost += 1
                    tries[shard.name] += 1
                    if tries[shard.name] >= TRIES:
                        error.add_note(f"precompute: {TRIES} workers ended over {shard.address}")
                        raise
                    log.warning("%s; %s is made again", error, shard.name)
                    missing.appendleft(shard)
            if time.monotonic() - told >= TICK_S:
                self.report(self.state())
                told = time.monotonic()
        self.report(self.state())

    def _enter(self, shard: Shard, entry: Entry) -> None:
        there = self.folder.entry(shard.name)
        if there is None or (there.sha256, there.settings) != (entry.sha256, entry.settings):
            raise OSError(
                f"{shard.name} was written, and another one is in {self.folder.address}: DST must be a folder that "
                "all hosts share, and that no other job overwrites"
            )
        self.done[shard.name] = entry
