"""Splits the time of a call into stages: client, repeats, network, queue, codec and the rest of the server."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

from dat_client.calls.core import Call, Exchange

STAGES = ("client", "repeats", "network", "queue", "codec", "server")


@dataclass(frozen=True)
class CallTiming:
    """The time of one call by stages, in seconds, and its sizes.

    Attributes:
        client: the time for checking and encoding the arguments and for turning the answer into arrays.
        repeats: the time of failed attempts and of the pauses after them. If `max_in_flight` splits the batch, also
            the time for which the requests waited for a thread.
        network: the time from sending the request until the answer had arrived, less `queue`, `codec` and `server`.
        queue: the time for which the request waited on the server for the codec.
        codec: the time for which the codec computed.
        server: the remaining time on the server.
        total: the time of the whole call.
        images: the number of images in the batch.
        sent, received: the sizes in bytes of the bodies of the requests and of the answers.

    If a call was split into several requests, the stages are those of the request that ended last.
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
    """Splits the time of a call into stages.

    `seconds` is the time from the end of `call.prepared_s` until the answer was converted to arrays.
    `first_attempt_s` is time.perf_counter() at the beginning of the first attempt. The server's `total` includes
    `body`, the time for reading the request's body. That depends on the network's speed, so `body` is subtracted
    from the server's time and counted as network time.
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
    """The timings of a client's calls inside a `with client.profile()` block; `print` shows them as a table.

    Attributes:
        calls: one CallTiming for each call that was answered, in the order of the answers.
        seconds: how long the block lasted, or has lasted so far.
    """

    calls: list[CallTiming] = field(default_factory=list)
    _begun: float = field(default_factory=time.perf_counter, init=False)
    _ended: float | None = field(default=None, init=False)

    def end(self) -> None:
        """Ends the measurement, so that `seconds` no longer grows."""
        self._ended = time.perf_counter()

    @property
    def seconds(self) -> float:
        return (self._ended or time.perf_counter()) - self._begun

    def medians(self) -> dict[str, float]:
        """Returns the median in seconds of each stage and of `total`, over all calls; 0 if there were no calls."""
        return {
            name: statistics.median(getattr(call, name) for call in self.calls) if self.calls else 0.0
            for name in (*STAGES, "total")
        }

    def shares(self) -> dict[str, float]:
        """Returns each stage's share, 0..1, of the summed time of all calls; 0 if there were no calls."""
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
