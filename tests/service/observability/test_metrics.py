"""Metrics are counted, and those of several replicas are merged."""

from __future__ import annotations

from types import SimpleNamespace

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from dat_service.observability.metrics import Metrics, merged, render

Samples = dict[tuple[str, str], float]  # by name and replica


def parsed(families: list[Metric]) -> tuple[list[str], Samples]:
    """Returns the families' names in their order, and the samples by name with further labels and replica."""
    found = list(text_string_to_metric_families(render(families, "")[0].decode()))
    samples = {}
    for family in found:
        for s in family.samples:
            more = "".join(f"/{v}" for k, v in s.labels.items() if k not in ("codec", "replica"))
            assert (s.name + more, s.labels["replica"]) not in samples
            samples[s.name + more, s.labels["replica"]] = s.value
    return [f.name for f in found], samples


def busy(replica: str, images: int) -> Metrics:
    metrics = Metrics("tiny-f8", replica)
    metrics.answered("plain", images, queue_s=0.03, tokens_changed=None)
    return metrics


def test_batches_and_answers() -> None:
    metrics = Metrics("tiny-f8", "r1")
    metrics.batch(rows=12, capacity=16, seconds=0.25)
    metrics.batch(rows=16, capacity=16, seconds=0.5)
    metrics.answered("adversarial", images=7, queue_s=0.03, tokens_changed=0.25)
    metrics.answered("plain", images=5, queue_s=0.04, tokens_changed=None)
    metrics.watch(SimpleNamespace(queued_images=40, held=3, held_bytes=1 << 20, healthy=True))
    _, samples = parsed(metrics.families())
    value = {name: v for (name, _), v in samples.items()}
    assert value["dat_images_total/adversarial"] == 7
    assert value["dat_images_total/plain"] == 5
    assert value["dat_images_total/decode"] == 0
    assert value["dat_codec_busy_seconds_total"] == value["dat_codec_seconds_sum"] == 0.75
    assert value["dat_codec_seconds_count"] == 2
    assert value["dat_batch_fill_sum"] == 1.75
    assert value["dat_batch_fill_bucket/0.8"] == 1
    assert value["dat_queue_seconds_count"] == 2
    assert value["dat_tokens_changed_ratio_count"] == 1
    assert value["dat_queued_images"] == 40
    assert value["dat_held_requests"] == 3
    assert value["dat_held_bytes"] == 1 << 20
    assert value["dat_healthy"] == 1


def test_replicas_are_merged_into_one_family_each() -> None:
    one, two = busy("r1", 3), busy("r2", 4)
    alone, _ = parsed(one.families())
    names, samples = parsed(merged([one.families(), two.families()]))
    assert names == alone
    assert len(names) == len(set(names))
    assert samples["dat_images_total/plain", "r1"] == 3
    assert samples["dat_images_total/plain", "r2"] == 4
    text = render(merged([one.families(), two.families()]), "")[0].decode()
    assert text.count("# TYPE dat_images_total ") == 1
    _, again = parsed(one.families())  # merging has changed nothing of theirs
    assert {replica for _, replica in again} == {"r1"}
