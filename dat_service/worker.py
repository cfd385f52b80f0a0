"""The codec in this process: its batcher, what requests hold of the capacity, and threads beside the codec's."""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Self, TypeVar

from dat_service.admission import FairShares
from dat_service.observability.metrics import Metrics
from dat_service.settings import Settings
from dat_workers.batching.batcher import Batcher
from dat_workers.discretizer import Discretizer
from dat_workers.errors import Full, TooLarge, Unhealthy

T = TypeVar("T")

SIDE_THREADS = 4  # decode pictures, parse long JSON and check floats while the codec computes


class CodecWorker:
    """Holds the discretizer and admits the requests for it.

    >>> worker = CodecWorker(Settings(codec="identity"))
    >>> worker.load()
    >>> with worker.admit("key/ci", 100) as reservation: ...

    `replica` names this process among the processes that serve the same codec.
    """

    def __init__(self, settings: Settings, replica: str = "local") -> None:
        self.settings = settings
        self.metrics = Metrics(settings.codec, replica)
        self.metrics.watch(self)
        self.discretizer: Discretizer | None = None
        self.slots = FairShares(settings.max_requests)
        self.bytes = FairShares(settings.max_held_bytes)
        # reentrant: garbage collection of a response closes its reservation, in any thread at any moment
        self.lock = threading.RLock()
        wait_ms = settings.max_wait_ms
        self.batcher = Batcher(
            max_wait_s=None if wait_ms is None else wait_ms / 1000,
            max_queue_s=settings.max_queue_s,
            watchdog_s=settings.watchdog_s,
            on_batch=self.metrics.batch,
        )
        self._stopped = False
        self._threads = ThreadPoolExecutor(SIDE_THREADS, thread_name_prefix="side")

    def load(self) -> None:
        """Loads and warms up the codec. Errors are raised, so that a replica without a codec never serves."""
        self.discretizer = self.batcher.start(self.make)
        self.metrics.describe(self.discretizer)

    def make(self) -> Discretizer:
        """Creates the discretizer; called in the thread that will run it."""
        return Discretizer.warm_from_store(self.settings.codec, self.settings.engine_config)

    @property
    def why_unhealthy(self) -> str:
        """Why the codec cannot compute any more; empty while it can."""
        return self.batcher.why_unhealthy

    @property
    def healthy(self) -> bool:
        """Whether the codec can still compute."""
        return not self.why_unhealthy

    @property
    def ready(self) -> bool:
        """Whether a request would be computed now."""
        return self.discretizer is not None and self.healthy and not self._stopped

    @property
    def queued_images(self) -> int:
        """The number of images that wait for the codec."""
        return self.batcher.queued

    @property
    def held(self) -> int:
        """The number of admitted requests: being read, waiting, being computed or being sent."""
        return self.slots.held

    @property
    def held_bytes(self) -> int:
        """Bytes that are reserved for requests and responses."""
        return self.bytes.held

    def admit(self, holder: str, nbytes: int) -> Reservation:
        """Reserves a slot and `nbytes` for a request. Raises Full, or Unhealthy if nothing can be computed now."""
        if not self.ready:
            why = "the service is shutting down" if self._stopped else "the codec is not loaded"
            raise Unhealthy(self.why_unhealthy or why)
        with self.lock:
            if not self.slots.take(holder, 1):
                raise Full(f"{self.held} requests are held", f"at most {self.slots.capacity}, in fair shares", 1)
        reservation = Reservation(self, holder)
        try:
            reservation.grow(nbytes)
        except BaseException:
            reservation.close()
            raise
        return reservation

    async def run_in_thread(self, task: Callable[[], T]) -> T:
        """Returns `task()`, run in a thread beside the codec's."""

        def run() -> T:
            try:
                return task()
            except BaseException as error:
                clear_frames(error)
                raise

        return await asyncio.get_running_loop().run_in_executor(self._threads, run)

    def stop(self) -> None:
        """Ends the threads after their current task; whatever still waits is refused."""
        self._stopped = True
        self.batcher.stop()
        self._threads.shutdown(wait=False, cancel_futures=True)


def clear_frames(error: BaseException) -> None:
    """Frees the local variables of an exception's frames: it waits for the event loop, and they may be large."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__context__


class Reservation:
    """The slot and the bytes that one request holds until `close`, which may be called more than once."""

    def __init__(self, worker: CodecWorker, holder: str) -> None:
        self.worker, self.holder = worker, holder
        self.nbytes = 0
        self.open = True

    def grow(self, nbytes: int) -> None:
        """Reserves `nbytes` more. Raises Full, or TooLarge if the request would need more than the whole capacity.

        Raises RuntimeError after `close`: a thread may still work on a request whose client has disconnected.
        """
        with self.worker.lock:
            if not self.open:
                raise RuntimeError("the request's reservation is closed: it has ended already")
            shares, total = self.worker.bytes, self.nbytes + nbytes
            if total > shares.capacity:
                raise TooLarge("request", f"{total} bytes", f"at most {shares.capacity} bytes held")
            # `change` and not `take`: the bytes that the request holds itself must not stand in its way
            if not shares.change(self.holder, self.nbytes, total):
                held = f"{shares.held} bytes are held and {nbytes} more wanted"
                raise Full(held, f"at most {shares.capacity}, in fair shares", 1)
            self.nbytes = total

    def close(self) -> None:
        """Gives back the slot and the bytes."""
        with self.worker.lock:
            if self.open:
                self.open = False
                self.worker.bytes.give(self.holder, self.nbytes)
                self.worker.slots.give(self.holder, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
