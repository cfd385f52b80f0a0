"""The client for asyncio: `AsyncClient`, the same methods as coroutines over the same core."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self, TypeVar

from dat_client.calls.core import Array, Discretized, decode_call, discretize_call
from dat_client.calls.profile import Profile
from dat_client.client import Client

T = TypeVar("T")


class AsyncClient:
    """`Client` with coroutines for methods; same arguments, same exceptions.

        async with AsyncClient("http://codec:8000", codec="tiny-f8") as client:
            answers = await asyncio.gather(*(client.discretize(batch) for batch in batches))

    Every call runs in one of the `max_connections` threads of a Client. A cancelled call is dropped if it
    waits; one that is on its way ends in its thread and nobody hears of it.
    """

    def __init__(
        self,
        url: str,
        codec: str = "tiny-f8",
        *,
        timeout_s: float = 60.0,
        connect_timeout_s: float = 5.0,
        retries: int | None = None,
        max_connections: int = 8,
        max_in_flight: int = 1,
        api_key: str | None = None,
    ) -> None:
        self._client = Client(
            url,
            codec,
            timeout_s=timeout_s,
            connect_timeout_s=connect_timeout_s,
            retries=retries,
            max_connections=max_connections,
            max_in_flight=max_in_flight,
            api_key=api_key,
        )

    async def discretize(
        self,
        images: Any,
        gradients: Any = None,
        *,
        gradient_dtype: str = "FP16",
        outputs: Sequence[str] | None = None,
        output_dtype: str | None = None,
        timeout_s: float | None = None,
        **parameters: Any,
    ) -> Discretized:
        """As `Client.discretize`; many at once with `asyncio.gather`, so there is no `submit`."""
        arguments = (images, gradients, gradient_dtype, outputs, output_dtype, parameters)
        return await self._run(lambda: self._client._answer(timeout_s, discretize_call, *arguments))

    async def decode(
        self,
        indices: Any,
        *,
        output_dtype: str | None = None,
        timeout_s: float | None = None,
        **parameters: Any,
    ) -> Array:
        """As `Client.decode`."""
        arguments = (indices, output_dtype, parameters)
        return (await self._run(lambda: self._client._answer(timeout_s, decode_call, *arguments))).reconstruction

    def profile(self) -> AbstractContextManager[Profile]:
        """As `Client.profile`; `with`, not `async with`."""
        return self._client.profile()

    async def metadata(self) -> dict[str, Any]:
        """As `Client.metadata`."""
        return await self._run(self._client.metadata)

    async def server_metadata(self) -> dict[str, Any]:
        """As `Client.server_metadata`."""
        return await self._run(self._client.server_metadata)

    async def live(self) -> bool:
        """As `Client.live`."""
        return await self._run(self._client.live)

    async def ready(self) -> bool:
        """As `Client.ready`."""
        return await self._run(self._client.ready)

    async def wait_ready(self, timeout_s: float = 60.0) -> None:
        """As `Client.wait_ready`."""
        await self._run(lambda: self._client.wait_ready(timeout_s))

    async def close(self) -> None:
        """As `Client.close`."""
        await asyncio.to_thread(self._client.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"Async{self._client!r}"

    async def _run(self, function: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._client._spawn(function))
