"""Measures where the time of a call goes: client, network, queue, codec, the rest of the server."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

from dat_client.calls.core import Call, Exchange

STAGES = ("client", "repeats", "network", "queue", "codec", "server")


@dataclass(frozen=True)
class CallTiming:
    """The stages of one call, in seconds.

    Attributes:
        client: checking and encoding the arguments, and turning the answer into arrays.
        repeats: failed attempts and the pauses after them; also the wait for a thread of `max_in_flight`.
        network: from sending the request to holding the answer, without `queue`, `codec` and `server`.
        queue: waiting for the codec.
        codec: being computed.
        server: everything else that the server did.
        total: the whole call.
        images: rows of the batch.
        sent, received: bytes of the bodies.

    For a call that was split into several requests, the stages are those of the request that ended last.
    """

    client: float
    repeats: float
    network: float
    queue: float
    codec: float
    server: float
    total: float
    images: int
    sent: int
    received: int


def call_timing(call: Call, exchange: Exchange, first_attempt_s: float, seconds: float) -> CallTiming:
    """Splits the time of a call: `call.prepared_s`, and `seconds` from then to the arrays of its answer.

    `first_attempt_s` is time.perf_counter() at the beginning of the first attempt. The server's `total` includes
    the reading of the request's body, which is as slow as the network delivers it, so `body` is subtracted and
    counted as the network's.
    """
    timing = exchange.timing
    queue, codec = timing.get("queue", 0.0), timing.get("codec", 0.0)
    on_server = max(0.0, min(timing.get("total", 0.0) - timing.get("body", 0.0), exchange.seconds))
    repeats = max(0.0, exchange.begun_s - first_attempt_s)
    total_s = call.prepared_s + seconds
    return CallTiming(
        client=max(0.0, total_s - repeats - exchange.seconds),
        repeats=repeats,
        network=exchange.seconds - on_server,
        queue=queue,
        codec=codec,
        server=max(0.0, on_server - queue - codec),
        total=total_s,
        images=call.batch,
        sent=exchange.sent,
        received=exchange.received,
    )


@dataclass(eq=False, repr=False)
class Profile:
    """The calls of a client inside a `with client.profile()` block.

    Attributes:
        calls: one CallTiming for each answered call, in the order of the answers.
        seconds: how long the block took, or has taken so far.
    """

    calls: list[CallTiming] = field(default_factory=list)
    _begun: float = field(default_factory=time.perf_counter, init=False)
    _ended: float | None = field(default=None, init=False)

    def end(self) -> None:
        """Stops the clock."""
        self._ended = time.perf_counter()

    @property
    def seconds(self) -> float:
        return (self._ended or time.perf_counter()) - self._begun

    def medians(self) -> dict[str, float]:
        """Returns the median seconds of each stage, and of `total`."""
        return {
            name: statistics.median(getattr(call, name) for call in self.calls) if self.calls else 0.0
            for name in (*STAGES, "total")
        }

    def shares(self) -> dict[str, float]:
        """Returns each stage's share, 0..1, of the time of all calls together."""
        total = sum(call.total for call in self.calls) or 1.0
        return {name: sum(getattr(call, name) for call in self.calls) / total for name in STAGES}

    def __str__(self) -> str:
        images = sum(call.images for call in self.calls)
        megabytes = sum(call.sent + call.received for call in self.calls) / 1e6
        medians, shares = self.medians(), self.shares()
        lines = [
            f"{len(self.calls)} calls in {self.seconds:.3g} s, {images / self.seconds:.1f} images/s, "
            f"{megabytes / self.seconds:.1f} MB/s",
            f"{'':10}{'median':>12}{'share':>10}",
        ]
        lines += [f"{name:10}{medians[name] * 1e3:9.2f} ms{shares[name]:10.1%}" for name in STAGES]
        lines.append(f"{'total':10}{medians['total'] * 1e3:9.2f} ms")
        return "\n".join(lines)
