"""Splits a large batch into several requests that are sent at the same time, and joins their answers in order."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, wait

import numpy as np

from dat_client import wire
from dat_client.calls.core import Array, Call, Exchange, fingerprint_of, tokens_changed_of
from dat_client.errors import DatError, ProtocolError, Unavailable, invalid, shown
from dat_client.wire.vocabulary import OUTPUTS


def cut(call: Call, count: int) -> list[tuple[slice, Call]]:
    """Splits a call into at most `count` calls of nearly equal size, without copying.

    Returns each call together with the slice of the batch's rows that it holds.
    """
    count = min(count, call.batch)
    bounds = [call.batch * n // count for n in range(count + 1)]
    parts = []
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        rows = slice(start, stop)
        shape = call.image_shape and (stop - start, *call.image_shape[1:])
        inputs = {name: array[rows] for name, array in call.inputs.items()}
        parts.append((rows, dataclasses.replace(call, inputs=inputs, image_shape=shape, id=f"{call.id}.{number}")))
    return parts


def infer(
    call: Call,
    count: int,
    send_part: Callable[[Call, threading.Event], Exchange],
    spawn: Callable[[Callable[[], Exchange]], Future[Exchange]],
) -> Exchange | DatError:
    """Sends `call` as at most `count` requests at the same time and joins their answers.

    `send_part(part, stop)` sends one part and repeats it after failures until the event `stop` is set. If a part
    fails nevertheless, its DatError is returned, not raised, so that the caller does not repeat the batch. Raises
    Unavailable if two codecs answered, because then all parts must be sent again.
    """
    stop = threading.Event()
    joined = _Joined(call)

    def send(rows: slice, part: Call) -> Exchange:
        try:
            exchange = send_part(part, stop)
            joined.put(rows, exchange.response)
        except DatError as error:
            error.args = (f"images {rows.start}..{rows.stop - 1} of {call.batch}: {error}",)
            raise
        return exchange

    parts = cut(call, count)
    futures: list[Future[Exchange]] = []
    try:
        for rows, part in parts:
            futures.append(spawn(functools.partial(send, rows, part)))
        wait(futures, return_when=FIRST_EXCEPTION)
        failure = next((e for future in futures if future.done() and (e := future.exception())), None)
    finally:  # After a failure, also an interrupt or an error of `spawn`, the unfinished parts are useless.
        stop.set()
        for future in futures:
            future.cancel()
    if isinstance(failure, DatError):
        return failure
    if failure is not None:
        raise failure
    exchanges = [future.result() for future in futures]
    fingerprints = sorted({str(fingerprint_of(exchange.response)) for exchange in exchanges})
    if len(fingerprints) > 1:
        message = f"the parts of one batch were answered by different codecs: {', '.join(map(shown, fingerprints))}"
        raise Unavailable(message, cause=message)
    last_to_end = max(exchanges, key=lambda exchange: exchange.begun_s + exchange.seconds)
    return dataclasses.replace(
        last_to_end,
        response=joined.response([e.response for e in exchanges], weights=[r.stop - r.start for r, _ in parts]),
        sent=sum(exchange.sent for exchange in exchanges),
        received=sum(exchange.received for exchange in exchanges),
    )


def wait_for(stop: threading.Event, closed: threading.Event, seconds: float) -> bool:
    """Returns True as soon as one of the events is set, and False if none is set within `seconds`."""
    end = time.monotonic() + seconds
    while not closed.is_set() and not stop.wait(min(0.1, max(0.0, end - time.monotonic()))):
        if time.monotonic() >= end:
            return False
    return True


class _Joined:
    """Collects the outputs of a whole batch; the thread that receives a part copies the part's rows into them."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._outputs: dict[str, Array] = {}
        self._lock = threading.Lock()

    def put(self, rows: slice, response: wire.Response) -> None:
        for name, array in response.outputs.items():
            if name not in OUTPUTS:
                continue
            with self._lock:
                if name not in self._outputs:
                    self._outputs[name] = np.empty((self._call.batch, *array.shape[1:]), array.dtype)
            whole = self._outputs[name]
            if (whole.shape[1:], whole.dtype) != (array.shape[1:], array.dtype):
                found = f"{array.dtype} {list(array.shape[1:])} and {whole.dtype} {list(whole.shape[1:])}"
                if self._call.image_shape is None:
                    raise invalid("images", "pictures of one size", found=found)
                raise ProtocolError(f"{name}: the parts of one batch differ in dtype or shape: {found}")
            whole[rows] = array

    def response(self, parts: list[wire.Response], weights: list[int]) -> wire.Response:
        """Returns one response for all parts. Its `tokens_changed` is the mean of the parts', weighted by rows."""
        parameters = dict(parts[0].parameters)
        shares = [share for part in parts if (share := tokens_changed_of(part)) is not None]
        if len(shares) == len(parts):
            parameters["tokens_changed"] = float(np.average(shares, weights=weights))
        return dataclasses.replace(parts[0], outputs=self._outputs, id=self._call.id, parameters=parameters)
