"""Defines the routes for operators: the metrics of all replicas, and the state of one replica."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from dat_service import __version__
from dat_service.http.auth import require_admin
from dat_service.observability.metrics import GAUGES, MetricsSource, render
from dat_service.worker import CodecWorker

router = APIRouter(tags=["For operators"], dependencies=[Depends(require_admin)])


@router.get("/metrics", summary="Metrics of all replicas, for Prometheus", response_class=Response)
async def metrics(request: Request) -> Response:
    """Returns the metrics in Prometheus' text format 0.0.4, or as OpenMetrics if the Accept header asks for that.

    The counters of a replica begin at 0 when it starts.
    """
    source: MetricsSource | None = request.app.state.all_metrics
    families = request.app.state.worker.metrics.families() if source is None else await source.families()
    body, media_type = render(families, request.headers.get("accept", ""))
    return Response(body, headers={"content-type": media_type})


@router.get("/v1/status", summary="State and settings of the replica that answers this request")
async def status(request: Request) -> dict[str, Any]:
    state = request.app.state
    worker: CodecWorker = state.worker
    discretizer = worker.discretizer
    return {
        "version": __version__,
        "codec": worker.settings.codec,
        "replica": worker.metrics.labels["replica"],
        "fingerprint": discretizer.fingerprint if discretizer else None,
        "engine": discretizer.engine.describe() if discretizer else None,
        "ready": worker.ready,
        "uptime_s": round(time.monotonic() - state.started, 3),
        "gauges": {attribute: float(getattr(worker, attribute)) for attribute, _ in GAUGES.values()},
        "api_keys": len(state.keys.keys),
        "settings": worker.settings.model_dump(mode="json", exclude={"api_key_file"}),
    }
