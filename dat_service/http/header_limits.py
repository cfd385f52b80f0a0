"""Limits on headers for `dat serve --local`: uvicorn takes them of any size, and waits for them for ever.

On Ray HAProxy has limits of its own: about 15 KiB, and 15 s as here.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_BYTES = 64 * 1024
TIMEOUT_S = 15.0

REFUSAL = b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class LimitedHeaders(HttpToolsProtocol):
    """uvicorn's protocol, which closes the connection of who sends more than `MAX_BYTES` of headers, or of whatever
    else the app is not told of (trailers, chunk extensions), or takes longer than `TIMEOUT_S` for the headers.
    """

    _untold = 0  # bytes since the parser last told of something
    _timer: asyncio.TimerHandle | None = None  # runs while headers are waited for

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        answered = self.cycle is None or self.cycle.response_complete
        if answered and self._timer is None:
            self._start_timer()
        self._untold += len(data)
        super().data_received(data)
        # of this data some may have come before what was told last: one read more or less, 256 KiB at most
        if self._untold > MAX_BYTES and not self.transport.is_closing():
            if answered:
                self.transport.write(REFUSAL)
            self.transport.close()

    def on_message_begin(self) -> None:
        self._untold = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._untold = 0
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._untold = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._untold = 0
        super().on_message_complete()

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(TIMEOUT_S, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
