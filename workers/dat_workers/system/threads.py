"""A small thread pool that never keeps the process from ending."""

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
    """A number of daemon threads that map functions over items; they end with this object.

    >>> DaemonThreads(2, "example").map(abs, [-1, 2, -3])
    [1, 2, 3]

    A ThreadPoolExecutor will not do: Python joins its threads before it exits, so with one of them hung it never
    exits.
    """

    def __init__(self, count: int, name: str) -> None:
        self._tasks: Tasks = queue.SimpleQueue()
        for i in range(count):
            threading.Thread(target=_run_tasks, args=[self._tasks], name=f"{name}-{i}", daemon=True).start()
            weakref.finalize(self, self._tasks.put, None).atexit = False

    def map(self, compute: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Returns `compute` of each item, in their order.

        Raises the exception of the first item that fails; items that have not begun by then are cancelled.
        """
        futures: list[Future[R]] = []
        for item in items:
            futures.append(Future())
            self._tasks.put((futures[-1], compute, item))
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
        del task, future, compute, item  # while the thread waits it holds nothing of the last task
