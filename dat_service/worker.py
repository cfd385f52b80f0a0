"""The codec in this process: its batcher, the places and bytes that requests hold, threads for what is aside."""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

import torch

from dat_service.admission import Shares
from dat_service.observability.metrics import Metrics
from dat_service.settings import Settings
from dat_workers.batching.batcher import Batcher
from dat_workers.batching.parts import Result
from dat_workers.discretizer import Discretizer
from dat_workers.errors import Full, TooLarge, Unhealthy
from dat_workers.request import Work

T = TypeVar("T")

ASIDE_THREADS = 4  # pictures are decoded and floats are checked beside the codec


class CodecWorker:
    """Holds the discretizer and whoever waits for it.

    >>> worker = CodecWorker(Settings(codec="identity"))
    >>> worker.load()
    >>> with worker.admit("a client", 100) as place: ...

    `replica` names this process among others that serve the same codec.
    """

    def __init__(self, settings: Settings, replica: str = "local") -> None:
        self.settings = settings
        self.metrics = Metrics(settings.codec, replica)
        self.metrics.watch(self)
        self.discretizer: Discretizer | None = None
        self.places = Shares(settings.max_requests)
        self.bytes = Shares(settings.max_held_bytes)
        self.lock = threading.RLock()  # a response that garbage collection ends closes its place, wherever that is
        wait_ms = settings.max_wait_ms
        self.batcher = Batcher(
            max_wait_s=None if wait_ms is None else wait_ms / 1000,
            max_queue_s=settings.max_queue_s,
            watchdog_s=settings.watchdog_s,
            on_batch=self.metrics.batch,
        )
        self._stopped = False
        self._aside = ThreadPoolExecutor(ASIDE_THREADS, thread_name_prefix="aside")

    def load(self) -> None:
        """Loads and warms the codec; raises what that raises, so that a replica without a codec never serves."""
        self.discretizer = self.batcher.start(self.make)

    def make(self) -> Discretizer:
        """The discretizer, in the thread that will run it."""
        config = self.settings.engine_config
        torch.set_num_threads(config.cpu_threads)
        discretizer = Discretizer.from_store(self.settings.codec, config)
        discretizer.warm_up()
        return discretizer

    @property
    def why_unhealthy(self) -> str:
        """Why nothing is computed here any more; empty while all is well."""
        return self.batcher.why_unhealthy

    @property
    def healthy(self) -> bool:
        """Whether the codec can still compute."""
        return not self.why_unhealthy

    @property
    def ready(self) -> bool:
        """Whether a request would be answered now."""
        return self.discretizer is not None and self.healthy and not self._stopped

    @property
    def queued_images(self) -> int:
        """Images that wait for the codec."""
        return self.batcher.queued

    @property
    def held(self) -> int:
        """Requests that are held: being read, waiting, computed or sent."""
        return self.places.held

    @property
    def held_bytes(self) -> int:
        """Bytes of requests and answers that are held."""
        return self.bytes.held

    def admit(self, holder: str, nbytes: int) -> Place:
        """A place and so many bytes for a holder's request. Raises Full, or Unhealthy where nothing is served."""
        if not self.ready:
            why = "the service is shutting down" if self._stopped else "the codec is not loaded"
            raise Unhealthy(self.why_unhealthy or why)
        with self.lock:
            if not self.places.take(holder, 1):
                raise Full(f"{self.held} requests are held", f"at most {self.places.capacity}, in fair shares", 1)
        place = Place(self, holder)
        try:
            place.grow(nbytes)
        except BaseException:
            place.close()
            raise
        return place

    def submit(self, work: Work, flow: str, deadline: float | None) -> Future[Result]:
        """The result of a work to come, as `Batcher.submit`."""
        return self.batcher.submit(work, flow, deadline)

    async def aside(self, task: Callable[[], T]) -> T:
        """`task()` on a thread beside the codec's."""

        def run() -> T:
            try:
                return task()
            except BaseException as error:
                forget_frames(error)
                raise

        return await asyncio.get_running_loop().run_in_executor(self._aside, run)

    def stop(self) -> None:
        """Ends the threads once their present task is done; what waits is refused."""
        self._stopped = True
        self.batcher.stop()
        self._aside.shutdown(wait=False, cancel_futures=True)


def forget_frames(error: BaseException) -> None:
    """Lets go of what the functions that an error ended hold: it waits for its turn, and they may hold much."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__context__


class Place:
    """What one request holds, until it is closed; closing twice is once."""

    def __init__(self, worker: CodecWorker, holder: str) -> None:
        self.worker, self.holder = worker, holder
        self.nbytes = 0
        self.open = True

    def grow(self, nbytes: int) -> None:
        """Holds so many bytes more. Raises Full, and TooLarge where the whole capacity would not do.

        RuntimeError once the place is closed: a thread may go on with a request whose client has left.
        """
        with self.worker.lock:
            if not self.open:
                raise RuntimeError("the request has left its place")
            shares, total = self.worker.bytes, self.nbytes + nbytes
            if total > shares.capacity:
                raise TooLarge("request", f"{total} bytes", f"at most {shares.capacity} bytes held")
            if not shares.change(self.holder, self.nbytes, total):  # its own bytes do not stand in its way
                held = f"{shares.held} bytes are held and {nbytes} more wanted"
                raise Full(held, f"at most {shares.capacity}, in fair shares", 1)
            self.nbytes = total

    def close(self) -> None:
        with self.worker.lock:
            if self.open:
                self.open = False
                self.worker.bytes.give(self.holder, self.nbytes)
                self.worker.places.give(self.holder, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
