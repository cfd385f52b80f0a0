"""The app as a Ray Serve deployment: each replica is itself the HTTP ingress behind HAProxy."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from dat_service.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from dat_service.worker import CodecWorker


class CodecReplica:
    """One Ray Serve replica: a process that loads the codec, then builds the app."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        self.worker = self.make_worker(Settings(**settings))
        # In a thread: this event loop must answer Serve's messages, and loading takes a minute on a GPU.
        await asyncio.to_thread(self.worker.load)

    def make_worker(self, settings: Settings) -> CodecWorker:
        """Creates the worker; a stand-in for load tests overrides this."""
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
        """Raises RuntimeError if the codec has hung or died; Serve then replaces the replica."""
        if not self.worker.healthy:
            raise RuntimeError(f"codec {self.worker.settings.codec}: {self.worker.why_unhealthy}")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Reports the number of waiting images, for autoscale.py."""
        return {"queued_images": float(self.worker.queued_images)}
