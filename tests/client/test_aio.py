from __future__ import annotations

import asyncio
import inspect

import numpy as np
import pytest

from dat_client import AsyncClient, Client, InvalidRequest, UnknownCodec


def test_gather_gives_every_call_its_own_answer(server):
    async def main() -> None:
        async with AsyncClient(server.url, max_connections=4) as client:
            batches = [np.full((1, 3, 8, 8 + n), n, np.uint8) for n in range(30)]
            answers = await asyncio.gather(*(client.discretize(batch) for batch in batches))
            assert all(np.array_equal(q.reconstruction, x) for q, x in zip(answers, batches, strict=True))

    asyncio.run(main())
    assert server.connections <= 4


def test_every_method(server, images):
    async def main() -> None:
        async with AsyncClient(server.url) as client:
            assert (await client.metadata())["name"] == "tiny-f8"
            assert (await client.server_metadata())["name"] == "loopback"
            assert await client.live()
            assert await client.ready()
            await client.wait_ready(10)
            q = await client.discretize(images, outputs=["indices"], output_dtype="FP16", timeout_s=10, seed=5)
            assert q.indices.shape == (4, 2, 3)
            assert (await client.decode(q.indices, output_dtype="UINT8", timeout_s=10)).shape == images.shape
            assert repr(client).startswith("AsyncClient('http://127.0.0.1")

    asyncio.run(main())
    assert server.requests[0].parameters == {"output_dtype": "FP16", "seed": 5}


def test_exceptions_arrive(server, images):
    async def main() -> None:
        async with AsyncClient(server.url, codec="none") as client:
            with pytest.raises(InvalidRequest, match="single image"):
                await client.discretize(images[0])
            with pytest.raises(UnknownCodec):
                await client.discretize(images)

    asyncio.run(main())


def test_a_cancelled_call_leaves_the_client_whole(server, images):
    async def main() -> None:
        async with AsyncClient(server.url, max_connections=1) as client:
            server.faults.append("gate")
            running = asyncio.create_task(client.discretize(images))
            await asyncio.to_thread(server.entered.acquire, timeout=10)
            waiting = asyncio.create_task(client.discretize(images))
            await asyncio.sleep(0)
            for task in (running, waiting):
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            server.release.set()
            assert np.array_equal((await client.discretize(images)).reconstruction, images)

    asyncio.run(main())
    assert len(server.requests) == 2  # the waiting one was never sent


def test_close_lets_calls_that_wait_finish(server, images):
    async def main() -> None:
        client = AsyncClient(server.url, max_connections=1)
        server.faults.append("gate")
        tokens = np.zeros((1, 2, 2), int)
        calls = [client.discretize(images), client.discretize(images), client.decode(tokens)]
        tasks = [asyncio.create_task(call) for call in calls]
        await asyncio.to_thread(server.entered.acquire, timeout=10)
        closing = asyncio.create_task(client.close())
        assert await asyncio.to_thread(client._client._closed.wait, 10)
        server.release.set()
        first, second, pictures = await asyncio.gather(*tasks)
        assert np.array_equal(first.reconstruction, second.reconstruction)
        assert pictures.shape == (1, 3, 16, 16)
        await closing
        with pytest.raises(RuntimeError, match="closed"):
            await client.discretize(images)

    asyncio.run(main())


def parameters(function: object) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())  # type: ignore[arg-type]


def test_both_clients_have_the_same_methods_and_arguments():
    methods = [name for name in vars(Client) if not name.startswith("_") and name != "submit"]
    assert methods == [name for name in vars(AsyncClient) if not name.startswith("_")]
    for name in [*methods, "__init__"]:
        assert parameters(getattr(Client, name)) == parameters(getattr(AsyncClient, name)), name
