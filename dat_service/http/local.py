"""Serves one codec in this process with uvicorn, for `dat serve --local`."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import uvicorn

from dat_service.http.app import create_app
from dat_service.http.header_limits import LimitedHeaders
from dat_service.settings import Settings
from dat_service.worker import CodecWorker

if TYPE_CHECKING:
    from fastapi import FastAPI

STOP_S = 10  # requests that still run so long after the server or a replaced codec was told to stop are broken off


class LocalServer(uvicorn.Server):
    """Loads a codec and serves it until `should_exit` is set.

    >>> LocalServer(Settings(codec="tiny-f8"), on_ready=lambda: print("ready")).run()  # doctest: +SKIP

    `on_ready` is called once the port is open. The constructor raises the errors of `CodecWorker.load` and of
    `create_app`.
    """

    def __init__(self, settings: Settings, on_ready: Callable[[], None]) -> None:
        self._settings = settings
        self._app = self._load()
        self._on_ready = on_ready
        super().__init__(
            uvicorn.Config(
                self._call_app,
                interface="asgi3",
                lifespan="off",  # `shutdown` stops the newest application; uvicorn would stop the first one
                host=settings.host,
                port=settings.port,
                loop="uvloop",
                http=LimitedHeaders,
                proxy_headers=False,  # no proxy sets X-Forwarded-For here; a client could put any address into it
                ws="none",
                log_level="warning",
                timeout_graceful_shutdown=STOP_S,
            )
        )

    def update(self) -> None:
        """Loads the codec from the store again; may be called in any thread while the server runs.

        The old codec answers until the new one is loaded, and finishes the requests that it has taken by then.
        Raises the errors of the constructor; the old codec then stays.
        """
        old, self._app = self._app, self._load()
        worker: CodecWorker = old.state.worker
        deadline = time.monotonic() + self._settings.max_queue_s + STOP_S
        while worker.admitted and time.monotonic() < deadline:
            time.sleep(0.05)
        asyncio.run(_stop(old))

    def _load(self) -> FastAPI:
        worker = CodecWorker(self._settings)
        try:
            worker.load()
            return create_app(worker)
        except BaseException:
            worker.stop()
            raise

    async def _call_app(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes a request to the application of the newest codec; an update replaces the application."""
        await self._app(scope, receive, send)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves the signals to the caller: uvicorn's method would raise each of them again at the end."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        await _stop(self._app)


async def _stop(app: FastAPI) -> None:
    """Runs what the application does when it shuts down."""
    async with app.router.lifespan_context(app):
        pass
