"""Limits the size of request headers, and the time they take to arrive, for `dat serve --local`.

uvicorn itself has neither limit. On Ray, HAProxy applies its own limits: about 15 KiB, and also 15 s.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_BYTES = 64 * 1024
TIMEOUT_S = 15.0

REFUSAL = b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class LimitedHeaders(HttpToolsProtocol):
    """uvicorn's HTTP protocol with two additional limits; a client that exceeds one of them is disconnected.

    All headers of a request must arrive within `TIMEOUT_S` seconds. Their size is at most `MAX_BYTES`, and the same
    limit holds for all else that the parser consumes without an event, such as trailers and chunk extensions.
    """

    _silent_bytes = 0  # the number of bytes received since the parser's last event
    _timer: asyncio.TimerHandle | None = None  # this timer runs while headers are expected

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
        self._silent_bytes += len(data)
        super().data_received(data)
        # Some of this data may precede the last event, so the limit is exact only to one read of at most 256 KiB.
        if self._silent_bytes > MAX_BYTES and not self.transport.is_closing():
            if answered:
                self.transport.write(REFUSAL)
            self.transport.close()

    def on_message_begin(self) -> None:
        self._silent_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._silent_bytes = 0
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._silent_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._silent_bytes = 0
        super().on_message_complete()

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(TIMEOUT_S, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
