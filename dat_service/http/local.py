"""Serves one codec in this process with uvicorn, for `dat serve --local`."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from dat_service.http.app import create_app
from dat_service.http.header_limits import LimitedHeaders
from dat_service.settings import Settings
from dat_service.worker import CodecWorker
from dat_workers.system.signals import handle_signals


class LocalServer(uvicorn.Server):
    """Loads a codec and serves it until SIGINT or SIGTERM.

    >>> LocalServer(Settings(codec="tiny-f8"), on_ready=lambda: print("ready")).run()  # doctest: +SKIP

    `on_ready` is called once the port is open. The constructor raises the errors of `CodecWorker.load` and of
    `create_app`.
    """

    def __init__(self, settings: Settings, on_ready: Callable[[], None]) -> None:
        worker = CodecWorker(settings)
        worker.load()
        self._on_ready = on_ready
        super().__init__(
            uvicorn.Config(
                create_app(worker),
                host=settings.host,
                port=settings.port,
                loop="uvloop",
                http=LimitedHeaders,
                proxy_headers=False,  # no proxy sets X-Forwarded-For here; a client could put any address into it
                ws="none",
                log_level="warning",
                timeout_graceful_shutdown=10,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Makes SIGINT and SIGTERM stop the server with status 0; uvicorn's method would raise the signal again."""
        with handle_signals(self.handle_exit, signal.SIGINT, signal.SIGTERM):
            yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._on_ready()
