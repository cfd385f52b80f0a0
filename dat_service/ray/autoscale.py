"""How many replicas the images that wait ask for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext


class ByQueuedImages:
    """An autoscaling policy of Ray Serve: one replica for every `images_per_replica` images that wait.

    Images and not requests, as Serve's own policy counts: a request is one image or a thousand. Replicas report
    theirs (`CodecReplica.record_autoscaling_stats`), Serve takes the mean over a few seconds, keeps MIN and MAX,
    and waits before it scales down.
    """

    def __init__(self, images_per_replica: float) -> None:
        self.images_per_replica = images_per_replica

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        queued = (context.aggregated_metrics or {}).get("queued_images", {})
        if not queued:  # no replica has reported yet: no reason to change anything
            return context.target_num_replicas, {}
        # replicas that have not reported have as much to do as the others
        waiting = sum(queued.values()) / len(queued) * max(len(queued), len(context.running_replicas))
        return math.ceil(waiting / self.images_per_replica), {}
