"""Where the time of a call goes: client, network, queue, codec, the rest of the server."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from dat_client.calls.core import Call, Exchange

PARTS = ("client", "repeats", "network", "queue", "codec", "server")


@dataclass(frozen=True)
class Sample:
    """One call, in seconds.

    Attributes:
        client: checks, encoding and what turns an answer into arrays.
        repeats: failed attempts and the pauses after them; waiting for a thread of `max_in_flight`.
        network: from sending the request to holding the answer, without `queue`, `codec` and `server`.
        queue: waiting for the codec. codec: being computed on. server: what else the server did.
        total: all of it. images, sent, received: rows, and bytes of the bodies.

    Of a call in several parts, the part that ended last is counted.
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


def sample(call: Call, exchange: Exchange, sent_s: float, total_s: float) -> Sample:
    """A call that took `total_s` in all; `sent_s` is time.perf_counter() when its first attempt was begun.

    The server's `total` has the reading of the body in it, which is as slow as the network brings it.
    """
    timing = exchange.timing
    queue, codec = timing.get("queue", 0.0), timing.get("codec", 0.0)
    inside = max(0.0, min(timing.get("total", 0.0) - timing.get("body", 0.0), exchange.seconds))
    repeats = max(0.0, exchange.begun_s - sent_s)
    return Sample(
        client=max(0.0, total_s - repeats - exchange.seconds),
        repeats=repeats,
        network=exchange.seconds - inside,
        queue=queue,
        codec=codec,
        server=max(0.0, inside - queue - codec),
        total=total_s,
        images=call.batch,
        sent=exchange.sent,
        received=exchange.received,
    )


class Profile:
    """The calls of a client between the beginning and the end of `with client.profile()`.

    Attributes:
        calls: one Sample a call that was answered, in the order of the answers.
        seconds: how long the block took (so far).
    """

    def __init__(self) -> None:
        self.calls: list[Sample] = []
        self._begun = time.perf_counter()
        self._ended: float | None = None

    def end(self) -> None:
        """Stop the clock."""
        self._ended = time.perf_counter()

    @property
    def seconds(self) -> float:
        return (self._ended or time.perf_counter()) - self._begun

    def medians(self) -> dict[str, float]:
        """The median seconds of each of PARTS, and of `total`."""
        return {
            name: statistics.median(getattr(call, name) for call in self.calls) if self.calls else 0.0
            for name in (*PARTS, "total")
        }

    def shares(self) -> dict[str, float]:
        """The share, 0..1, that each of PARTS has in the time of all calls together."""
        total = sum(call.total for call in self.calls) or 1.0
        return {name: sum(getattr(call, name) for call in self.calls) / total for name in PARTS}

    def __str__(self) -> str:
        images = sum(call.images for call in self.calls)
        moved = sum(call.sent + call.received for call in self.calls) / 1e6
        medians, shares = self.medians(), self.shares()
        lines = [
            f"{len(self.calls)} calls in {self.seconds:.3g} s, {images / self.seconds:.1f} images/s, "
            f"{moved / self.seconds:.1f} MB/s",
            f"{'':10}{'median':>12}{'share':>10}",
        ]
        lines += [f"{name:10}{medians[name] * 1e3:9.2f} ms{shares[name]:10.1%}" for name in PARTS]
        lines.append(f"{'total':10}{medians['total'] * 1e3:9.2f} ms")
        return "\n".join(lines)
