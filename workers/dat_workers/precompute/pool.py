"""Who makes the shards: workers in this process, or Ray actors (ray_pool.py)."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol

import torch

from dat_workers.batching.device_copies import Array
from dat_workers.engines.config import EngineConfig
from dat_workers.engines.factory import pick_device
from dat_workers.precompute.folder import Entry
from dat_workers.precompute.recipe import Recipe
from dat_workers.precompute.sources import Shard
from dat_workers.precompute.worker import SHARDS_AT_ONCE, Orders, Progress, Worker


class WorkerLost(RuntimeError):
    """A worker ended, or can compute nothing more, before its shard was done; another one takes its place."""


class Pool(Protocol):
    """Workers by number, each with a codec."""

    workers: int

    def complete(self, recipe: Recipe) -> Recipe:
        """As `Worker.complete`."""
        ...

    def ready(self) -> Collection[int]:
        """Workers that can be given shards. Raises WorkerLost where one will never be again."""
        ...

    def submit(self, worker: int, shard: Shard, orders: Orders) -> Future[Entry]:
        """As `Worker.shard`; its future may also raise WorkerLost."""
        ...

    def progress(self) -> Progress:
        """Of all workers together."""
        ...

    def decode(self, indices: Array) -> Array:
        """As `Worker.decode`."""
        ...

    def stop(self) -> None:
        """Ends all workers, and what they are at."""
        ...


class LocalPool:
    """Workers in this process: on CUDA one a GPU, by turns; on a CPU one is as fast as many."""

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

    def submit(self, worker: int, shard: Shard, orders: Orders) -> Future[Entry]:
        return self._threads.submit(self._workers[worker].shard, shard, orders)

    def progress(self) -> Progress:
        return sum((worker.counts() for worker in self._workers), Progress())

    def decode(self, indices: Array) -> Array:
        return self._workers[0].decode(indices)

    def stop(self) -> None:
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown(cancel_futures=True)
