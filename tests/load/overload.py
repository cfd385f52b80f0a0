"""Ten times more requests than the codec can answer: refusals, the waits of the others, and memory.

    python -m tests.load.overload         # DAT_OVERLOAD_S=60 seconds

Raw clients send at a fixed rate, without retries. Requests expected to wait longer than `max_queue_s` are refused.
Answers must come within three times the unloaded time, so the longest wait is set to a part of that time.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import numpy as np

from benchmarks.latency import percentiles
from benchmarks.pictures import shifted_photographs
from benchmarks.processes import dat_serve, resource_usage
from dat_service.launch import RunningProcess
from tests.load.answers import CODEC, SERVE
from tests.load.raw import RawClient, Replies, open_loop, record
from tests.load.traffic import show

SECONDS = float(os.environ.get("DAT_OVERLOAD_S", "60"))
TIMES = 10
CLIENTS = 48
LONGEST_WAIT = 0.75  # in unloaded calls: a request shares the codec with those before and after it
IMAGES, SIDE = 8, 128  # a quarter of a second on one core, so that refusals cost the cores a few per cent
UNLOADED_CALLS = 60
WARM_SHARE = 0.25  # of the time, after which memory should no longer grow


def overload(seconds: float = SECONDS) -> dict[str, Any]:
    """Returns the figures; `errors` lists the wrong answers and statuses."""
    images = shifted_photographs(IMAGES, SIDE)
    with dat_serve(*SERVE) as service:
        alone = unloaded(service.url, images, 20)
    longest_wait_s = LONGEST_WAIT * alone["median_s"]
    with dat_serve(*SERVE, env={"DAT_MAX_QUEUE_S": f"{longest_wait_s:.3f}"}) as service:
        alone = unloaded(service.url, images, UNLOADED_CALLS)
        per_s = TIMES / alone["median_s"]
        replies, before, after = flood(service, images, per_s, seconds)
    p99_s = percentiles(replies.seconds)["p99_s"] if replies.seconds else float("inf")
    sent = sum(replies.statuses.values())
    return {
        "seconds": seconds,
        "max_queue_s": longest_wait_s,
        "capacity, requests/s": 1 / alone["median_s"],
        "wanted, requests/s": per_s,
        "sent, requests/s": sent / seconds,
        "answered": replies.statuses[200],
        "refused (503)": replies.statuses[503],
        "other statuses": {s: n for s, n in replies.statuses.items() if s not in (200, 503)},
        "unloaded median, s": alone["median_s"],
        "unloaded p99, s": alone["p99_s"],
        "accepted p99, s": p99_s,
        "p99 over unloaded p99": p99_s / alone["p99_s"],
        "median of a refusal, s": percentiles(replies.refused_s)["median_s"] if replies.refused_s else 0.0,
        "replica RSS before, MB": before / 1e6,
        "replica RSS after, MB": after / 1e6,
        "memory": after / before,
        "errors": replies.faults,
    }


def unloaded(url: str, images: np.ndarray, calls: int) -> dict[str, float]:
    """Returns the percentiles of one client's calls without other load."""
    client, replies = RawClient(url, CODEC, images, "alone"), Replies()
    for _ in range(3 + calls):
        record(client, replies, lambda body: True)
    client.close()
    if replies.faults:
        raise RuntimeError(f"the unloaded service failed: {replies.faults[:3]}")
    return percentiles(replies.seconds[3:])


def flood(service: RunningProcess, images: np.ndarray, per_s: float, seconds: float) -> tuple[Replies, int, int]:
    """Returns the replies, and the replica's resident bytes once it is warm under this load and at the end."""
    reference = RawClient(service.url, CODEC, images, "reference")
    _, _, expected = reference.post()
    reference.close()
    clients = [RawClient(service.url, CODEC, images, f"client-{i}") for i in range(CLIENTS)]
    replies, warm = Replies(), []

    def measure_warm() -> None:
        time.sleep(WARM_SHARE * seconds)
        warm.append(replica_rss(service))

    thread = threading.Thread(target=measure_warm)
    thread.start()
    tail = expected[-images.nbytes :]  # the reconstruction; the header before it holds figures of the request
    open_loop(clients, per_s, seconds, replies, lambda body: body[-images.nbytes :] == tail)
    thread.join()
    after = replica_rss(service)
    for client in clients:
        client.close()
    return replies, warm[0], after


def replica_rss(service: RunningProcess) -> int:
    """Returns the resident bytes of all replicas."""
    return sum(u.resident_bytes for u in resource_usage(service.pid).values() if u.role == "replica")


if __name__ == "__main__":
    show("overload", overload())
