"""The client for asyncio: `AsyncClient` has the methods of `Client` as coroutines."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from dat_client.calls.profile import Profile
from dat_client.client import Client

P = ParamSpec("P")
T = TypeVar("T")


def _constructor(
    init: Callable[Concatenate[Client, P], None],
) -> Callable[[Callable[..., None]], Callable[Concatenate[AsyncClient, P], None]]:
    """Returns a decorator that gives a constructor the signature and docstring of Client's constructor."""
    return functools.wraps(init)


def _coroutine(
    method: Callable[Concatenate[Client, P], T],
) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]]:
    """Returns a coroutine that runs a method of Client in one of the client's threads."""
    # `_spawn` raises RuntimeError if the client is closed. A call that it accepted must finish even if the client
    # is closed while the call waits for a thread, so the thread runs the method without a second check.
    unchecked = inspect.unwrap(method)

    @functools.wraps(method)
    async def coroutine(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        call = functools.partial(unchecked, self._client, *args, **kwargs)
        return await asyncio.wrap_future(self._client._spawn(call))

    return coroutine


class AsyncClient:
    """Offers the methods of `Client` as coroutines, with the same arguments, results and exceptions.

        async with AsyncClient("http://codec:8000", codec="tiny-f8") as client:
            answers = await asyncio.gather(*(client.discretize(batch) for batch in batches))

    There is no `submit`, because `asyncio.gather` runs many calls at the same time. Every call runs in one of the
    `max_connections` threads of a Client. A call that is cancelled while it waits for a thread is never sent. A
    call that is cancelled later still runs to its end in the thread, and its answer is discarded.
    """

    @_constructor(Client.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._client = Client(*args, **kwargs)

    discretize = _coroutine(Client.discretize)
    decode = _coroutine(Client.decode)

    def profile(self) -> AbstractContextManager[Profile]:
        """Measures calls as `Client.profile` does. Enter it with `with`, not `async with`."""
        return self._client.profile()

    metadata = _coroutine(Client.metadata)
    server_metadata = _coroutine(Client.server_metadata)
    live = _coroutine(Client.live)
    ready = _coroutine(Client.ready)
    wait_ready = _coroutine(Client.wait_ready)

    async def close(self) -> None:
        """Closes the client as `Client.close` does, without blocking the event loop."""
        await asyncio.to_thread(self._client.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"Async{self._client!r}"
