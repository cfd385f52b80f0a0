"""A stand-in for codecs on remote GPUs: the real app over a discretizer that copies and sleeps. No codec at all.

    python benchmarks/sleeping_codec.py --port 8123 --sleep-s 0.2 --workers 4

`--workers` requests sleep at the same time, as on so many GPUs. Serves the codec name `identity`.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dat_client import Client


@contextlib.contextmanager
def sleeping_codec(sleep_s: float, workers: int) -> Iterator[str]:
    """The address of such a server, in a process of its own that ends with the block."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, __file__, "--port", str(port), "--sleep-s", str(sleep_s), "--workers", str(workers)]
    process = subprocess.Popen(command)
    try:
        with Client(f"http://127.0.0.1:{port}", "identity") as client:
            client.wait_ready(60)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    import uvicorn

    from dat_service.http.app import create_app
    from dat_service.settings import Settings
    from dat_service.worker import CodecWorker
    from dat_workers.discretizer import Discretizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--sleep-s", type=float, required=True, help="seconds that a request sleeps")
    parser.add_argument("--workers", type=int, default=1, help="requests that sleep at the same time")
    arguments = parser.parse_args()

    class SleepingDiscretizer(Discretizer):
        def discretize(self, *images: Any, **options: Any) -> dict[str, Any]:
            time.sleep(arguments.sleep_s)
            return super().discretize(*images, **options)

    class SleepingWorker(CodecWorker):
        def load(self) -> None:
            identity = Discretizer.from_store("identity")
            self.discretizer = SleepingDiscretizer(identity.spec, identity.fingerprint, identity.engine)
            self._thread = ThreadPoolExecutor(arguments.workers)

    worker = SleepingWorker(Settings(codec="identity", port=arguments.port, max_requests=64))
    worker.load()
    uvicorn.run(create_app(worker), port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
