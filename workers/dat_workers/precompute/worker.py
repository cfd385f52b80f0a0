"""Computes output shards with one codec.

    reader, in order ─▶ decoders ─▶ the codec's queue (batcher.py) ─▶ encoders ─▶ writer, in order

A worker makes several shards at the same time. Their samples share the queue, so that batches stay full when a
shard ends.
"""

from __future__ import annotations

import secrets
import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dat_client.dataset_format.manifest import ManifestEntry
from dat_client.dataset_format.tar_samples import DamagedShard
from dat_client.wire.tensors import Array
from dat_workers.batching.batcher import Batcher
from dat_workers.discretizer import Discretizer
from dat_workers.engines.base import rows_at_once
from dat_workers.engines.config import EngineConfig
from dat_workers.errors import EngineError, OutOfMemory, Unhealthy
from dat_workers.precompute.output_folder import OutputFolder
from dat_workers.precompute.pipeline import VIEW_BYTES, PendingSample, SamplePipeline
from dat_workers.precompute.progress import ShardCounts, WorkerCounts
from dat_workers.precompute.recipe import Recipe
from dat_workers.sources.folders import Shard
from dat_workers.sources.reader import ShardReader, place_of

SHARDS_AT_ONCE = 2
COUNTED_SHARDS = 4 * SHARDS_AT_ONCE
MAX_PENDING_BYTES = 512 << 20  # limit of the samples of a shard being processed, x and Q(x) included
CPU_PROVIDER = "CPUExecutionProvider"  # ONNX Runtime's
WATCHDOG_S = 600.0
MAX_WAIT_S = 0.1  # how long a batch waits to fill; decoders may lag, and no caller waits for a picture


class SampleFailed(RuntimeError):
    """A sample is not usable, and skipping is not allowed; the message names the shard and the sample."""


class WorkerLost(RuntimeError):
    """A worker ended or failed before its shard was finished; a new worker replaces it."""


class Stopped(RuntimeError):
    """The job was stopped before the shard was finished."""


@dataclass(frozen=True)
class ShardOptions:
    """The recipe of a job, the address of DST, the name of the job, and whether the job skips unusable samples."""

    recipe: Recipe
    dst: str
    job: str
    skip: bool


