"""The codec's thread: requests wait here in order, and only so many of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from dat_service.metrics import Metrics
from dat_service.settings import Settings
from dat_workers.discretizer import Discretizer

T = TypeVar("T")


class Full(Exception):
    """As many requests are held as may be; come again in `retry_after_s`."""

    def __init__(self, limit: int, retry_after_s: int) -> None:
        self.limit, self.retry_after_s = limit, retry_after_s
        super().__init__(f"busy with {limit} requests, which is the limit; try again in {retry_after_s} s")


class CodecWorker:
    """Holds the discretizer and the one thread that runs it.

    One thread, because the engine uses all cores or the whole GPU for a single call.
    """

    def __init__(self, settings: Settings, replica: str = "local") -> None:
        self.settings = settings
        self.metrics = Metrics(settings.codec, replica)
        self.metrics.watch(self)
        self.discretizer: Discretizer | None = None
        self.held = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="codec")

    def load(self) -> None:
        """Loads and warms the codec; raises what that raises, so that a replica without a codec never serves."""
        self.discretizer = self._thread.submit(self._load).result()

    def _load(self) -> Discretizer:
        s = self.settings
        torch.set_num_threads(s.engine_threads())
        discretizer = Discretizer.from_store(
            s.codec, engine=s.engine, device=s.device, dtype=s.dtype, tricks=s.tricks
        )
        discretizer.warm_up()
        return discretizer

    @property
    def ready(self) -> bool:
        """Whether a request would be answered now."""
        return self.discretizer is not None

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Holds one of the `max_requests` places; raises Full where there is none."""
        if self.held >= self.settings.max_requests:
            raise Full(self.settings.max_requests, retry_after_s=1)
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1

    async def run(self, task: Callable[[], T]) -> T:
        """`task()` on the codec's thread, after all that came before it."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, task)

    def stop(self) -> None:
        """Ends the thread once its present task is done; queued ones are dropped."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self.discretizer = None
