"""Where does the time of a trainer's call go: client, network, queue, codec, the rest of the server?

    dat bench client --url http://codec:8000 --codec tiny-f8 --batch 128 --size 224 --calls 20

Calls of random uint8 images, one after the other (or `--in-flight` at once), split by the Server-Timing of the
answers: `Client.profile`.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np

from dat_client import Client, DatError, Discretized

WARM_UP = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="dat bench client", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="http://host:port")
    parser.add_argument("--codec", default="tiny-f8")
    parser.add_argument("--batch", type=int, default=128, help="images a call")
    parser.add_argument("--size", type=int, default=224, help="side of an image in pixels")
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--in-flight", type=int, default=1, help="calls at once")
    parser.add_argument("--parts", type=int, default=1, help="requests a call, the client's max_in_flight")
    parser.add_argument("--gradients", choices=("none", "FP16", "FP32", "INT8"), default="none")
    parser.add_argument("--timeout-s", type=float, default=300.0)
    parser.add_argument("--api-key", default=None)
    flags = parser.parse_args(argv)
    for name in ("batch", "size", "calls", "in_flight", "parts"):
        if getattr(flags, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: must be 1 or more, got {getattr(flags, name)}")
    try:
        print(measured(flags))
    except (DatError, ImportError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    return 0


def measured(flags: argparse.Namespace) -> str:
    """The table of `Client.profile` over the calls that the flags ask for."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (flags.batch, 3, flags.size, flags.size), np.uint8)
    options = {}
    if flags.gradients != "none":
        gradients = rng.normal(size=images.shape).astype(np.float32)
        options = {"gradients": gradients, "gradient_dtype": flags.gradients}
    with Client(
        flags.url,
        flags.codec,
        timeout_s=flags.timeout_s,
        max_in_flight=flags.parts,
        max_connections=max(8, flags.in_flight * flags.parts),
        api_key=flags.api_key,
    ) as client:
        client.wait_ready(flags.timeout_s)
        for _ in range(WARM_UP):
            client.discretize(images, **options)
        waiting: deque[Future[Discretized]] = deque()
        with client.profile() as profile:
            for _ in range(flags.calls):
                if len(waiting) == flags.in_flight:
                    waiting.popleft().result()
                waiting.append(client.submit(images, **options))
            while waiting:
                waiting.popleft().result()
    shape = f"{flags.batch} x 3 x {flags.size} x {flags.size} uint8"
    return f"{flags.url}, {flags.codec}, {shape}, gradients {flags.gradients}\n{profile}"
