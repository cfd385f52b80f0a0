"""A stand-in for a codec on GPUs of its own: an engine that only sleeps, so that the cores are left to the service.

    python -m benchmarks.stand_ins.sleeping --ms-per-image 12.5 --port 8123 --replicas 4        # on Ray Serve
    python -m benchmarks.stand_ins.sleeping --ms-per-image 12.5 --port 8123 --local --gpus 8    # in one process

Everything but the engine is the real service. The name of the codec, as in `sleeping-stand-in-12.5ms`, tells for
how long it sleeps for each image.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.processes import clean_environment, print_ready, print_ready_once_open
from dat_client import Client
from dat_service.launch import running_process
from dat_service.ports import free_port
from dat_service.ray.replica import CodecReplica
from dat_service.settings import Settings
from dat_service.worker import CodecWorker
from dat_workers.batching.batcher import Batcher
from dat_workers.batching.parts import Result
from dat_workers.codecs.spec import CodecSpec
from dat_workers.discretizer import Discretizer
from dat_workers.engines.base import Engine

if TYPE_CHECKING:
    from types import FrameType

BATCH = 8
NAME = "sleeping-stand-in-"


def name_of(ms_per_image: float) -> str:
    """Returns the name under which the stand-in is served.

    >>> name_of(12.5)
    'sleeping-stand-in-12.5ms'
    """
    return f"{NAME}{ms_per_image:g}ms"


class SleepingEngine(Engine):
    """Sleeps in `decode`, so once for every image that a request asks for, plain or adversarial.

    Its tokens are the mean grey levels of 8 x 8 pixels.
    """

    name = "sleeping-stand-in"
    batch = BATCH

    def __init__(self, seconds_per_image: float) -> None:
        self.seconds_per_image = seconds_per_image

    def encode(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images.mean(1, keepdim=True), 8)[:, 0].mul(255).round().long()

    def decode(self, indices: Tensor, *, exact: bool = False) -> Tensor:
        time.sleep(self.seconds_per_image * len(indices))
        grey = indices.float().div(255)[:, None].expand(-1, 3, -1, -1)
        return F.interpolate(grey, scale_factor=8)


class ManyGpus(Batcher):
    """As many batchers as there are GPUs, which take the requests in turn."""

    def __init__(self, gpus: int, *, max_queue_s: float) -> None:
        super().__init__(max_queue_s=max_queue_s)
        self._others = [Batcher(max_queue_s=max_queue_s) for _ in range(gpus - 1)]
        self._turns = itertools.cycle([self, *self._others])

    def start(self, make: Callable[[], Discretizer]) -> Discretizer:
        for batcher in self._others:
            batcher.start(make)
        return super().start(make)

    def submit(self, *arguments: Any, **options: Any) -> Future[Result]:
        batcher = next(self._turns)
        if batcher is not self:
            return batcher.submit(*arguments, **options)
        return super().submit(*arguments, **options)

    def stop(self) -> None:
        for batcher in self._others:
            batcher.stop()
        super().stop()


class SleepingWorker(CodecWorker):
    """A worker around the sleeping engine, or around one for each of `gpus`."""

    def __init__(self, settings: Settings, replica: str = "local", gpus: int = 1) -> None:
        super().__init__(settings, replica)
        self.batcher = ManyGpus(gpus, max_queue_s=settings.max_queue_s)

    def make(self) -> Discretizer:
        torch.set_num_threads(1)
        name = self.settings.codec
        seconds_per_image = float(name.removeprefix(NAME).removesuffix("ms")) / 1000
        spec = CodecSpec(name, ch=32, ch_mult=(1, 1, 1, 1), codebook_size=256, latent_dim=4)
        return Discretizer(spec, name, SleepingEngine(seconds_per_image))


class SleepingReplica(CodecReplica):
    """A Ray Serve replica of the stand-in."""

    def make_worker(self, settings: Settings) -> CodecWorker:
        from ray import serve

        return SleepingWorker(settings, replica=serve.get_replica_context().replica_id.unique_id)


@contextlib.contextmanager
def sleeping_service(ms_per_image: float, *, replicas: int = 1, gpus: int | None = None) -> Iterator[str]:
    """Yields the address of a stand-in: `replicas` of it on Ray Serve, or one process with so many `gpus`."""
    port = free_port()
    command = [
        sys.executable, "-m", "benchmarks.stand_ins.sleeping", "--port", str(port),
        "--ms-per-image", f"{ms_per_image:g}", "--replicas", str(replicas),
        *(["--local", "--gpus", str(gpus)] if gpus else []),
    ]  # fmt: skip
    with running_process(command, f"http://127.0.0.1:{port}", env=clean_environment()) as service:
        with Client(service.url, name_of(ms_per_image)) as client:
            client.wait_ready(120)
        yield service.url


def serve_in_this_process(settings: Settings, gpus: int) -> None:
    """Serves until it is interrupted, without Ray."""
    import uvicorn

    from dat_service.http.app import create_app

    worker = SleepingWorker(settings, gpus=gpus)
    worker.load()
    print_ready_once_open(settings.port)
    uvicorn.run(create_app(worker), port=settings.port, log_level="warning")


def serve_on_ray(settings: Settings) -> None:
    """Serves until it is interrupted, on a Ray of its own."""
    # By this name, for in the replicas' processes there is no `__main__` of this kind.
    from benchmarks.stand_ins.sleeping import SleepingReplica
    from dat_service.ray.service import RayService

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    service = RayService(settings, replica_class=SleepingReplica)
    try:
        service.start()
        signal.signal(signal.SIGTERM, interrupt)
        print_ready()
        signal.pause()
    finally:
        service.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ms-per-image", type=float, required=True, help="milliseconds of sleep for each image")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--replicas", type=int, default=1, help="replicas on Ray Serve")
    parser.add_argument("--local", action="store_true", help="serve in one process, without Ray")
    parser.add_argument("--gpus", type=int, default=1, help="requests that sleep at the same time, with --local")
    arguments = parser.parse_args()
    settings = Settings(codec=name_of(arguments.ms_per_image), port=arguments.port, replicas=arguments.replicas)
    with contextlib.suppress(KeyboardInterrupt):
        if arguments.local:
            serve_in_this_process(settings, arguments.gpus)
        else:
            serve_on_ray(settings)


if __name__ == "__main__":
    main()
