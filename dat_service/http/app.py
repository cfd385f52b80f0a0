"""The HTTP application: the same object under Ray Serve, `--local` and the tests."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import dat_client.wire as wire
from dat_service import __version__
from dat_service.http import admin, oip, pages
from dat_service.http.auth import Forbidden, KeyRing, Refused
from dat_service.http.body import Direct, MalformedBody
from dat_service.http.middleware import GONE, Observe
from dat_service.observability import logs, tracing
from dat_service.ray.metrics_board import Gather
from dat_service.worker import CodecWorker
from dat_workers.errors import DeadlinePassed, EngineError, Full, InvalidInput, OutOfMemory, TooLarge, Unhealthy

log = logging.getLogger("dat_service")


def create_app(worker: CodecWorker, *, gather: Gather | None = None) -> FastAPI:
    """The application over a worker, which it stops when it ends.

    >>> worker = CodecWorker(Settings(codec="identity"))
    >>> worker.load()
    >>> app = create_app(worker)

    `gather`: on Ray Serve, the metrics of the other replicas. Raises ValueError for an API key file that is not
    usable, and where a collector of spans is named and OpenTelemetry is missing.
    """
    settings = worker.settings
    logs.configure(settings.log_format, settings.log_level)
    spans = tracing.start(settings.codec, worker.metrics.labels["replica"])

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        worker.stop()
        if gather is not None:
            gather.stop()
        if spans is not None:
            spans.stop()

    app = FastAPI(
        title="Discrete augmentation data service",
        version=__version__,
        description=f"Q(x), the VQGAN discretizer of Discrete Adversarial Training; codec `{settings.codec}`.",
        lifespan=lifespan,
        redoc_url=None,  # /docs shows the same
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,  # a redirect would go to whatever Host the client named
    )
    app.state.worker = worker
    app.state.keys = KeyRing(settings.api_key_file)
    app.state.gather = gather
    app.state.started = time.monotonic()
    app.include_router(oip.router)
    app.include_router(admin.router)
    app.include_router(pages.router)
    app.add_exception_handler(Exception, on_error)
    for kind in (
        wire.WireError, InvalidInput, MalformedBody, oip.UnknownCodec, Refused, Forbidden, Full,
        DeadlinePassed, EngineError, HTTPException, ClientDisconnect,
    ):  # fmt: skip
        app.add_exception_handler(kind, on_error)
    # around the whole stack, not in it: Starlette keeps the page for status 500 outside of what add_middleware adds
    app.middleware_stack = Observe(
        Direct(app.build_middleware_stack()),
        worker.metrics,
        echo=gather is None,  # Ray Serve adds X-Request-Id itself
        trace=None if spans is None else spans.record,
    )
    return app


def status_of(error: Exception) -> int:
    """The HTTP status of what went wrong: 4xx is the request's, 503 the load's, 500 ours."""
    match error:
        case wire.WireError():
            return error.status or 400
        case TooLarge():
            return 413
        case InvalidInput():
            return 422
        case MalformedBody():
            return error.status
        case oip.UnknownCodec():
            return 404
        case Refused():
            return 401
        case Forbidden():
            return 403
        case Full() | Unhealthy() | OutOfMemory():
            return 503
        case DeadlinePassed():
            return 504
        case HTTPException():
            return error.status_code
        case ClientDisconnect():
            return GONE  # nobody is there to read it
        case _:
            return 500


def reason_of(error: Exception) -> str | None:
    """Why a request was refused, for the metrics, where the status alone does not say it."""
    return "unhealthy" if isinstance(error, Unhealthy | OutOfMemory) else None


async def on_error(request: Request, error: Exception) -> Response:
    """OIP's error body, with the offending field, value and limit where they are known."""
    status = status_of(error)
    headers = {}
    message = str(error)
    if status == 503:
        headers["Retry-After"] = str(getattr(error, "retry_after_s", 1))
    match error:
        case Refused():
            headers["WWW-Authenticate"] = "Bearer"
        case MalformedBody():
            headers["Connection"] = "close"  # who knows where the next request begins
        case HTTPException():
            message = f"{request.method} {request.url.path[:200]}: {error.detail}"
            headers = dict(error.headers or {})
        case Unhealthy():
            pass  # said once, where it was found
        case EngineError():
            log.error("%s", error)
        case _ if status == 500:
            log.exception("%s %s failed", request.method, request.url.path, exc_info=error)
            message = f"internal error: {type(error).__name__}"
    if not isinstance(error, ClientDisconnect):
        request.state.refusal = message  # for the audit; not the error, which holds the body by its traceback
        request.state.reason = reason_of(error)
    field, value, limit = (getattr(error, name, None) for name in ("field", "value", "limit"))
    body = wire.encode_error(message, field, value, limit)
    return Response(body, status, headers, media_type="application/json")
