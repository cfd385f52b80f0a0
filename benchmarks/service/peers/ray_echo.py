"""Ray Serve as its tutorial shows it: one deployment behind the default proxy."""

from __future__ import annotations

import logging
import signal
import sys

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from benchmarks.processes import print_ready


@serve.deployment
class Echo:
    async def __call__(self, request: Request) -> Response:
        return Response(await request.body(), media_type="application/octet-stream")


def main() -> None:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray.init(address="local", include_dashboard=False, configure_logging=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Echo.bind(), name="echo", route_prefix="/echo", blocking=False)  # type: ignore[attr-defined]
    print_ready()
    try:
        signal.pause()
    except KeyboardInterrupt:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


if __name__ == "__main__":
    main()