class Worker:
    """Holds a codec and makes shards with it, in several threads at the same time.

    >>> worker = Worker("tiny-f8", EngineConfig())              # doctest: +SKIP
    >>> worker.make_shard(shard, options).sha256                    # doctest: +SKIP
    """

    def __init__(self, codec: str, config: EngineConfig) -> None:
        self.batcher = Batcher(max_wait_s=MAX_WAIT_S, max_queue_s=float("inf"), watchdog_s=WATCHDOG_S)
        self.discretizer = self.batcher.start(lambda: Discretizer.warm_from_store(codec, config))
        self.config = config
        engine = self.discretizer.engine.describe()
        self.on_gpu = engine["device"] != "cpu" or engine.get("provider", CPU_PROVIDER) != CPU_PROVIDER
        self.pipeline = SamplePipeline(self.discretizer, self.batcher, low_priority=not self.on_gpu)
        self._id = secrets.token_hex(4)
        self._images = 0
        self._shards: dict[str, ShardCounts] = {}
        self._counting = threading.Lock()
        self._stopping = threading.Event()

    def complete(self, recipe: Recipe) -> Recipe:
        """Returns the recipe with this codec's details filled in.

        Raises InvalidInput if the recipe needs tokens and the codec has none.
        """
        recipe.check_tokens(self.discretizer.spec)
        return recipe.made_by(
            self.discretizer.fingerprint, self.discretizer.engine.describe(), threads=self.config.cpu_threads
        )

    def make_shard(self, shard: Shard, options: ShardOptions) -> ManifestEntry:
        """Makes one output shard, records it in the manifest and returns its entry.

        Samples that are not usable and the damaged end of a tar are skipped if `options` allow it, and otherwise
        raise SampleFailed. Also raises Stopped, OSError, Unhealthy and OutOfMemory. After an exception DST holds no
        part of the shard, or the whole shard without a manifest entry, which counts as missing.
        """
        folder, recipe = OutputFolder(options.dst, options.job), options.recipe
        reader = ShardReader(shard, recipe.classes)
        skipped: list[tuple[str, str]] = []
        lacking: Counter[str] = Counter()
        pending: deque[PendingSample] = deque()
        # On a GPU the kernel depends on the number of rows, and may decide a near-tie differently, so all batches
        # are padded to be full. They are not padded if pictures differ in size, since then a picture would be
        # repeated to fill a whole batch.
        self.batcher.padded = self.on_gpu and recipe.crop is not None

        def skip(key: str, reason: str) -> None:
            if not options.skip:
                raise SampleFailed(f"{shard.address}, {place_of(key)}: {reason}")
            skipped.append((key, reason))

        def finish(sample: PendingSample) -> None:
            try:
                fields = sample.fields.result()
            except (OutOfMemory, Unhealthy):
                raise
            except (ValueError, EngineError) as error:  # InvalidInput is a ValueError
                skip(sample.key, str(error))
                self._count(shard.name, sample.source_bytes, images=0)
            else:
                writer.add(sample.key, fields)
                lacking.update(sample.lacking)
                self._count(shard.name, sample.source_bytes, images=recipe.views)

        with self._counting_shard(shard.name), folder.writing(shard.name) as writer:
            try:
                pending_bytes = read_bytes = 0
                for sample in reader:
                    if self._stopping.is_set():
                        raise Stopped(shard.name)
                    pending.append(self.pipeline.submit(sample, recipe, reader.nbytes - read_bytes))
                    read_bytes = reader.nbytes
                    pending_bytes += pending[-1].nbytes
                    max_pending = self._most_pending(recipe, pending_bytes / len(pending))
                    while len(pending) > max_pending or pending_bytes > MAX_PENDING_BYTES:
                        pending_bytes -= pending[0].nbytes
                        finish(pending.popleft())
                while pending:
                    finish(pending.popleft())
            except DamagedShard as error:
                while pending:
                    finish(pending.popleft())
                skip(error.key, str(error))
            finally:
                for sample_left in pending:
                    sample_left.fields.cancel()
        source = (shard.origin, shard.nbytes, reader.sha256)
        entry = ManifestEntry(
            shard.name, writer.samples, writer.nbytes, writer.sha256, recipe.id, tuple(skipped), source,
            reader.left_out.rows, tuple(sorted(lacking.items())),
        )  # fmt: skip
        folder.record(entry)
        return entry

    def _most_pending(self, recipe: Recipe, sample_bytes: float) -> int:
        """Returns how many samples of a shard to process at the same time: enough for four batches of the codec.

        Without a crop, pictures are as large as the mean of the samples being processed, which take `sample_bytes`.
        """
        pixels = recipe.crop**2 if recipe.crop is not None else round(sample_bytes / VIEW_BYTES / recipe.views)
        return max(4, (4 * rows_at_once(self.discretizer.engine, max(1, pixels)) + 16) // recipe.views)

    def counts(self) -> WorkerCounts:
        """Returns the views computed since the start, and what is finished of the present shards."""
        with self._counting:
            return WorkerCounts(self._id, self._images, dict(self._shards))

    def decode(self, indices: Array) -> Array:
        """Returns the pictures uint8 [N,3,H,W] of tokens [N,h,w]."""
        request = self.discretizer.prepare_decode(indices)
        return self.batcher.submit(request).result().outputs["reconstruction"]

    def stop(self) -> None:
        """Ends all work; calls of `make_shard` that are running raise Stopped."""
        self._stopping.set()
        self.batcher.stop()
        self.pipeline.stop()

    @contextmanager
    def _counting_shard(self, name: str) -> Iterator[None]:
        """Counts a shard while it is made, and after that until others have taken its place: the job may lag."""
        with self._counting:
            self._shards.pop(name, None)
            self._shards[name] = ShardCounts()
            while len(self._shards) > COUNTED_SHARDS:
                del self._shards[next(iter(self._shards))]
        try:
            yield
        except BaseException:
            with self._counting:
                self._shards.pop(name, None)
            raise

    def _count(self, shard: str, source_bytes: int, images: int) -> None:
        """Counts a sample that was written, or skipped if it gave no images."""
        with self._counting:
            self._images += images
            self._shards[shard] = self._shards[shard].plus(source_bytes, skipped=not images)
