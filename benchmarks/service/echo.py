"""Part `bytes`: 128 images of 224 x 224 uint8 there and back, through `identity` and through echoes.

All servers are up at the same time, idle but for the one whose turn it is. MB/s are the 19.3 MB of the images over
the time of the whole call: one way's bytes, though both ways are made.
"""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from benchmarks.processes import clean_environment, dat_serve
from benchmarks.service.peers.socket_echo import LENGTH
from dat_client import Client
from dat_client.transports.connections import Connections
from dat_service.launch import StartFailed, running_process
from dat_service.ports import free_port
from dat_workers.system.timing import one_line, ratio, time_in_turns

Images = np.ndarray[Any, np.dtype[np.uint8]]
Call = Callable[[], object]
Say = Callable[[str], None]

CEILING, FASTAPI, RAY, LITSERVE = "raw socket echo", "FastAPI + uvicorn", "Ray Serve, default proxy", "LitServe"
LOCAL, SERVE, TRITON = "dat serve --local, Client", "dat serve, Client", "dat serve, tritonclient"
BARS = {FASTAPI: 0.95, RAY: 3.0, CEILING: 0.5}  # what dat serve must be at least, as times the other's speed
TAIL_BAR = 2.0  # p99 over the median
TAIL_BLOCK = 25
WITHIN_S = 60.0


def run(rounds: int, say: Say, *, images: int = 128, side: int = 224, tail_calls: int = 300) -> dict[str, Any]:
    """Times every contestant, and the tail of `dat serve` and of FastAPI. Raises where ours does not run."""
    batch = np.random.default_rng(0).integers(0, 256, (images, 3, side, side), np.uint8)
    out: dict[str, Any] = {"part": "bytes", "bytes": batch.nbytes, "images": images, "side": side, "left_out": {}}
    with contextlib.ExitStack() as stack:
        calls: dict[str, Call] = {}
        say("bytes: starting dat serve, on Ray and --local")
        served = stack.enter_context(dat_serve("--codec", "identity")).url
        local = stack.enter_context(dat_serve("--codec", "identity", "--local")).url
        calls[SERVE] = stack.enter_context(ours(served, batch))
        calls[LOCAL] = stack.enter_context(ours(local, batch))
        others = PEERS | {TRITON: lambda batch: triton(served, batch)}
        for name, start in others.items():
            say(f"bytes: starting {name}")
            try:
                calls[name] = stack.enter_context(start(batch))
            except (StartFailed, ImportError) as error:
                out["left_out"][name] = one_line(error)
                say(f"bytes: {name} is left out: {one_line(error)}")
        say(f"bytes: {rounds} rounds of {len(calls)} contestants")
        timings = time_in_turns(calls, rounds=rounds, warmup=5, least_s=0.5)
        if timings[SERVE].error:
            raise RuntimeError(f"{SERVE}: {timings[SERVE].error}")
        say(f"bytes: {tail_calls} calls each for the tail")
        tails = tail({name: calls[name] for name in (SERVE, FASTAPI) if name in calls}, tail_calls)
    out["results"] = []
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
                row["ours_times"] = {"median": times.median, "low": times.low, "high": times.high}
        out["results"].append(row)
    return out


