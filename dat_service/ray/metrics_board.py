"""One /metrics for all replicas of an application on Ray: whichever is asked answers for all of them.

Each replica puts its metrics into a small actor every two seconds. It belongs to the replica that made it and goes
with it; the next one that misses it makes it again. Whatever fails here, a replica answers with its own metrics.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import Any

from prometheus_client import Metric

from dat_service.observability.metrics import Metrics, merged

log = logging.getLogger("dat_service")

NAMESPACE = "dat"
PUSH_EVERY_S = 2.0
FORGET_AFTER_S = 30.0
LONGEST_S = 1.0  # that a scrape waits for the others


class Board:
    """The actor: the newest metrics of each replica, by its name."""

    def __init__(self) -> None:
        self.newest: dict[str, tuple[float, list[Metric]]] = {}

    def put(self, replica: str, families: list[Metric]) -> None:
        self.newest[replica] = (time.monotonic(), families)
        limit = time.monotonic() - FORGET_AFTER_S
        self.newest = {name: entry for name, entry in self.newest.items() if entry[0] >= limit}

    def others(self, replica: str) -> list[list[Metric]]:
        """Those of the others that were put in the last 30 s."""
        limit = time.monotonic() - FORGET_AFTER_S
        return [families for name, (at, families) in self.newest.items() if name != replica and at >= limit]


class Gather:
    """A replica's side, with the thread that pushes.

    >>> gather = Gather(metrics, application="tiny-f8")     # doctest: +SKIP
    >>> families = await gather.families()                  # doctest: +SKIP
    """

    def __init__(self, metrics: Metrics, application: str) -> None:
        self.metrics = metrics
        self.name = f"metrics of {application}"
        self.replica = metrics.labels["replica"]
        self._board: Any = None
        self._stopped = threading.Event()
        # a thread, because Ray's calls block, without limit where its head is not reached
        self._thread = threading.Thread(target=self._push, name="metrics", daemon=True)
        self._thread.start()

    async def families(self) -> list[Metric]:
        """The metrics of all replicas: this one's as they stand, the others' at most some seconds old."""
        own = self.metrics.families()
        others: list[list[Metric]] = []
        board = self._board
        if board is not None:
            try:
                # these too, so that who is asked next does not show older ones
                board.put.remote(self.replica, own)
                asked = asyncio.wrap_future(board.others.remote(self.replica).future())
                others = await asyncio.wait_for(asked, LONGEST_S)
            except Exception as error:  # a dead or unreachable actor, in any of Ray's ways to say so
                log.warning("the other replicas' metrics are missing: %s", type(error).__name__)
        return merged([own, *others])

    def _push(self) -> None:
        import ray

        actor = ray.remote(num_cpus=0)(Board)
        while not self._stopped.wait(PUSH_EVERY_S if self._board is not None else 0):
            try:
                if self._board is None:
                    self._board = actor.options(name=self.name, namespace=NAMESPACE, get_if_exists=True).remote()
                ray.get(self._board.put.remote(self.replica, self.metrics.families()), timeout=10)
            except Exception as error:
                self._board = None
                log.warning("the actor for metrics is made again: %s", type(error).__name__)
                self._stopped.wait(PUSH_EVERY_S)

    def stop(self) -> None:
        """Ends the thread; the replica's metrics are shown by the others for 30 s more."""
        self._stopped.set()
        self._thread.join(PUSH_EVERY_S)
