"""Runs the app as a Ray Serve deployment, in which HAProxy sends HTTP requests directly to each replica."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from dat_service.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from dat_service.worker import CodecWorker


class CodecReplica:
    """A Ray Serve replica, which is a process that loads the codec and then builds the app."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        self.worker = self.make_worker(Settings(**settings))
        # The codec is loaded in a thread, because this takes a minute on a GPU and the event loop must answer
        # Serve's messages meanwhile.
        await asyncio.to_thread(self.worker.load)

    def make_worker(self, settings: Settings) -> CodecWorker:
        """Returns a new worker. A subclass for load tests overrides this method."""
        from ray import serve

        from dat_service.worker import CodecWorker

        return CodecWorker(settings, replica=serve.get_replica_context().replica_id.unique_id)

    def __serve_build_asgi_app__(self) -> FastAPI:
        from ray import serve

        from dat_service.http.app import create_app
        from dat_service.ray.metrics_board import SharedMetrics

        application = serve.get_replica_context().app_name
        return create_app(self.worker, all_metrics=SharedMetrics(self.worker.metrics, application))

    async def check_health(self) -> None:
        """Raises RuntimeError if the codec has failed or hung, whereupon Serve replaces the replica."""
        if not self.worker.healthy:
            raise RuntimeError(f"codec {self.worker.settings.codec}: {self.worker.why_unhealthy}")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Returns the number of waiting images, which autoscale.py uses."""
        return {"queued_images": float(self.worker.queued_images)}