def tail(calls: Mapping[str, Call], number: int) -> dict[str, dict[str, float]]:
    """Median and 99th percentile of single calls, the contestants alternating in blocks."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    while any(len(taken) < number for taken in seconds.values()):
        for name, call in calls.items():
            for _ in range(min(TAIL_BLOCK, number)):
                began = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - began)
    return {name: percentiles(taken) for name, taken in seconds.items()}


def percentiles(seconds: list[float]) -> dict[str, float]:
    """`calls`, `median_s`, `p99_s`, `longest_s` of call times, and p99 over the median."""
    ordered = sorted(seconds)
    median = statistics.median(ordered)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {
        "calls": len(ordered),
        "median_s": median,
        "p99_s": p99,
        "longest_s": ordered[-1],
        "p99_over_median": p99 / median,
    }


@contextlib.contextmanager
def socket_echo(batch: Images) -> Iterator[Call]:
    """Both ends with one buffer each that is used again and again."""
    with peer("socket_echo") as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sent, back = batch.data.cast("B"), memoryview(bytearray(batch.nbytes))

        def call() -> memoryview:
            connection.sendall(LENGTH.pack(len(sent)))
            connection.sendall(sent)
            at = 0
            while at < len(back):
                read = connection.recv_into(back[at:])
                if not read:
                    raise ConnectionError("the echo has ended")
                at += read
            return back

        yield checked(call, batch)


@contextlib.contextmanager
def http_echo(module: str, batch: Images, *, as_json: bool = False, **env: str) -> Iterator[Call]:
    """A peer over HTTP. The client is what lies under `Client`, so that it is the server that is compared."""
    body: list[bytes | memoryview] = [batch.data.cast("B")]
    headers = {"Content-Type": "application/octet-stream"}
    if as_json:  # encoded once and not in every call, in the peer's favour
        body = [json.dumps({"body": base64.b64encode(batch.tobytes()).decode()}).encode()]
        headers = {"Content-Type": "application/json"}
    with peer(module, **env) as port:
        connections = Connections(f"http://127.0.0.1:{port}", connect_timeout_s=5, limit=1)
        headers["Content-Length"] = str(sum(map(len, body)))

        def call() -> memoryview:
            reply = connections.request("POST", "/echo", headers, body, time.monotonic() + WITHIN_S)
            if reply.status != 200:
                raise RuntimeError(f"status {reply.status}: {bytes(reply.body[:200])!r}")
            return memoryview(reply.body)

        try:
            yield checked(call, batch)
        finally:
            connections.close()


@contextlib.contextmanager
def ours(url: str, batch: Images) -> Iterator[Call]:
    with Client(url, "identity") as client:

        def call() -> memoryview:
            answer: Images | None = client.discretize(batch).reconstruction
            assert answer is not None
            return answer.data.cast("B")

        yield checked(call, batch)


@contextlib.contextmanager
def triton(url: str, batch: Images) -> Iterator[Call]:
    """Triton's own client on the service that `Client` talks to, in turn with it."""
    import tritonclient.http as triton_http

    client = triton_http.InferenceServerClient(
        url.removeprefix("http://"), network_timeout=WITHIN_S, connection_timeout=WITHIN_S
    )
    tensor = triton_http.InferInput("images", list(batch.shape), "UINT8")
    wanted = triton_http.InferRequestedOutput("reconstruction", binary_data=True)

    def call() -> memoryview:
        tensor.set_data_from_numpy(batch)  # joins and copies: what a user of it pays for each new batch
        answer: Images = client.infer("identity", [tensor], outputs=[wanted]).as_numpy("reconstruction")
        return answer.data.cast("B")

    try:
        yield checked(call, batch)
    finally:
        client.close()


@contextlib.contextmanager
def peer(module: str, **env: str) -> Iterator[int]:
    """The port of `benchmarks.service.peers.<module>`, in a process of its own."""
    port = free_port()
    command = [sys.executable, "-m", f"benchmarks.service.peers.{module}", str(port)]
    with running_process(command, env=clean_environment(env)):
        yield port


def checked(call: Callable[[], memoryview], batch: Images) -> Call:
    """`call`, once it has been seen to bring the same bytes back."""
    if bytes(call()) != batch.tobytes():
        raise RuntimeError("what came back are other bytes")
    return call


PEERS: dict[str, Callable[[Images], contextlib.AbstractContextManager[Call]]] = {
    CEILING: socket_echo,
    FASTAPI: lambda batch: http_echo("fastapi_echo", batch),
    # without it Ray starts its workers with less priority, which would count against the peer
    RAY: lambda batch: http_echo("ray_echo", batch, RAY_worker_niceness="0"),
    LITSERVE: lambda batch: http_echo("litserve_echo", batch, as_json=True),
}
