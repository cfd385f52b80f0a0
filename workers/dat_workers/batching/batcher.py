"""Dynamic batching: one thread runs the codec on batches that consist of rows of many requests.

Ray Serve's own `@serve.batch` cannot do this. It counts requests instead of images, does not split a large request,
does not keep rows of different size or parameters apart, serves strictly in the order of arrival, and computes
requests whose callers have stopped waiting.
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

from dat_client.wire.tensors import Array
from dat_workers.batching.fair_queue import FairQueue
from dat_workers.batching.parts import Batch, Part, QueuedRequest, Result, device_batch, resolve
from dat_workers.batching.recovery import run_in_parts
from dat_workers.discretizer import Discretizer
from dat_workers.engines.device_copies import DeviceBatch
from dat_workers.engines.device_errors import is_device_lost
from dat_workers.errors import DeadlinePassed, EngineError, Full, Unhealthy
from dat_workers.request import CodecRequest
from dat_workers.system.text import duration

log = logging.getLogger("dat_workers")

OnBatch = Callable[[int, int, float], None]


class Batcher:
    """Holds the queue of requests, and the thread that computes them with the codec.

    >>> batcher = Batcher()                                                            # doctest: +SKIP
    >>> discretizer = batcher.start(lambda: Discretizer.from_store("tiny-f8"))         # doctest: +SKIP
    >>> batcher.submit(discretizer.prepare(images), flow="a").result().outputs         # doctest: +SKIP

    A batch holds rows of one task, which may come from several requests. It starts when it is full, or when its
    first row has waited `max_wait_s`. The default, None, means 2 ms on CUDA and 0 on a CPU: a CPU's batches are
    small (4 images of 224², 128 of 32²), and the rows already in the queue fill them. A request expected
    to wait longer than `max_queue_s` is refused (Full). If no batch finishes for `watchdog_s` while one is being
    computed, the engine is considered hung. After each batch `on_batch` is called with its number of rows, its
    capacity and its seconds. If `padded` is set, every batch is padded to its full capacity, because on a GPU the
    choice of kernels, and with it the rounding, depends on the number of rows.
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
        self._queue: FairQueue[QueuedRequest] = FairQueue()
        self._in_flight: deque[Batch] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._progress_at = 0.0  # when a batch was last started or finished
        self._finished_at = 0.0
        self._seconds = self._cost = 0.0  # of recent batches, decaying; their ratio is the speed of the codec
        self._discretizer: Discretizer

    def start(self, load: Callable[[], Discretizer]) -> Discretizer:
        """Loads the discretizer in the codec's thread, starts serving and returns it; raises what `load` raises."""
        loaded: Future[Discretizer] = Future()
        threading.Thread(target=self._run, args=(load, loaded), name="codec", daemon=True).start()
        self._discretizer = loaded.result()
        if self._max_wait_s is None:
            self._max_wait_s = 0.002 if self._discretizer.engine.device.type == "cuda" else 0.0
        threading.Thread(target=self._watch, name="codec-watchdog", daemon=True).start()
        return self._discretizer

    @property
    def queued(self) -> int:
        """The number of rows that wait in the queue."""
        with self._changed:
            return self._queue.rows

    def submit(self, request: CodecRequest, flow: str = "", deadline: float | None = None) -> Future[Result]:
        """Queues a request and returns a future of its result; cancel the future to withdraw the request.

        Rows of different flows take turns. `deadline` is on the clock of time.monotonic(). Raises Full if the
        request is expected to start later than `max_queue_s` from now or after the deadline, DeadlinePassed if the
        deadline has already passed, and Unhealthy if the batcher has stopped or failed. The future raises
        EngineError, DeadlinePassed or Unhealthy.
        """
        if request.result is not None:
            done: Future[Result] = Future()
            done.set_result(Result(request.result))
            return done
        task = request.task
        with self._changed:
            if self.why_unhealthy or self._stopping:
                raise Unhealthy(self.why_unhealthy or "the service is shutting down")
            now = time.monotonic()
            if deadline is not None and now > deadline:
                raise DeadlinePassed(
                    f"the deadline passed {duration(now - deadline)} before the request was queued"
                )
            first_batch = min(request.rows, self._discretizer.rows_at_once(task)) * task.cost
            wait_s = self._expected_wait_s(flow, first_batch)
            if wait_s > self._max_queue_s:
                limit = f"at most {duration(self._max_queue_s)}"
                raise Full(
                    f"the wait is about {duration(wait_s)}", limit, whole_seconds(wait_s - self._max_queue_s)
                )
            if deadline is not None and now + wait_s > deadline:
                limit = f"but the caller's deadline is in {duration(max(0.0, deadline - now))}"
                raise Full(f"the wait is about {duration(wait_s)}", limit, whole_seconds(wait_s))
            queued = QueuedRequest(flow, task, request.rows, task.cost, now, request, deadline)
            self._queue.push(queued)
            self._changed.notify_all()
        # The reference is weak because a future keeps its callbacks: a strong reference would form a cycle, and the
        # arrays would stay in memory until the garbage collector finds it.
        reference = weakref.ref(queued)
        queued.future.add_done_callback(lambda _: self._remove(reference()))
        return queued.future

    def stop(self) -> None:
        """Ends the codec's thread after its current batch, and fails the waiting requests with Unhealthy."""
        with self._changed:
            self._stopping = True
            for queued in self._queue:
                resolve(queued.future, Unhealthy("the service is shutting down"))
            self._changed.notify_all()

    def _expected_wait_s(self, flow: str, cost: float) -> float:
        in_flight = sum(batch.cost for batch in self._in_flight)
        return (in_flight + self._queue.cost_before(flow, cost)) * self._seconds_per_cost

    @property
    def _seconds_per_cost(self) -> float:
        """The total seconds of recent batches divided by their total cost.

        A mean of the batches' own ratios would be too high: a batch of tiny images takes time but costs little.
        """
        return self._seconds / self._cost if self._cost else 0.0

    def _remove(self, queued: QueuedRequest | None) -> None:
        if queued is not None:
            with self._changed:
                self._queue.remove(queued)

    def _run(self, load: Callable[[], Discretizer], loaded: Future[Discretizer]) -> None:
        try:
            discretizer = load()
        except BaseException as error:
            loaded.set_exception(error)
            return
        loaded.set_result(discretizer)
        try:
            while not self._stopping and not self.why_unhealthy:
                self._serve(discretizer)
        except BaseException as error:
            log.exception("the codec's thread ended", exc_info=error)
            self._fail_all(f"the codec's thread ended: {type(error).__name__}: {error}")

    def _serve(self, discretizer: Discretizer) -> None:
        """Computes batches until the batcher stops or a batch fails; a failed batch is computed again in parts."""
        try:
            for results in discretizer.stream(self._device_batches(discretizer)):
                self._deliver(self._in_flight[0].parts, results)
                self._finish_batch()
                del results  # hold nothing of this batch while waiting for the next one
            return
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold the tensors of the batch that failed
            failure = error.with_traceback(None)
        if is_device_lost(failure):
            self._fail_all(f"the device is lost: {failure}")
            return
        # The results of all batches in flight are gone, and the first is not always the one that failed.
        while self._in_flight:
            self._progress_at = time.monotonic()
            for parts, outcome in run_in_parts(discretizer, self._in_flight[0].parts, failure):
                self._progress_at = time.monotonic()
                if is_device_lost(outcome):
                    self._fail_all(f"the device is lost: {outcome}")
                    return
                if isinstance(outcome, Exception):
                    for part in parts:
                        resolve(part.queued.future, outcome)
                else:
                    self._deliver(parts, outcome)
            with self._changed:
                self._in_flight.popleft()

    def _device_batches(self, discretizer: Discretizer) -> Iterator[DeviceBatch | None]:
        """Yields batches as they become ready, and None when the batch in flight should be finished first."""
        while True:
            batch = self._next_batch(discretizer)
            if batch is not None:
                rows = batch.capacity if self.padded else 0
                on_device = device_batch(batch.parts, discretizer.compute(batch.task), rows)
                batch = None  # hold nothing of this batch while waiting for the next one
                yield on_device
                del on_device
            elif self._in_flight:
                yield None
            else:
                return

    def _next_batch(self, discretizer: Discretizer) -> Batch | None:
        """Waits for the next batch. Returns None if the batcher stops or the one in flight should finish first."""
        assert self._max_wait_s is not None
        with self._changed:
            while not (self._stopping or self.why_unhealthy):
                now = time.monotonic()
                self._expire(now)
                head = self._queue.head()
                if head is not None:
                    capacity = discretizer.rows_at_once(head.request.task)
                    rows, oldest = self._queue.rows_of(head.group)
                    left_s = oldest + self._max_wait_s - now
                    if rows >= capacity or left_s <= 0:
                        return self._take_batch(head.request, capacity, now)
                    if not self._in_flight:
                        self._changed.wait(left_s)
                        continue
                if self._in_flight:
                    return None
                self._changed.wait()
        return None

    def _take_batch(self, head: CodecRequest, capacity: int, now: float) -> Batch:
        parts: list[Part] = []
        room = capacity
        while room and (taken := self._queue.take(head.task, room)):
            queued, count = taken
            queued.started = queued.started or now
            parts.append(Part(queued, queued.request.rows - queued.waiting - count, count))
            room -= count
        batch = Batch(parts, capacity, now)
        self._progress_at = now
        self._in_flight.append(batch)
        return batch

    def _expire(self, now: float) -> None:
        """Fails the waiting requests whose deadline has passed; the callback of their future removes them."""
        for queued in self._queue:
            if queued.deadline is not None and now > queued.deadline:
                late_s, waited_s = now - queued.deadline, now - queued.arrived
                message = (
                    f"the deadline passed {duration(late_s)} ago; the request was queued for {duration(waited_s)}"
                )
                resolve(queued.future, DeadlinePassed(message))

    def _deliver(self, parts: list[Part], results: dict[str, Array]) -> None:
        """Gives each request the results of its rows; if an image is not finite, only its own request fails."""
        first = 0
        for part in parts:
            rows = {name: array[first : first + part.count] for name, array in results.items()}
            first += part.count
            try:
                outputs = self._discretizer.outputs_of(rows, part.start)
            except EngineError as error:
                resolve(part.queued.future, error)
            else:
                part.queued.deliver(outputs, part.start, owned=len(parts) == 1)

    def _finish_batch(self) -> None:
        """Removes the oldest batch from those in flight and updates the measured speed of the codec."""
        with self._changed:
            batch = self._in_flight.popleft()
            now = time.monotonic()
            seconds = now - max(batch.started, self._finished_at)
            self._progress_at = self._finished_at = now
            self._seconds = 0.8 * self._seconds + seconds
            self._cost = 0.8 * self._cost + batch.cost
        self._on_batch(batch.rows, batch.capacity, seconds)

    def _fail_all(self, reason: str) -> None:
        """Makes the batcher unhealthy for good, and fails all requests with `reason`."""
        with self._changed:
            if self.why_unhealthy:
                return
            log.critical("%s; this replica will not answer any more requests", reason)
            self.why_unhealthy = reason
            in_flight = [part.queued for batch in self._in_flight for part in batch.parts]
            for queued in [*in_flight, *self._queue]:
                resolve(queued.future, Unhealthy(reason))
            self._changed.notify_all()

    def _watch(self) -> None:
        while not (self.why_unhealthy or (self._stopping and not self._in_flight)):
            time.sleep(min(1.0, self._watchdog_s / 4))
            with self._changed:
                if not self._in_flight:
                    continue
                batch = self._in_flight[0]
                silent_s = time.monotonic() - self._progress_at
                # A large batch on a slow engine may take longer than watchdog_s.
                if silent_s > max(self._watchdog_s, 4 * batch.cost * self._seconds_per_cost):
                    rows = f"a batch of {batch.rows} images"
                    self._fail_all(f"the engine hangs: {rows} is not done after {silent_s:.1f} s")


def whole_seconds(seconds: float) -> int:
    """Rounds to the 1 to 60 whole seconds of a Retry-After header."""
    return min(60, max(1, round(seconds)))
