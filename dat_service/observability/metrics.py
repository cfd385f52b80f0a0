"""What the service counts and times, for Prometheus: one Metrics object a process, labelled by codec and replica.

Counters begin at 0 with each replica, and a replica that has gone is no longer shown: use rate() and increase().
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder

LABELS = ("codec", "replica")
SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, math.inf)
FILL = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
RATIO = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1)

GAUGES = {
    "dat_queued_images": ("queued_images", "Images that wait for the codec."),
    "dat_held_requests": ("held", "Requests that are in the service, bodies and answers on their way included."),
    "dat_held_bytes": ("held_bytes", "Bytes that these may take."),
    "dat_healthy": ("healthy", "1 while the codec answers, 0 where it failed or hangs."),
}


class Metrics:
    """Everything that is counted in one process.

    >>> metrics = Metrics("tiny-f8", "local")
    >>> metrics.batch(rows=12, capacity=16, seconds=0.25)
    >>> metrics.answered("plain", images=12, queue_s=0.01, tokens_changed=None)
    """

    def __init__(self, codec: str, replica: str) -> None:
        self.labels = {"codec": codec, "replica": replica}
        self.registry = CollectorRegistry(auto_describe=False)
        self._worker: Any = None
        self._images = self._counter("dat_images_total", "Images answered for, by what was asked.", "kind")
        self._bytes = self._counter(
            "dat_bytes_total", "Bytes of request bodies taken in and of answers sent out.", "direction"
        )
        self._requests = self._counter("dat_requests_total", "HTTP requests, by the status they got.", "status")
        self._refusals = self._counter("dat_refusals_total", "HTTP requests refused, by the reason.", "reason")
        self._retries = self._counter("dat_retries_total", "Requests that a client of ours sent again.")
        self._request_s = self._histogram(
            "dat_request_seconds", "From a POST's headers to its answer's last byte, where all went well.", SECONDS
        )
        self._queue_s = self._histogram("dat_queue_seconds", "Waiting for the codec, a request.", SECONDS)
        self._codec_s = self._histogram("dat_codec_seconds", "The codec's work, a batch.", SECONDS)
        self._busy_s = self._counter("dat_codec_busy_seconds_total", "Seconds in which the codec worked.")
        self._fill = self._histogram("dat_batch_fill", "Share of a batch's places that were taken.", FILL)
        self._changed = self._histogram(
            "dat_tokens_changed_ratio", "Share of tokens that the adversarial step changed, a request.", RATIO
        )
        self.registry.register(self)
        # shown as 0 from the start: rate() misses what happens between nothing and the first sample
        for kind in ("plain", "adversarial", "decode"):
            self._images.labels(**self.labels, kind=kind)
        for direction in ("in", "out"):
            self._bytes.labels(**self.labels, direction=direction)
        self.retried = self._retries.labels(**self.labels).inc
        for metric in (self._busy_s, self._request_s, self._queue_s, self._codec_s, self._fill, self._changed):
            metric.labels(**self.labels)

    def _counter(self, name: str, about: str, *more: str) -> Counter:
        return Counter(name, about, (*LABELS, *more), registry=self.registry)

    def _histogram(self, name: str, about: str, buckets: Iterable[float]) -> Histogram:
        return Histogram(name, about, LABELS, registry=self.registry, buckets=tuple(buckets))

    def watch(self, worker: Any) -> None:
        """The CodecWorker that the gauges are read from when somebody looks."""
        self._worker = worker

    def gauges(self) -> dict[str, float]:
        """By attribute of the worker; nothing where there is none."""
        attributes = [attribute for attribute, _ in GAUGES.values()] if self._worker is not None else []
        return {a: float(getattr(self._worker, a)) for a in attributes}

    def batch(self, rows: int, capacity: int, seconds: float) -> None:
        """The codec has worked `seconds` on a batch of `rows` images where `capacity` would have fitted."""
        self._codec_s.labels(**self.labels).observe(seconds)
        self._busy_s.labels(**self.labels).inc(seconds)
        self._fill.labels(**self.labels).observe(rows / capacity)

    def answered(self, kind: str, images: int, queue_s: float, tokens_changed: float | None) -> None:
        """A request for `images` images was answered; `kind` is plain, adversarial or decode."""
        self._images.labels(**self.labels, kind=kind).inc(images)
        self._queue_s.labels(**self.labels).observe(queue_s)
        if tokens_changed is not None:
            self._changed.labels(**self.labels).observe(tokens_changed)

    def request(self, status: int, bytes_in: int, bytes_out: int, seconds: float | None) -> None:
        """An HTTP request has ended; `seconds` are those of a POST that went well."""
        self._requests.labels(**self.labels, status=str(status)).inc()
        if bytes_in:
            self._bytes.labels(**self.labels, direction="in").inc(bytes_in)
        if bytes_out:
            self._bytes.labels(**self.labels, direction="out").inc(bytes_out)
        if seconds is not None:
            self._request_s.labels(**self.labels).observe(seconds)

    def refused(self, reason: str) -> None:
        """An HTTP request was refused."""
        self._refusals.labels(**self.labels, reason=reason).inc()

    def collect(self) -> Iterator[Metric]:
        """The gauges, and what codec this is; read at this moment."""
        values = tuple(self.labels.values())
        known = self.gauges()
        for name, (attribute, about) in GAUGES.items():
            gauge = GaugeMetricFamily(name, about, labels=LABELS)
            if attribute in known:
                gauge.add_metric(values, known[attribute])
            yield gauge
        info = InfoMetricFamily("dat_codec", "What the replica serves, and on what.", labels=LABELS)
        discretizer = getattr(self._worker, "discretizer", None)
        if discretizer is not None:
            said = {"fingerprint": discretizer.fingerprint, **discretizer.describe()}
            info.add_metric(values, {name: said[name] for name in ("fingerprint", "engine", "device", "dtype")})
        yield info

    def families(self) -> list[Metric]:
        """All metrics as they stand, without the moments at which they were made: those are series of their own."""
        families = list(self.registry.collect())
        for family in families:
            family.samples = [s for s in family.samples if not s.name.endswith("_created")]
        return families


def merged(parts: Iterable[Iterable[Metric]]) -> list[Metric]:
    """The families of several replicas as one of each name, with the samples of all."""
    by_name: dict[str, Metric] = {}
    for part in parts:
        for family in part:
            if family.name not in by_name:
                by_name[family.name] = Metric(family.name, family.documentation, family.type, family.unit)
            by_name[family.name].samples += family.samples
    return list(by_name.values())


def render(families: list[Metric], accept: str) -> tuple[bytes, str]:
    """Prometheus' text format, or OpenMetrics where the Accept header asks for it; and the media type."""

    class Collected:
        def collect(self) -> list[Metric]:
            return families

    try:
        encode, media_type = choose_encoder(accept)
    except (TypeError, ValueError):  # a version in it that is none
        encode, media_type = choose_encoder("")
    return encode(Collected()), media_type
