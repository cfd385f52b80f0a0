"""A small thread pool that never prevents the process from exiting."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")
R = TypeVar("R")

Tasks: TypeAlias = "queue.SimpleQueue[tuple[Future[Any], Callable[[Any], Any], Any] | None]"


class DaemonThreads:
    """Maps functions over items in daemon threads, which end when this object is deleted.

    >>> DaemonThreads(2, "example").map(abs, [-1, 2, -3])
    [1, 2, 3]

    It is used instead of a ThreadPoolExecutor, whose threads Python joins before it exits, so that a process with a
    hung thread would never exit.
    """

    def __init__(self, count: int, name: str) -> None:
        self._tasks: Tasks = queue.SimpleQueue()
        for i in range(count):
            threading.Thread(target=_run_tasks, args=[self._tasks], name=f"{name}-{i}", daemon=True).start()
            weakref.finalize(self, self._tasks.put, None).atexit = False

    def submit(self, compute: Callable[[T], R], item: T) -> Future[R]:
        """Returns the future of `compute(item)`."""
        future: Future[R] = Future()
        self._tasks.put((future, compute, item))
        return future

    def map(self, compute: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Returns the results of `compute` for all items, in the order of the items.

        Raises the exception of the first item that failed; items that were not started by then are cancelled.
        """
        futures = [self.submit(compute, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()


def _run_tasks(tasks: Tasks) -> None:
    while (task := tasks.get()) is not None:
        future, compute, item = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(compute(item))
            except BaseException as error:
                future.set_exception(error)
        del task, future, compute, item  # free the memory of the last task while the thread waits
