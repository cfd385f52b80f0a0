"""Chooses the number of replicas by the number of waiting images."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext


class ByQueuedImages:
    """An autoscaling policy for Ray Serve: one replica for every `images_per_replica` waiting images.

    It counts images, because a request may have one image or a thousand; Serve's own policy counts requests.
    Each replica reports its number of waiting images (`CodecReplica.record_autoscaling_stats`). Serve averages
    these numbers over a few seconds, keeps the result between MIN and MAX, and delays scaling down.
    """

    def __init__(self, images_per_replica: float) -> None:
        self.images_per_replica = images_per_replica

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        queued = (context.aggregated_metrics or {}).get("queued_images", {})
        if not queued:  # no replica has reported yet
            return context.target_num_replicas, {}
        # assume that replicas that have not reported are as busy as those that have
        waiting = sum(queued.values()) / len(queued) * max(len(queued), len(context.running_replicas))
        return math.ceil(waiting / self.images_per_replica), {}
