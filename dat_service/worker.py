"""Runs the codec in this process: its batcher, the limits on admitted requests, and threads for side work."""

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

SIDE_THREADS = 4  # these decode pictures, parse long JSON and check floats while the codec computes


class CodecWorker:
    """Holds the discretizer of this process and admits requests to it.

    >>> worker = CodecWorker(Settings(codec="identity"))
    >>> worker.load()
    >>> with worker.admit("key/ci", 100) as reservation:
    ...     reservation.grow(100)  # as the bytes arrive
    ...     reservation.take_slot()  # when all have arrived

    `replica` is a name that sets this process apart from all others that serve the same codec.
    """

    def __init__(self, settings: Settings, replica: str = "local") -> None:
        self.settings = settings
        self.metrics = Metrics(settings.codec, replica)
        self.metrics.watch(self)
        self.discretizer: Discretizer | None = None
        self.slots = FairShares(settings.max_requests)
        self.bytes = FairShares(settings.max_held_bytes)
        # The lock is reentrant because garbage collection of a response closes its reservation, which may happen in
        # any thread at any moment.
        self.lock = threading.RLock()
        wait_ms = settings.max_wait_ms
        self.batcher = Batcher(
            max_wait_s=None if wait_ms is None else wait_ms / 1000,
            max_queue_s=settings.max_queue_s,
            watchdog_s=settings.watchdog_s,
            on_batch=self.metrics.batch,
        )
        self.admitted = 0  # requests from `admit` until their response has been sent; their bodies may still arrive
        self._stopped = False
        self._threads = ThreadPoolExecutor(SIDE_THREADS, thread_name_prefix="side")

    def load(self) -> None:
        """Loads and warms up the codec. Raises every error, because a replica without its codec must not serve."""
        self.discretizer = self.batcher.start(self.make)
        self.metrics.describe(self.discretizer)

    def make(self) -> Discretizer:
        """Returns a new, warm discretizer. The batcher calls this in the thread that will run the discretizer."""
        return Discretizer.warm_from_store(self.settings.codec, self.settings.engine_config)

    @property
    def why_unhealthy(self) -> str:
        """The reason why the codec cannot compute any more; an empty string while it can."""
        return self.batcher.why_unhealthy

    @property
    def healthy(self) -> bool:
        """True while the codec can compute, False after it has failed or hung."""
        return not self.why_unhealthy

    @property
    def ready(self) -> bool:
        """True if a request can be computed: the codec is loaded and healthy, and the service is not stopping."""
        return self.discretizer is not None and self.healthy and not self._stopped

    @property
    def queued_images(self) -> int:
        """The number of images that are waiting for the codec."""
        return self.batcher.queued

    @property
    def held(self) -> int:
        """The number of requests whose body has arrived and whose response has not been sent completely."""
        return self.slots.held

    @property
    def held_bytes(self) -> int:
        """The number of bytes that are reserved for requests and their responses."""
        return self.bytes.held

    def admit(self, holder: str, nbytes: int) -> Reservation:
        """Returns a reservation, which holds nothing yet, for a request whose headers promise `nbytes` bytes.

        A promise takes nothing from others: bytes are reserved as they arrive, and the slot is taken when all of
        them have arrived. The room is checked here, so that a body for which there is none is not sent in vain.

        Raises Full if the holder's share has no room for a slot and the bytes now, TooLarge if `nbytes` exceeds the
        whole capacity, and Unhealthy if the codec cannot compute now.
        """
        self.check_ready()
        if nbytes > self.bytes.capacity:
            raise too_many_bytes(nbytes, self.bytes.capacity)
        with self.lock:
            if not self.slots.fits(holder, 1):
                raise self.full_of_requests()
            if not self.bytes.fits(holder, nbytes):
                raise self.full_of_bytes(nbytes)
        return Reservation(self, holder)

    def check_ready(self) -> None:
        """Raises Unhealthy, with the reason, if the codec cannot compute now."""
        if not self.ready:
            why = "the service is shutting down" if self._stopped else "the codec is not loaded"
            raise Unhealthy(self.why_unhealthy or why)

    def full_of_requests(self) -> Full:
        """Returns the error for a request that gets no slot."""
        return Full(f"{self.held} requests are held", f"at most {self.slots.capacity}, in fair shares", 1)

    def full_of_bytes(self, nbytes: int) -> Full:
        """Returns the error for a request that does not get `nbytes` more bytes."""
        held = f"{self.held_bytes} bytes are held and this request needs {nbytes} more"
        return Full(held, f"at most {self.bytes.capacity}, in fair shares", 1)

    async def run_in_thread(self, task: Callable[[], T]) -> T:
        """Runs `task` in a side thread, not in the codec's thread; returns its result or raises its error."""

        def run() -> T:
            try:
                return task()
            except BaseException as error:
                clear_frames(error)
                raise

        return await asyncio.get_running_loop().run_in_executor(self._threads, run)

    def stop(self) -> None:
        """Ends the threads after their current tasks. Requests that still wait then get an error."""
        self._stopped = True
        self.batcher.stop()
        self._threads.shutdown(wait=False, cancel_futures=True)


def clear_frames(error: BaseException) -> None:
    """Frees the local variables in the frames of an exception.

    They may be large, and the exception would keep them in memory until the event loop handles it.
    """
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__context__


def too_many_bytes(nbytes: int, capacity: int) -> TooLarge:
    """Returns the error for a request that could never be held."""
    return TooLarge("request", f"{nbytes} bytes", f"at most {capacity} bytes with its response")


class Reservation:
    """The slot and the bytes that one request holds until `close` is called; at first it holds neither.

    `close` may be called several times; only the first call has an effect.
    """

    def __init__(self, worker: CodecWorker, holder: str) -> None:
        self.worker, self.holder = worker, holder
        self.nbytes, self.slots = 0, 0
        self.open = True
        with worker.lock:
            worker.admitted += 1

    def take_slot(self) -> None:
        """Takes a slot, once.

        Raises Full if the holder's share has no free slot now, and Unhealthy if the codec was stopped or failed
        while the body arrived.
        """
        with self.worker.lock:
            self.worker.check_ready()
            if self.open and not self.slots:
                if not self.worker.slots.take(self.holder, 1):
                    raise self.worker.full_of_requests()
                self.slots = 1

    def grow(self, nbytes: int) -> None:
        """Reserves `nbytes` bytes in addition to those that are reserved already.

        Raises Full if the holder's share has no such room now, TooLarge if the request would then hold more than
        the whole capacity, and RuntimeError after `close`: a side thread may still be working on a request whose
        client has disconnected.
        """
        with self.worker.lock:
            if not self.open:
                raise RuntimeError("the request's reservation is closed, because the request has already ended")
            shares, total = self.worker.bytes, self.nbytes + nbytes
            if total > shares.capacity:
                raise too_many_bytes(total, shares.capacity)
            # `take` would count the bytes that this request already holds against it; `change` does not.
            if not shares.change(self.holder, self.nbytes, total):
                raise self.worker.full_of_bytes(nbytes)
            self.nbytes = total

    def close(self) -> None:
        """Frees the slot and the bytes, unless that has been done already."""
        with self.worker.lock:
            if self.open:
                self.open = False
                self.worker.admitted -= 1
                self.worker.bytes.give(self.holder, self.nbytes)
                self.worker.slots.give(self.holder, self.slots)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
