"""The workers that make the shards of a job: in this process, or Ray actors (ray_workers.py)."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol

import torch

from dat_client.dataset_format.manifest import ManifestEntry
from dat_workers.batching.device_copies import Array
from dat_workers.engines.config import EngineConfig
from dat_workers.engines.factory import pick_device
from dat_workers.precompute.recipe import Recipe
from dat_workers.precompute.sources import Shard
from dat_workers.precompute.worker import SHARDS_AT_ONCE, ShardOptions, Worker, WorkerCounts


class WorkerLost(RuntimeError):
    """A worker ended or can compute nothing more before its shard was finished; another one replaces it."""


class WorkerPool(Protocol):
    """Numbered workers, each with a codec of its own."""

    workers: int

    def complete(self, recipe: Recipe) -> Recipe:
        """As `Worker.complete`."""
        ...

    def ready(self) -> Collection[int]:
        """Returns the workers that accept shards. Raises WorkerLost where one never will again."""
        ...

    def submit(self, worker: int, shard: Shard, options: ShardOptions) -> Future[ManifestEntry]:
        """As `Worker.make_shard`; the future may also raise WorkerLost."""
        ...

    def counts(self) -> WorkerCounts:
        """Returns the counts of all workers together."""
        ...

    def decode(self, indices: Array) -> Array:
        """As `Worker.decode`."""
        ...

    def stop(self) -> None:
        """Ends all workers and their work."""
        ...


class LocalWorkers:
    """Workers in this process: with CUDA they take turns on the GPUs; on a CPU one is as fast as many."""

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
        return self._workers[0].complete(recipe)

    def ready(self) -> Collection[int]:
        return range(self.workers)

    def submit(self, worker: int, shard: Shard, options: ShardOptions) -> Future[ManifestEntry]:
        return self._threads.submit(self._workers[worker].make_shard, shard, options)

    def counts(self) -> WorkerCounts:
        return sum((worker.counts() for worker in self._workers), WorkerCounts())

    def decode(self, indices: Array) -> Array:
        return self._workers[0].decode(indices)

    def stop(self) -> None:
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown(cancel_futures=True)
