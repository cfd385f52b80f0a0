"""Part `bytes`: 128 images of 224 x 224 uint8 there and back, through `identity` and through echo servers.

All servers are up at the same time, but only one is busy. MB/s are the 19.3 MB of the images over the time of the
whole call, so they count the bytes of one direction, although both directions are travelled.
"""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.latency import alternate_calls
from benchmarks.processes import clean_environment, dat_serve
from benchmarks.service.peers.socket_echo import LENGTH
from dat_client import Client
from dat_client.transports.connections import Connections
from dat_service.bench.timing import ratio, time_in_turns
from dat_service.launch import StartFailed, running_process
from dat_service.ports import free_port
from dat_workers.errors import one_line

Images = np.ndarray[Any, np.dtype[np.uint8]]
Call = Callable[[], object]

CEILING, FASTAPI, RAY, LITSERVE = "raw socket echo", "FastAPI + uvicorn", "Ray Serve, default proxy", "LitServe"
LOCAL, SERVE, TRITON = "dat serve --local, Client", "dat serve, Client", "dat serve, tritonclient"
TARGETS = {FASTAPI: 0.95, RAY: 3.0, CEILING: 0.5}  # least speed of `dat serve`, as a multiple of the peer's
TAIL_TARGET = 2.0  # largest p99 over the median
CALL_TIMEOUT_S = 60.0


def run(
    rounds: int, report: Callable[[str], None], *, images: int = 128, side: int = 224, tail_calls: int = 300
) -> dict[str, Any]:
    """Times every contestant, and single calls of `dat serve` and of FastAPI.

    Peers that do not start are left out. Raises RuntimeError if `dat serve` fails.
    """
    batch = np.random.default_rng(0).integers(0, 256, (images, 3, side, side), np.uint8)
    left_out: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        calls: dict[str, Call] = {}
        report("bytes: starting dat serve, on Ray and --local")
        served = stack.enter_context(dat_serve("--codec", "identity")).url
        local = stack.enter_context(dat_serve("--codec", "identity", "--local")).url
        calls[SERVE] = stack.enter_context(dat_client_call(served, batch))
        calls[LOCAL] = stack.enter_context(dat_client_call(local, batch))
        for name, start in (PEERS | {TRITON: lambda batch: triton_call(served, batch)}).items():
            report(f"bytes: starting {name}")
            try:
                calls[name] = stack.enter_context(start(batch))
            except (StartFailed, ImportError) as error:
                left_out[name] = one_line(error)
                report(f"bytes: {name} is left out: {one_line(error)}")
        report(f"bytes: {rounds} rounds of {len(calls)} contestants")
        timings = time_in_turns(calls, rounds=rounds, warmup=5, least_s=0.5)
        if timings[SERVE].error:
            raise RuntimeError(f"{SERVE}: {timings[SERVE].error}")
        report(f"bytes: {tail_calls} single calls each")
        tails = alternate_calls({name: calls[name] for name in (SERVE, FASTAPI) if name in calls}, tail_calls)
    rows = []
    for name, timing in timings.items():
        row: dict[str, Any] = {"contestant": name}
        if timing.error:
            row["error"] = timing.error
        else:
            row |= {
                "median_s": timing.median,
                "mb_per_s": batch.nbytes / timing.median / 1e6,
                "rounds_s": list(timing.seconds),
            }
            if name in tails:
                row["tail"] = tails[name]
            if (times := ratio(timings[SERVE], timing)) and name != SERVE:
                row["ours_times"] = vars(times)
        rows.append(row)
    return {
        "part": "bytes",
        "bytes": batch.nbytes,
        "images": images,
        "side": side,
        "left_out": left_out,
        "results": rows,
    }


