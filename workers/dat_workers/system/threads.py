"""Threads that compute a few things beside each other, and hold up nobody's end."""

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


class Threads:
    """A number of daemon threads; they end with this object.

    >>> Threads(2, "beside").map(abs, [-1, 2, -3])
    [1, 2, 3]

    Python joins the threads of a ThreadPoolExecutor before it ends: with one of them hung it never does.
    """

    def __init__(self, count: int, name: str) -> None:
        self._tasks: Tasks = queue.SimpleQueue()
        for i in range(count):
            threading.Thread(target=_work, args=[self._tasks], name=f"{name}-{i}", daemon=True).start()
            weakref.finalize(self, self._tasks.put, None).atexit = False

    def map(self, compute: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """`compute` of each item, in their order; raises what the first that fails raises, and begins no more."""
        futures: list[Future[R]] = []
        for item in items:
            futures.append(Future())
            self._tasks.put((futures[-1], compute, item))
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()


def _work(tasks: Tasks) -> None:
    while (task := tasks.get()) is not None:
        future, compute, item = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(compute(item))
            except BaseException as error:
                future.set_exception(error)
        del task, future, compute, item  # while the thread waits it holds nothing of the last task
