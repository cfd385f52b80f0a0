"""A large batch over several requests in flight, its rows in the order they came in."""

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
from dat_client.calls.core import Array, Call, Exchange, fingerprint_of
from dat_client.errors import DatError, InvalidRequest, ProtocolError, Unavailable, shown
from dat_client.wire.vocabulary import OUTPUTS


def cut(call: Call, parts: int) -> list[tuple[slice, Call]]:
    """The call as at most `parts` calls of nearly equal size, each with its rows. Nothing is copied."""
    parts = min(parts, call.batch)
    bounds = [call.batch * n // parts for n in range(parts + 1)]
    made = []
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        rows = slice(start, stop)
        shape = call.image_shape and (stop - start, *call.image_shape[1:])
        inputs = {name: array[rows] for name, array in call.inputs.items()}
        part = dataclasses.replace(call, inputs=inputs, image_shape=shape, id=f"{call.id}.{number}")
        made.append((rows, part))
    return made


def infer(
    call: Call,
    parts: int,
    one: Callable[[Call, threading.Event], Exchange],
    spawn: Callable[[Callable[[], Exchange]], Future[Exchange]],
) -> Exchange | DatError:
    """The answer to `call`, asked for in at most `parts` requests at the same time, or why one of them failed.

    `one` asks for a part until its event is set. Raises Unavailable where two codecs answered: ask for all again.
    """
    stop = threading.Event()
    joined = _Joined(call)

    def ask(rows: slice, part: Call) -> Exchange:
        try:
            exchange = one(part, stop)
            joined.put(rows, exchange.response)
        except DatError as error:
            error.args = (f"images {rows.start}..{rows.stop - 1} of {call.batch}: {error}",)
            raise
        return exchange

    pieces = cut(call, parts)
    futures: list[Future[Exchange]] = []
    try:
        for rows, part in pieces:
            futures.append(spawn(functools.partial(ask, rows, part)))
        wait(futures, return_when=FIRST_EXCEPTION)
        failed = next((e for future in futures if future.done() and (e := future.exception())), None)
    finally:  # also where this thread is interrupted or gets no other: nobody waits for the others any more
        stop.set()
        for future in futures:
            future.cancel()
    if isinstance(failed, DatError):
        return failed
    if failed is not None:
        raise failed
    exchanges = [future.result() for future in futures]
    fingerprints = sorted({str(fingerprint_of(exchange.response)) for exchange in exchanges})
    if len(fingerprints) > 1:
        message = f"the parts of one batch were answered by different codecs: {', '.join(map(shown, fingerprints))}"
        raise Unavailable(message, cause=message)
    slowest = max(exchanges, key=lambda exchange: exchange.begun_s + exchange.seconds)
    weights = [rows.stop - rows.start for rows, _ in pieces]
    return dataclasses.replace(
        slowest,
        response=joined.response([exchange.response for exchange in exchanges], weights),
        sent=sum(exchange.sent for exchange in exchanges),
        received=sum(exchange.received for exchange in exchanges),
    )


def wait_for(stop: threading.Event, closed: threading.Event, seconds: float) -> bool:
    """Waits until one of the two is set (True) or the time is over (False)."""
    end = time.monotonic() + seconds
    while not closed.is_set():
        left_s = end - time.monotonic()
        if stop.wait(max(0.0, min(0.1, left_s))):
            return True
        if left_s <= 0.1:
            return False
    return True


class _Joined:
    """The arrays of a whole batch, each part's rows copied in by the thread that received them."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._arrays: dict[str, Array] = {}
        self._lock = threading.Lock()

    def put(self, rows: slice, response: wire.Response) -> None:
        for name, array in response.outputs.items():
            if name not in OUTPUTS:
                continue
            with self._lock:
                if name not in self._arrays:
                    self._arrays[name] = np.empty((self._call.batch, *array.shape[1:]), array.dtype)
            whole = self._arrays[name]
            if (whole.shape[1:], whole.dtype) != (array.shape[1:], array.dtype):
                found = f"{array.dtype} {list(array.shape[1:])} and {whole.dtype} {list(whole.shape[1:])}"
                if self._call.image_shape is None:
                    limit = "pictures of one size"
                    raise InvalidRequest(
                        f"images: must be {limit}, gave {found}", field="images", value=found, limit=limit
                    )
                raise ProtocolError(f"{name}: the parts of one batch have {found}")
            whole[rows] = array

    def response(self, parts: list[wire.Response], weights: list[int]) -> wire.Response:
        parameters = dict(parts[0].parameters)
        changed = [part.parameters.get("tokens_changed") for part in parts]
        if all(isinstance(share, (int, float)) for share in changed):
            parameters["tokens_changed"] = float(np.average(np.array(changed, np.float64), weights=weights))
        return dataclasses.replace(parts[0], outputs=self._arrays, id=self._call.id, parameters=parameters)