@contextlib.contextmanager
def socket_call(batch: Images) -> Iterator[Call]:
    """Yields a call through plain sockets; both ends use one buffer again and again."""
    with peer("socket_echo") as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sent, back = batch.data.cast("B"), memoryview(bytearray(batch.nbytes))

        def call() -> memoryview:
            connection.sendall(LENGTH.pack(len(sent)))
            connection.sendall(sent)
            received = 0
            while received < len(back):
                count = connection.recv_into(back[received:])
                if not count:
                    raise ConnectionError("the echo server has ended")
                received += count
            return back

        yield checked(call, batch)


@contextlib.contextmanager
def http_call(module: str, batch: Images, *, as_json: bool = False, **env: str) -> Iterator[Call]:
    """Yields a call of a peer over HTTP.

    It uses the connections under `Client`, so that servers are compared and not clients.
    """
    body: list[bytes | memoryview] = [batch.data.cast("B")]
    headers = {"Content-Type": "application/octet-stream"}
    if as_json:  # encoded once and not in every call, in the peer's favour
        body = [json.dumps({"body": base64.b64encode(batch.tobytes()).decode()}).encode()]
        headers = {"Content-Type": "application/json"}
    with peer(module, **env) as port:
        connections = Connections(f"http://127.0.0.1:{port}", connect_timeout_s=5, limit=1)
        headers["Content-Length"] = str(sum(map(len, body)))
        most_bytes = 2 * batch.nbytes + 1000  # base64 adds a third

        def call() -> memoryview:
            deadline = time.monotonic() + CALL_TIMEOUT_S
            reply = connections.request("POST", "/echo", headers, body, deadline, most_bytes)
            if reply.status != 200:
                raise RuntimeError(f"status {reply.status}: {bytes(reply.body[:200])!r}")
            return memoryview(reply.body)

        try:
            yield checked(call, batch)
        finally:
            connections.close()


@contextlib.contextmanager
def dat_client_call(url: str, batch: Images) -> Iterator[Call]:
    """Yields a call of this project's service by its own client."""
    with Client(url, "identity") as client:

        def call() -> memoryview:
            reconstruction: Images | None = client.discretize(batch).reconstruction
            assert reconstruction is not None
            return reconstruction.data.cast("B")

        yield checked(call, batch)


@contextlib.contextmanager
def triton_call(url: str, batch: Images) -> Iterator[Call]:
    """Yields a call of the same service by Triton's own client."""
    import tritonclient.http as triton_http

    client = triton_http.InferenceServerClient(
        url.removeprefix("http://"), network_timeout=CALL_TIMEOUT_S, connection_timeout=CALL_TIMEOUT_S
    )
    tensor = triton_http.InferInput("images", list(batch.shape), "UINT8")
    output = triton_http.InferRequestedOutput("reconstruction", binary_data=True)

    def call() -> memoryview:
        tensor.set_data_from_numpy(batch)  # joins and copies: its users pay for this with each new batch
        reconstruction: Images = client.infer("identity", [tensor], outputs=[output]).as_numpy("reconstruction")
        return reconstruction.data.cast("B")

    try:
        yield checked(call, batch)
    finally:
        client.close()


@contextlib.contextmanager
def peer(module: str, **env: str) -> Iterator[int]:
    """Runs `benchmarks.service.peers.<module>` in a process of its own and yields its port."""
    port = free_port()
    command = [sys.executable, "-m", f"benchmarks.service.peers.{module}", str(port)]
    with running_process(command, env=clean_environment(env)):
        yield port


def checked(call: Callable[[], memoryview], batch: Images) -> Call:
    """Returns `call` after it has brought the same bytes back. Raises RuntimeError for other bytes."""
    if bytes(call()) != batch.tobytes():
        raise RuntimeError("the server sent other bytes back than it received")
    return call


PEERS: dict[str, Callable[[Images], contextlib.AbstractContextManager[Call]]] = {
    CEILING: socket_call,
    FASTAPI: lambda batch: http_call("fastapi_echo", batch),
    # without it Ray starts its workers with less priority, which would count against the peer
    RAY: lambda batch: http_call("ray_echo", batch, RAY_worker_niceness="0"),
    LITSERVE: lambda batch: http_call("litserve_echo", batch, as_json=True),
}
