"""Builds the HTTP application, which is the same on Ray Serve, with `--local` and in tests."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI

from dat_service import __version__
from dat_service.http import admin, oip, pages
from dat_service.http.auth import KeyRing
from dat_service.http.body import TransportMiddleware, check_headers
from dat_service.http.errors import STATUSES, on_error
from dat_service.http.middleware import ObservabilityMiddleware
from dat_service.observability import logs, tracing
from dat_service.observability.metrics import MetricsSource
from dat_service.worker import CodecWorker


def create_app(worker: CodecWorker, *, all_metrics: MetricsSource | None = None) -> FastAPI:
    """Returns the application that serves a worker's codec. The application stops the worker when it shuts down.

    >>> worker = CodecWorker(Settings(codec="identity"))
    >>> worker.load()
    >>> app = create_app(worker)

    On Ray Serve, `all_metrics` is the source of the metrics of all replicas, and requests are taken to come through
    HAProxy. Without Ray it is None. Raises ValueError for an unusable API key file, and if a collector of spans is
    configured but OpenTelemetry is not installed.
    """
    settings = worker.settings
    logs.configure(settings.log_format, settings.log_level)
    spans = tracing.start(settings.codec, worker.metrics.labels["replica"])

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        worker.stop()
        if all_metrics is not None:
            all_metrics.stop()
        if spans is not None:
            spans.stop()

    app = FastAPI(
        title="Discrete augmentation data service",
        version=__version__,
        description=f"Q(x), the VQGAN discretizer of Discrete Adversarial Training; codec `{settings.codec}`.",
        lifespan=lifespan,
        dependencies=[Depends(check_headers)],
        docs_url=None,  # pages.py serves /docs without the internet
        redoc_url=None,  # /docs shows the same content
        redirect_slashes=False,  # a redirect would lead to the Host that the client sent, which may be any
    )
    app.state.worker = worker
    app.state.keys = KeyRing(settings.api_key_file)
    app.state.all_metrics = all_metrics
    app.state.behind_proxy = all_metrics is not None
    app.state.started = time.monotonic()
    for router in (oip.router, oip.codec_router, admin.router, pages.router):
        app.include_router(router)
    for kind in STATUSES:
        app.add_exception_handler(kind, on_error)
    # These wrap the whole stack, because Starlette creates responses with status 500 outside of all middleware that
    # add_middleware adds.
    app.middleware_stack = ObservabilityMiddleware(
        TransportMiddleware(app.build_middleware_stack()),
        worker.metrics,
        echo=all_metrics is None,  # Ray Serve adds X-Request-Id itself
        trace=None if spans is None else spans.record,
    )
    return app
