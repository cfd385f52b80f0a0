"""The progress of a job: what its workers have finished, and how much of the whole that is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dat_client.dataset_format.manifest import ManifestEntry
from dat_workers.sources.folders import Shard

LOADING = "loading the codec"
LOOKING = "looking at the shards in DST"
COMPUTING = "computing"
CONTACT_SHEET = "drawing the contact sheet"


@dataclass(frozen=True)
class ShardCounts:
    """Counts what is finished of a shard, that is written or skipped: samples, and bytes of its source."""

    nbytes: int = 0
    samples: int = 0
    skipped: int = 0

    def plus(self, nbytes: int, *, skipped: bool) -> ShardCounts:
        """Returns the counts after one more sample, which took `nbytes` bytes of the source."""
        return ShardCounts(self.nbytes + nbytes, self.samples + 1, self.skipped + skipped)


@dataclass(frozen=True)
class WorkerCounts:
    """The counts of one worker, or of several together.

    worker: differs after a restart. images: views computed since the start. shards: those that are being made, by
    name, and the last few that were finished.
    """

    worker: str = ""
    images: int = 0
    shards: Mapping[str, ShardCounts] = field(default_factory=dict)

    @staticmethod
    def together(counts: Iterable[WorkerCounts]) -> WorkerCounts:
        """Returns the counts of several workers together."""
        workers = list(counts)
        shards = {name: shard for worker in workers for name, shard in worker.shards.items()}
        return WorkerCounts("", sum(worker.images for worker in workers), shards)


@dataclass(frozen=True)
class JobProgress:
    """The progress of a job.

    The counts of shards, bytes of sources, samples and skipped samples are of what is finished, and include what
    was finished before this run; `images` and `seconds` count this run alone.

    phase: LOADING, LOOKING, COMPUTING or CONTACT_SHEET. samples: how many there are, or None if that is not known
    (a tar does not say how many it holds). shards_looked: how many shards the phase LOOKING has looked at.
    """

    phase: str
    shards: int
    nbytes: int
    samples: int | None
    shards_looked: int = 0
    shards_done: int = 0
    nbytes_done: int = 0
    samples_done: int = 0
    skipped: int = 0
    images: int = 0
    workers_lost: int = 0
    seconds: float = 0.0

    @property
    def unit(self) -> str:
        """The name of what `share` counts: "samples", "bytes" (of sources), or "shards" if sizes are unknown."""
        return "samples" if self.samples is not None else "bytes" if self.nbytes else "shards"

    @property
    def share(self) -> float | None:
        """The finished share of the present phase, 0 to 1; None if the phase has no known length."""
        if self.phase == LOADING:
            return None
        if self.phase == LOOKING:
            return self.shards_looked / self.shards
        if self.shards_done == self.shards:
            return 1.0
        if self.unit == "shards":
            return self.shards_done / self.shards
        done, whole = (self.nbytes_done, self.nbytes) if self.samples is None else (self.samples_done, self.samples)
        return min(1.0, done / whole) if whole else 0.0


def number_of_pictures(shard: Shard) -> int:
    """Returns the number of pictures of a folder that a shard makes or skips."""
    return len(shard.files) + len(shard.problems)


class Tally:
    """Adds up what is finished: whole shards, and the parts of shards that workers report."""

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._shards = {shard.name: shard for shard in shards}
        of_pictures = all(shard.files for shard in self._shards.values())
        self._number = sum(map(number_of_pictures, self._shards.values())) if of_pictures else None
        self._nbytes = sum(shard.nbytes for shard in self._shards.values())
        self._done: set[str] = set()
        self._finished = ShardCounts()

    def finish(self, shard: Shard, entry: ManifestEntry) -> None:
        """Adds a finished shard."""
        skipped = len(entry.skipped)
        samples = number_of_pictures(shard) if shard.files else entry.samples + skipped
        done = self._finished
        self._done.add(shard.name)
        self._finished = ShardCounts(done.nbytes + shard.nbytes, done.samples + samples, done.skipped + skipped)

    def progress(self, phase: str, counts: WorkerCounts) -> JobProgress:
        """Returns the progress, given what the workers report."""
        parts = {name: part for name, part in counts.shards.items() if name not in self._done}
        done = self._finished
        nbytes = sum(min(part.nbytes, self._shards[name].nbytes) for name, part in parts.items())
        return JobProgress(
            phase, len(self._shards), self._nbytes, self._number,
            shards_done=len(self._done),
            nbytes_done=done.nbytes + nbytes,
            samples_done=done.samples + sum(part.samples for part in parts.values()),
            skipped=done.skipped + sum(part.skipped for part in parts.values()),
            images=counts.images,
        )  # fmt: skip
