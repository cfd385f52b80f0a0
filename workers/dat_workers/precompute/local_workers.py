"""Workers in this process; `RayWorkers` (ray_workers.py) has the same methods."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from dat_client.dataset_format.manifest import ManifestEntry
from dat_client.wire.tensors import Array
from dat_workers.engines.config import EngineConfig
from dat_workers.engines.factory import pick_device
from dat_workers.precompute.progress import WorkerCounts
from dat_workers.precompute.recipe import Recipe
from dat_workers.precompute.worker import SHARDS_AT_ONCE, ShardOptions, Worker
from dat_workers.sources.folders import Shard


class LocalWorkers:
    """Numbered workers, each with its own codec, assigned to the GPUs in turn; on a CPU one worker suffices."""

    def __init__(self, codec: str, config: EngineConfig, workers: int) -> None:
        self.workers = workers
        self._workers: list[Worker] = []
        self._threads = ThreadPoolExecutor(workers * SHARDS_AT_ONCE, "shard")
        gpus = torch.cuda.device_count() if config.device in ("auto", "cuda") else 0
        try:
            for i in range(workers):
                device = f"cuda:{i % gpus}" if gpus and pick_device(config.device).type == "cuda" else config.device
                self._workers.append(Worker(codec, replace(config, device=device)))
        except BaseException:
            self.stop()
            raise

    def complete(self, recipe: Recipe) -> Recipe:
        """Returns the recipe with the codec's details filled in, as `Worker.complete` does."""
        return self._workers[0].complete(recipe)

    def ready(self) -> Collection[int]:
        """Returns the workers that accept shards."""
        return range(self.workers)

    def submit(self, worker: int, shard: Shard, options: ShardOptions) -> Future[ManifestEntry]:
        """Starts `Worker.make_shard` of a worker in a thread, and returns the future of the manifest entry."""
        return self._threads.submit(self._workers[worker].make_shard, shard, options)

    def counts(self) -> WorkerCounts:
        """Returns the counts of all workers together."""
        return WorkerCounts.together(worker.counts() for worker in self._workers)

    def decode(self, indices: Array) -> Array:
        """Returns the pictures of tokens, as `Worker.decode` does."""
        return self._workers[0].decode(indices)

    def stop(self) -> None:
        """Ends all workers and their work."""
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown(cancel_futures=True)
