"""Dynamic batching: one thread runs the codec on batches made of the rows of many requests.

Ray Serve's own `@serve.batch` cannot do this: it counts requests, not images, does not split a large one, knows no
groups of size and parameters, is first come, first served, and computes what nobody waits for any more.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from dat_workers.batching.device_copies import Array, Job
from dat_workers.batching.fair_queue import Entry, FairQueue
from dat_workers.batching.parts import Batch, Piece, Request, Result, joint, settle
from dat_workers.batching.recovery import is_lost, run_in_parts
from dat_workers.discretizer import Discretizer
from dat_workers.errors import DeadlinePassed, EngineError, Full, Unhealthy
from dat_workers.request import Work

log = logging.getLogger("dat_workers")

OnBatch = Callable[[int, int, float], None]


class Batcher:
    """The codec's thread and the queue before it.

    >>> batcher = Batcher()                                                            # doctest: +SKIP
    >>> discretizer = batcher.start(lambda: Discretizer.from_store("tiny-f8"))         # doctest: +SKIP
    >>> batcher.submit(discretizer.work(images), flow="a").result().outputs            # doctest: +SKIP

    A batch holds rows of one task, from any requests, and leaves when it is full or its first row has waited
    `max_wait_s` (None: 2 ms on CUDA; 0 on a CPU, whose batches of up to 4, two beside each other, are made of what
    waits already). What is longer than `max_queue_s` from its turn is refused. A batch that takes `watchdog_s` has
    hung. `on_batch` is told rows, capacity and seconds of each batch. Where `padded` is set every batch is computed
    with its capacity of rows: for a GPU, whose kernels and their rounding depend on the number.
    """

    def __init__(
        self,
        *,
        max_wait_s: float | None = None,
        max_queue_s: float = 10.0,
        watchdog_s: float = 120.0,
        on_batch: OnBatch = lambda rows, capacity, seconds: None,
    ) -> None:
        self.why_unhealthy = ""
        self.padded = False
        self._max_wait_s, self._max_queue_s, self._watchdog_s = max_wait_s, max_queue_s, watchdog_s
        self._on_batch = on_batch
        self._queue: FairQueue[Request] = FairQueue()
        self._flying: deque[Batch] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._touched = 0.0  # when a batch was last handed over or came back
        self._landed_at = 0.0
        self._seconds = self._cost = 0.0  # of late batches, decaying: their ratio is the codec's speed
        self._discretizer: Discretizer

    def start(self, make: Callable[[], Discretizer]) -> Discretizer:
        """Makes the discretizer in the codec's thread and begins to serve; raises what `make` raises."""
        made: Future[Discretizer] = Future()
        threading.Thread(target=self._main, args=(make, made), name="codec", daemon=True).start()
        self._discretizer = made.result()
        if self._max_wait_s is None:
            self._max_wait_s = 0.002 if self._discretizer.device.type == "cuda" else 0.0
        threading.Thread(target=self._watch, name="codec-watchdog", daemon=True).start()
        return self._discretizer

    @property
    def queued(self) -> int:
        """Rows that wait for the codec."""
        with self._changed:
            return self._queue.rows

    def submit(self, work: Work, flow: str = "", deadline: float | None = None) -> Future[Result]:
        """The result of a work to come; `deadline` by time.monotonic(). Cancel the future to take it out again.

        Raises Full where its turn would come after `max_queue_s` or its deadline, DeadlinePassed where that is past
        and Unhealthy where its turn never comes. The future raises EngineError, DeadlinePassed or Unhealthy.
        """
        with self._changed:
            self._check_usable()
            now = time.monotonic()
            if deadline is not None and now > deadline:
                raise DeadlinePassed(f"the deadline passed {now - deadline:.3g} s before the codec was asked")
            first = min(work.rows, self._discretizer.rows_at_once(work.task)) * work.task.cost
            wait_s = self._wait_s(flow, first)
            if wait_s > self._max_queue_s:
                limit = f"at most {self._max_queue_s:.3g} s"
                raise Full(f"the wait is about {wait_s:.1f} s", limit, whole_seconds(wait_s - self._max_queue_s))
            if deadline is not None and now + wait_s > deadline:
                left = f"the caller waits {max(0.0, deadline - now):.3g} s more"
                raise Full(f"the wait is about {wait_s:.1f} s", left, whole_seconds(wait_s))
            request = Request(work, deadline, now, left=work.rows)
            entry = Entry(flow, work.task, work.rows, work.task.cost, request, now)
            self._queue.push(entry)
            self._changed.notify_all()
        # weak: a future keeps its callbacks, and they would keep the request, in a circle, until it is collected
        waiting = weakref.ref(entry)
        request.future.add_done_callback(lambda _: self._remove(waiting()))
        return request.future

    def stop(self) -> None:
        """Ends the thread after its present batch; what waits is refused."""
        with self._changed:
            self._stopping = True
            for entry in self._queue:
                settle(entry.item.future, Unhealthy("the service is shutting down"))
            self._changed.notify_all()

    def _check_usable(self) -> None:
        if self.why_unhealthy or self._stopping:
            raise Unhealthy(self.why_unhealthy or "the service is shutting down")

    def _wait_s(self, flow: str, cost: float) -> float:
        flying = sum(batch.cost for batch in self._flying)
        return (flying + self._queue.cost_before(flow, cost)) * self._seconds_per_cost

    @property
    def _seconds_per_cost(self) -> float:
        """Of many batches and not the mean of their ratios: tiny images take their time without costing much."""
        return self._seconds / self._cost if self._cost else 0.0

    def _remove(self, entry: Entry[Request] | None) -> None:
        if entry is not None:
            with self._changed:
                self._queue.remove(entry)

    def _main(self, make: Callable[[], Discretizer], made: Future[Discretizer]) -> None:
        try:
            discretizer = make()
        except BaseException as error:
            made.set_exception(error)
            return
        made.set_result(discretizer)
        try:
            while not self._stopping and not self.why_unhealthy:
                self._serve(discretizer)
        except BaseException as error:
            log.exception("the codec's thread ended", exc_info=error)
            self._lose(f"the codec's thread ended: {type(error).__name__}: {error}")

    def _serve(self, discretizer: Discretizer) -> None:
        """Batches until the end, or until one of them fails; that one is taken up again in parts."""
        try:
            for made in discretizer.stream(self._jobs(discretizer)):
                self._deliver(self._flying[0], made)
                self._landed()
                del made  # while the thread waits it holds nothing of the last batch
            return
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold the tensors of the batch that failed
            failed = error.with_traceback(None)
        if is_lost(failed):
            self._lose(f"the device is lost: {failed}")
            return
        while self._flying:  # the results of all of them are gone; the first is not always the one that failed
            self._touched = time.monotonic()
            batch = self._flying[0]
            for pieces, outcome in run_in_parts(discretizer, batch.pieces, failed):
                self._touched = time.monotonic()
                if is_lost(outcome):
                    self._lose(f"the device is lost: {outcome}")
                    return
                if isinstance(outcome, Exception):
                    for piece in pieces:
                        settle(piece.request.future, outcome)
                else:
                    self._deliver(Batch(pieces, batch.capacity, batch.started), outcome)
            with self._changed:
                self._flying.popleft()

    def _jobs(self, discretizer: Discretizer) -> Iterator[Job | None]:
        while True:
            batch = self._next(discretizer)
            if batch is not None:
                rows = batch.capacity if self.padded else 0
                job = joint(batch.pieces, discretizer.compute(batch.pieces[0].request.work.task), rows)
                batch = None  # while the thread waits it holds nothing of the last batch
                yield job
                del job
            elif self._flying:
                yield None
            else:
                return

    def _next(self, discretizer: Discretizer) -> Batch | None:
        """The next batch, waited for; None at the end, and where one that flies should be landed first."""
        assert self._max_wait_s is not None
        with self._changed:
            while not (self._stopping or self.why_unhealthy):
                now = time.monotonic()
                self._drop_late(now)
                head = self._queue.head()
                if head is not None:
                    capacity = discretizer.rows_at_once(head.item.work.task)
                    rows, oldest = self._queue.rows_of(head.group)
                    left_s = oldest + self._max_wait_s - now
                    if rows >= capacity or left_s <= 0:
                        return self._gather(head, capacity, now)
                    if not self._flying:
                        self._changed.wait(left_s)
                        continue
                if self._flying:
                    return None
                self._changed.wait()
        return None

    def _gather(self, head: Entry[Request], capacity: int, now: float) -> Batch:
        pieces: list[Piece] = []
        room = capacity
        while room and (taken := self._queue.take(head.group, room)):
            request, count = taken[0].item, taken[1]
            request.started = request.started or now
            pieces.append(Piece(request, request.taken, count))
            request.taken += count
            room -= count
        batch = Batch(pieces, capacity, now)
        self._touched = now
        self._flying.append(batch)
        return batch

    def _drop_late(self, now: float) -> None:
        for entry in self._queue:
            deadline = entry.item.deadline
            if deadline is not None and now > deadline:
                late = (
                    f"the deadline passed {now - deadline:.3g} s ago, after {now - entry.arrived:.3g} s of waiting"
                )
                settle(entry.item.future, DeadlinePassed(late))

    def _deliver(self, batch: Batch, made: dict[str, Array]) -> None:
        """Each asker its rows; a request with an image that is not finite fails alone."""
        at = 0
        for piece in batch.pieces:
            rows = {name: array[at : at + piece.count] for name, array in made.items()}
            at += piece.count
            try:
                outputs = self._discretizer.collect(rows, piece.start)
            except EngineError as error:
                settle(piece.request.future, error)
            else:
                piece.request.put(outputs, piece.start, alone=len(batch.pieces) == 1)

    def _landed(self) -> None:
        with self._changed:
            batch = self._flying.popleft()
            now = time.monotonic()
            seconds = now - max(batch.started, self._landed_at)
            self._touched = self._landed_at = now
            self._seconds = 0.8 * self._seconds + seconds
            self._cost = 0.8 * self._cost + batch.cost
        self._on_batch(batch.rows, batch.capacity, seconds)

    def _lose(self, why: str) -> None:
        with self._changed:
            if self.why_unhealthy:
                return
            log.critical("%s; this replica answers nothing more", why)
            self.why_unhealthy = why
            flying = [piece.request for batch in self._flying for piece in batch.pieces]
            for request in [*flying, *(entry.item for entry in self._queue)]:
                settle(request.future, Unhealthy(why))
            self._changed.notify_all()

    def _watch(self) -> None:
        while not (self.why_unhealthy or (self._stopping and not self._flying)):
            time.sleep(min(1.0, self._watchdog_s / 4))
            with self._changed:
                if not self._flying:
                    continue
                batch = self._flying[0]
                late_s = time.monotonic() - self._touched
                # a large batch of a slow engine has its time
                if late_s > max(self._watchdog_s, 4 * batch.cost * self._seconds_per_cost):
                    self._lose(f"the engine hangs: {batch.rows} images are not done after {late_s:.1f} s")


def whole_seconds(seconds: float) -> int:
    """What a Retry-After header says: 1 to 60 whole seconds."""
    return min(60, max(1, round(seconds)))
