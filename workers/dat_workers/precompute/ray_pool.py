"""Workers as Ray actors: one that ends is started anew, and its shards are made again."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Collection
from concurrent.futures import Future
from typing import Any

from dat_workers.batching.device_copies import Array
from dat_workers.engines.config import EngineConfig
from dat_workers.errors import Unhealthy
from dat_workers.precompute.folder import Entry
from dat_workers.precompute.pool import WorkerLost
from dat_workers.precompute.recipe import Recipe
from dat_workers.precompute.sources import Shard
from dat_workers.precompute.worker import SHARDS_AT_ONCE, Orders, Progress, Worker
from dat_workers.system.signals import interrupted_later

log = logging.getLogger("dat_workers")

LINE_EVERY_S = 30.0
ANSWER_S = 1.0  # a worker that says nothing of its progress for so long is left out of this count
# OpenMP's threads would spin while they wait, and take the cores from decoders and from other workers
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}


class RayPool:
    """Actors in the cluster that RAY_ADDRESS names, or in a Ray of this job's own.

    gpus: of each worker, 0.5 for two on one; None: 1 where the cluster has one. Raises what a worker raises that
    cannot load its codec.
    """

    def __init__(self, codec: str, config: EngineConfig, workers: int, gpus: float | None = None) -> None:
        self.workers = workers
        self._counted = [Progress()] * workers  # what each has said last
        self._before = Progress()  # what those had done that ended
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own choice is 15: anything beside it comes first
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        self._ray: Any = ray
        shared = os.environ.get("RAY_ADDRESS")
        with interrupted_later():
            ray.init(
                address=shared or "local", include_dashboard=False, configure_logging=False, log_to_driver=False,
                namespace="dat",
            )  # fmt: skip
        said = time.monotonic()
        try:
            present = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
            if gpus is None:
                gpus = 1 if present >= 1 and config.device != "cpu" else 0
            if gpus * workers > present and not shared:
                raise RuntimeError(
                    f"{workers} workers ask for {gpus * workers:g} GPUs, and this machine has {present:g}"
                )
            actor: Any = ray.remote(Worker).options(
                num_gpus=gpus, num_cpus=1 if shared and not gpus else 0, max_restarts=-1,
                max_concurrency=SHARDS_AT_ONCE + 2, scheduling_strategy="SPREAD",
                runtime_env={"env_vars": ENVIRONMENT},
            )  # fmt: skip
            self._actors: list[Any] = [actor.remote(codec, config) for _ in range(workers)]
            self._down = {i: each.counts.remote() for i, each in enumerate(self._actors)}
            while len(self.ready()) < workers:
                time.sleep(0.2)
                if time.monotonic() - said > LINE_EVERY_S:
                    said = time.monotonic()
                    log.warning("%d of %d workers wait for a place on the cluster", len(self._down), workers)
        except BaseException:
            self.stop()
            raise

    def complete(self, recipe: Recipe) -> Recipe:
        done: Recipe = self._get(self._actors[0].complete.remote(recipe))
        return done

    def ready(self) -> Collection[int]:
        for i, asked in list(self._down.items()):
            if not self._ray.wait([asked], timeout=0)[0]:
                continue
            try:
                self._ray.get(asked)
                del self._down[i]
            except self._ray.exceptions.ActorDiedError as error:
                raise self._plain(error) from None  # its codec does not load
            except self._ray.exceptions.RayError:  # it is being started
                self._down[i] = self._actors[i].counts.remote()
        return [i for i in range(self.workers) if i not in self._down]

    def submit(self, worker: int, shard: Shard, orders: Orders) -> Future[Entry]:
        actor = self._actors[worker]
        made: Future[Entry] = Future()

        def settle(answer: Future[Entry]) -> None:
            error = answer.exception()
            if error is None:
                made.set_result(answer.result())
                return
            why = self._plain(error)
            if isinstance(why, Unhealthy):
                with contextlib.suppress(Exception):  # it may have ended by itself
                    self._ray.kill(actor, no_restart=False)
                why = WorkerLost(str(why))
            if isinstance(why, WorkerLost):
                self._down[worker] = actor.counts.remote()
            made.set_exception(why)

        actor.shard.remote(shard, orders).future().add_done_callback(settle)
        return made

    def progress(self) -> Progress:
        asked = {actor.counts.remote(): i for i, actor in enumerate(self._actors)}
        ready, _ = self._ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
        for ref in ready:
            i = asked[ref]
            with contextlib.suppress(Exception):  # it has ended, or is being started
                said = self._ray.get(ref)
                if said.nbytes < self._counted[i].nbytes:
                    self._before += self._counted[i]
                self._counted[i] = said
        return sum(self._counted, self._before)

    def decode(self, indices: Array) -> Array:
        pictures: Array = self._get(self._actors[0].decode.remote(indices))
        return pictures

    def stop(self) -> None:
        self._ray.shutdown()

    def _get(self, ref: Any) -> Any:
        try:
            return self._ray.get(ref)
        except Exception as error:
            raise self._plain(error) from None

    def _plain(self, error: BaseException) -> BaseException:
        """What the worker itself raised, or WorkerLost."""
        exceptions = self._ray.exceptions
        if isinstance(error, exceptions.RayTaskError):
            return error.cause if isinstance(error.cause, Exception) else RuntimeError(str(error))
        if isinstance(error, exceptions.ActorDiedError) and "Error: " in str(error):
            last = [line.strip() for line in str(error).splitlines() if "Error: " in line][-1]
            return RuntimeError(f"a worker could not start: {last}")
        if isinstance(error, exceptions.RayError):
            return WorkerLost(str(error).splitlines()[0])
        return error
