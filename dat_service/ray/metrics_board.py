"""Collects the metrics of all replicas of an application on Ray, so that any replica can answer for all of them.

Every two seconds, each replica puts its metrics into a small Ray actor, the board. The board ends when the replica
that created it ends; the next replica that finds no board creates a new one. If the board cannot be reached, a
replica answers with its own metrics.
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
TIMEOUT_S = 1.0  # the longest time that a scrape waits for the board


class MetricsBoard:
    """The Ray actor that holds the newest metrics of each replica; it drops metrics that are older than 30 s."""

    def __init__(self) -> None:
        self.newest: dict[str, tuple[float, list[Metric]]] = {}

    def put(self, replica: str, families: list[Metric]) -> None:
        self.newest[replica] = (time.monotonic(), families)
        self._forget()

    def others(self, replica: str) -> list[list[Metric]]:
        """Returns the metrics of all replicas except `replica`."""
        self._forget()
        return [families for name, (_, families) in self.newest.items() if name != replica]

    def _forget(self) -> None:
        oldest = time.monotonic() - FORGET_AFTER_S
        self.newest = {name: entry for name, entry in self.newest.items() if entry[0] >= oldest}


class SharedMetrics:
    """Provides the metrics of all replicas in one replica, whose own metrics a thread sends to the board.

    >>> shared = SharedMetrics(metrics, application="tiny-f8")     # doctest: +SKIP
    >>> families = await shared.families()                         # doctest: +SKIP
    """

    def __init__(self, metrics: Metrics, application: str) -> None:
        self.metrics = metrics
        self.name = f"metrics of {application}"
        self.replica = metrics.labels["replica"]
        self._board: Any = None
        self._stopped = threading.Event()
        # This needs a thread, because Ray's calls block, and they block forever if Ray's head node cannot be
        # reached.
        self._thread = threading.Thread(target=self._push, name="metrics", daemon=True)
        self._thread.start()

    async def families(self) -> list[Metric]:
        """Returns the metrics of all replicas; those of remote replicas may be a few seconds old."""
        own = self.metrics.families()
        others: list[list[Metric]] = []
        board = self._board
        if board is not None:
            try:
                # The next scrape may be answered by a different replica, and no counter may fall between two
                # scrapes.
                board.put.remote(self.replica, own)
                reply = asyncio.wrap_future(board.others.remote(self.replica).future())
                others = await asyncio.wait_for(reply, TIMEOUT_S)
            except Exception as error:  # Ray raises several kinds of exceptions for a dead or unreachable actor
                log.warning("the metrics of all replicas but this one are missing: %s", type(error).__name__)
        return merged([own, *others])

    def _push(self) -> None:
        import ray

        actor = ray.remote(num_cpus=0)(MetricsBoard)
        while not self._stopped.wait(PUSH_EVERY_S if self._board is not None else 0):
            try:
                if self._board is None:
                    self._board = actor.options(name=self.name, namespace=NAMESPACE, get_if_exists=True).remote()
                ray.get(self._board.put.remote(self.replica, self.metrics.families()), timeout=10)
            except Exception as error:
                self._board = None
                log.warning("the metrics board is lost and will be created again: %s", type(error).__name__)
                self._stopped.wait(PUSH_EVERY_S)

    def stop(self) -> None:
        """Ends the thread. The board keeps the last metrics of this replica for 30 s."""
        self._stopped.set()
        self._thread.join(PUSH_EVERY_S)
