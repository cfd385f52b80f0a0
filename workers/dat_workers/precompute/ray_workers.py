"""Workers as Ray actors. Ray restarts an actor that ends, and the job makes its unfinished shards again."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Collection
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from dat_client.dataset_format.manifest import ManifestEntry
from dat_client.wire.tensors import Array
from dat_workers.engines.config import EngineConfig
from dat_workers.errors import Unhealthy
from dat_workers.precompute.progress import WorkerCounts
from dat_workers.precompute.recipe import Recipe
from dat_workers.precompute.worker import SHARDS_AT_ONCE, ShardOptions, Worker, WorkerLost
from dat_workers.sources.folders import Shard
from dat_workers.system.ray_cluster import connect_ray

log = logging.getLogger("dat_workers")

LOG_EVERY_S = 30.0
COUNTS_TIMEOUT_S = 1.0  # the last known counts stand in for those of a worker that does not answer in time
# Without this setting OpenMP's waiting threads would spin, and take the cores from decoders and the other workers.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}


class RayWorkers:
    """Actors in the cluster that RAY_ADDRESS names, or in a local Ray that this job starts.

    gpus: the number of GPUs of each worker, for example 0.5 for two workers on a GPU; None means 1 if the cluster
    has GPUs, else 0. Raises NoCluster, and the exception of a worker that cannot load its codec.
    """

    def __init__(self, codec: str, config: EngineConfig, workers: int, gpus: float | None = None) -> None:
        self.workers = workers
        self._latest = [WorkerCounts()] * workers
        self._images_of_ended = 0  # of workers that have ended
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default, 15, gives all others priority
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        cluster = os.environ.get("RAY_ADDRESS")
        connect_ray(cluster or None)
        import ray

        self._ray: Any = ray
        logged_at = time.monotonic()
        try:
            present = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
            if gpus is None:
                gpus = 1 if present >= 1 and config.device != "cpu" else 0
            if not gpus:
                if config.device.startswith("cuda"):
                    raise RuntimeError(f"device is {config.device!r}, but each worker reserves 0 GPUs")
                # Ray does not hide a node's GPUs from an actor that reserves none, and `auto` would use the first.
                config = replace(config, device="cpu")
            elif gpus < 1:
                config = replace(config, gpu_share=gpus)
            if gpus * workers > present and not cluster:
                raise RuntimeError(
                    f"{workers} workers need {gpus * workers:g} GPUs, but this machine has {present:g}"
                )
            actor: Any = ray.remote(Worker).options(
                num_gpus=gpus, num_cpus=1 if cluster and not gpus else 0, max_restarts=-1,
                max_concurrency=SHARDS_AT_ONCE + 2, scheduling_strategy="SPREAD",
                runtime_env={"env_vars": ENVIRONMENT},
            )  # fmt: skip
            self._actors: list[Any] = [actor.remote(codec, config) for _ in range(workers)]
            self._starting = {i: actor.counts.remote() for i, actor in enumerate(self._actors)}
            while len(self.ready()) < workers:
                time.sleep(0.2)
                if time.monotonic() - logged_at > LOG_EVERY_S:
                    logged_at = time.monotonic()
                    log.warning("%d of %d workers wait for a place on the cluster", len(self._starting), workers)
        except BaseException:
            self.stop()
            raise

    def complete(self, recipe: Recipe) -> Recipe:
        """Returns the recipe with the codec's details filled in, as `Worker.complete` does."""
        completed: Recipe = self._get(self._actors[0].complete.remote(recipe))
        return completed

    def ready(self) -> Collection[int]:
        """Returns the workers that accept shards. Raises the exception of a worker that could not start."""
        for i, first_call in list(self._starting.items()):
            if not self._ray.wait([first_call], timeout=0)[0]:
                continue
            try:
                self._ray.get(first_call)
                del self._starting[i]
            except self._ray.exceptions.ActorDiedError as error:
                raise self._plain(error) from None  # its codec cannot be loaded
            except self._ray.exceptions.RayError:  # it is still being restarted
                self._starting[i] = self._actors[i].counts.remote()
        return [i for i in range(self.workers) if i not in self._starting]

    def submit(self, worker: int, shard: Shard, options: ShardOptions) -> Future[ManifestEntry]:
        """Calls `Worker.make_shard` in a worker's actor and returns the future, which may also raise WorkerLost."""
        actor = self._actors[worker]
        result: Future[ManifestEntry] = Future()

        def settle(call: Future[ManifestEntry]) -> None:
            error = call.exception()
            if error is None:
                result.set_result(call.result())
                return
            cause = self._plain(error)
            if isinstance(cause, Unhealthy):
                with contextlib.suppress(Exception):  # it may have ended by itself
                    self._ray.kill(actor, no_restart=False)
                cause = WorkerLost(str(cause))
            if isinstance(cause, WorkerLost):
                self._starting[worker] = actor.counts.remote()
            result.set_exception(cause)

        actor.make_shard.remote(shard, options).future().add_done_callback(settle)
        return result

    def counts(self) -> WorkerCounts:
        """Returns the counts of all workers together."""
        calls = {actor.counts.remote(): i for i, actor in enumerate(self._actors)}
        ready, _ = self._ray.wait(list(calls), num_returns=len(calls), timeout=COUNTS_TIMEOUT_S)
        for call in ready:
            i = calls[call]
            with contextlib.suppress(Exception):  # the worker has ended, or is being started
                counts = self._ray.get(call)
                if counts.worker != self._latest[i].worker:  # a new worker counts from 0
                    self._images_of_ended += self._latest[i].images
                self._latest[i] = counts
        return WorkerCounts.together([WorkerCounts(images=self._images_of_ended), *self._latest])

    def decode(self, indices: Array) -> Array:
        """Returns the pictures of tokens, as `Worker.decode` does."""
        pictures: Array = self._get(self._actors[0].decode.remote(indices))
        return pictures

    def stop(self) -> None:
        """Ends all workers and their work."""
        self._ray.shutdown()

    def _get(self, call: Any) -> Any:
        try:
            return self._ray.get(call)
        except Exception as error:
            raise self._plain(error) from None

    def _plain(self, error: BaseException) -> BaseException:
        """Returns the exception that the worker itself raised, or WorkerLost if the worker ended."""
        exceptions = self._ray.exceptions
        if isinstance(error, exceptions.RayTaskError):
            return error.cause if isinstance(error.cause, Exception) else RuntimeError(str(error))
        if isinstance(error, exceptions.ActorDiedError) and "Error: " in str(error):
            last = [line.strip() for line in str(error).splitlines() if "Error: " in line][-1]
            return RuntimeError(f"a worker could not start: {last}")
        if isinstance(error, exceptions.RayError):
            return WorkerLost(str(error).splitlines()[0])
        return error
