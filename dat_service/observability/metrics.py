"""Keeps the Prometheus metrics of one process, labelled by codec and replica.

A replica's counters begin at 0 when it starts and disappear when it ends. Query them with rate() and increase().
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, Metric, disable_created_metrics
from prometheus_client.exposition import choose_encoder

from dat_workers.discretizer import Discretizer

# Otherwise each counter and each histogram would have one more series, for its creation time.
disable_created_metrics()  # type: ignore[no-untyped-call]

LABELS = ("codec", "replica")
SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, math.inf)
FILL = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
RATIO = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1)

# For the name of each gauge: the attribute of CodecWorker that it shows, and its help text.
GAUGES = {
    "dat_queued_images": ("queued_images", "Images that are waiting for the codec."),
    "dat_held_requests": ("held", "Requests that have arrived and whose responses have not been sent completely."),
    "dat_held_bytes": ("held_bytes", "Bytes of requests, as they arrive, and of their responses."),
    "dat_healthy": ("healthy", "1 while the codec can compute, 0 after it has failed or hung."),
}


class MetricsSource(Protocol):
    """The metrics of all replicas of an application."""

    async def families(self) -> list[Metric]: ...

    def stop(self) -> None: ...


class Metrics:
    """Records what happens in this process as metrics.

    >>> metrics = Metrics("tiny-f8", "local")
    >>> metrics.batch(rows=12, capacity=16, seconds=0.25)
    >>> metrics.answered("plain", images=12, queue_s=0.01, tokens_changed=None)
    """

    def __init__(self, codec: str, replica: str) -> None:
        self.labels = {"codec": codec, "replica": replica}
        self.registry = CollectorRegistry(auto_describe=False)
        counter, histogram = self._counter, self._histogram
        self._images = counter("dat_images_total", "Images that were computed, by kind of request.", "kind")
        self._bytes = counter("dat_bytes_total", "Bytes of request bodies (in) and responses (out).", "direction")
        self._requests = counter("dat_requests_total", "HTTP requests, by response status.", "status")
        self._refusals = counter("dat_refusals_total", "HTTP requests that were refused, by reason.", "reason")
        self._retries = counter("dat_retries_total", "Requests that dat_client sent again.").labels(**self.labels)
        about = "Seconds from the headers of a successful POST request to the last byte of its response."
        self._request_s = histogram("dat_request_seconds", about, SECONDS)
        self._queue_s = histogram("dat_queue_seconds", "Seconds that a request waited for the codec.", SECONDS)
        self._codec_s = histogram("dat_codec_seconds", "Seconds that the codec took for a batch.", SECONDS)
        about = "Seconds during which the codec was computing."
        self._busy_s = counter("dat_codec_busy_seconds_total", about).labels(**self.labels)
        self._fill = histogram("dat_batch_fill", "Images in a batch, divided by its capacity.", FILL)
        about = "Share of a request's tokens that the adversarial step changed."
        self._changed = histogram("dat_tokens_changed_ratio", about, RATIO)
        self._gauges = {
            attribute: Gauge(name, help_text, LABELS, registry=self.registry)
            for name, (attribute, help_text) in GAUGES.items()
        }
        about = "The codec that the replica serves, and its engine."
        self._codec = Info("dat_codec", about, LABELS, registry=self.registry)
        # These must be 0 from the start: rate() misses all events before the first sample of a series.
        for kind in ("plain", "adversarial", "decode"):
            self._images.labels(**self.labels, kind=kind)
        for direction in ("in", "out"):
            self._bytes.labels(**self.labels, direction=direction)

    def _counter(self, name: str, help_text: str, *more: str) -> Counter:
        return Counter(name, help_text, (*LABELS, *more), registry=self.registry)

    def _histogram(self, name: str, help_text: str, buckets: Iterable[float]) -> Histogram:
        metric = Histogram(name, help_text, LABELS, registry=self.registry, buckets=tuple(buckets))
        return metric.labels(**self.labels)

    def watch(self, worker: Any) -> None:
        """Makes the gauges read their values from this CodecWorker at each scrape."""
        for attribute, gauge in self._gauges.items():
            gauge.labels(**self.labels).set_function(partial(getattr, worker, attribute))

    def describe(self, discretizer: Discretizer) -> None:
        """Records which codec and which engine this process has loaded."""
        facts = {"fingerprint": discretizer.fingerprint, **discretizer.engine.describe()}
        shown = {name: facts[name] for name in ("fingerprint", "engine", "device", "dtype")}
        self._codec.labels(**self.labels).info(shown)

    def batch(self, rows: int, capacity: int, seconds: float) -> None:
        """Records that the codec took `seconds` for a batch of `rows` images, which has room for `capacity`."""
        self._codec_s.observe(seconds)
        self._busy_s.inc(seconds)
        self._fill.observe(rows / capacity)

    def answered(self, kind: str, images: int, queue_s: float, tokens_changed: float | None) -> None:
        """Records that the codec has computed a request.

        `kind` is plain, adversarial or decode. `queue_s` is how many seconds the request waited for the codec.
        `tokens_changed` is the share of tokens that the adversarial step changed, or None without such a step.
        """
        self._images.labels(**self.labels, kind=kind).inc(images)
        self._queue_s.observe(queue_s)
        if tokens_changed is not None:
            self._changed.observe(tokens_changed)

    def request(self, status: int, bytes_in: int, bytes_out: int, seconds: float | None) -> None:
        """Records the end of an HTTP request. `seconds` is its duration if it was a successful POST, else None."""
        self._requests.labels(**self.labels, status=str(status)).inc()
        for direction, nbytes in (("in", bytes_in), ("out", bytes_out)):
            self._bytes.labels(**self.labels, direction=direction).inc(nbytes)
        if seconds is not None:
            self._request_s.observe(seconds)

    def retried(self) -> None:
        """Records that a request was the second or a later attempt of its client."""
        self._retries.inc()

    def refused(self, reason: str) -> None:
        """Records that an HTTP request was refused, for one of the reasons in http/errors.py."""
        self._refusals.labels(**self.labels, reason=reason).inc()

    def families(self) -> list[Metric]:
        """Returns all metrics of this process with their present values."""
        return list(self.registry.collect())


def merged(parts: Iterable[Iterable[Metric]]) -> list[Metric]:
    """Returns one family for each metric name, with the samples that all replicas have under that name."""
    by_name: dict[str, Metric] = {}
    for part in parts:
        for family in part:
            if family.name not in by_name:
                by_name[family.name] = Metric(family.name, family.documentation, family.type, family.unit)
            by_name[family.name].samples += family.samples
    return list(by_name.values())


def render(families: list[Metric], accept: str) -> tuple[bytes, str]:
    """Returns the metrics as text and the media type: OpenMetrics if `accept` asks for that, else Prometheus's."""
    try:
        encode, media_type = choose_encoder(accept)
    except (TypeError, ValueError):  # the Accept header names a version that is not a number
        encode, media_type = choose_encoder("")
    return encode(SimpleNamespace(collect=lambda: families)), media_type
