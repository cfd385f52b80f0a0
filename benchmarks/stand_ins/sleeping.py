"""A stand-in for a codec on a GPU of its own: an engine that only sleeps. No codec at all.

    python -m benchmarks.stand_ins.sleeping --replicas 4 --sleep-ms 100 --port 8123

Everything but the engine is the real service on Ray Serve. The codec's name, as in `sleeping-stand-in-100ms`, says
what it is and how long a batch of up to 8 images takes.
"""

from __future__ import annotations

import argparse
import signal
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from dat_service.ray.replica import CodecReplica
from dat_service.settings import Settings
from dat_service.worker import CodecWorker
from dat_workers.codecs.spec import CodecSpec
from dat_workers.discretizer import Discretizer
from dat_workers.engines.base import Engine

if TYPE_CHECKING:
    from types import FrameType

BATCH = 8
NAME = "sleeping-stand-in-"


def name_of(sleep_ms: float) -> str:
    """The stand-in's name as a codec.

    >>> name_of(100)
    'sleeping-stand-in-100ms'
    """
    return f"{NAME}{sleep_ms:g}ms"


class SleepingEngine(Engine):
    """An Engine whose `encode` sleeps, however many images come; tokens are mean grey levels of 8 x 8 pixels."""

    name = "sleeping-stand-in"
    batch = BATCH

    def __init__(self, sleep_s: float) -> None:
        self.sleep_s = sleep_s

    def encode(self, images: Tensor) -> Tensor:
        time.sleep(self.sleep_s)
        return F.avg_pool2d(images.mean(1, keepdim=True), 8)[:, 0].mul(255).round().long()

    def decode(self, indices: Tensor, *, exact: bool = False) -> Tensor:
        grey = indices.float().div(255)[:, None].expand(-1, 3, -1, -1)
        return F.interpolate(grey, scale_factor=8)


class SleepingWorker(CodecWorker):
    def make(self) -> Discretizer:
        torch.set_num_threads(1)
        name = self.settings.codec
        sleep_s = float(name.removeprefix(NAME).removesuffix("ms")) / 1000
        spec = CodecSpec(name, ch=32, ch_mult=(1, 1, 1, 1), codebook_size=256, latent_dim=4)
        return Discretizer(spec, name, SleepingEngine(sleep_s))


class SleepingReplica(CodecReplica):
    def make_worker(self, settings: Settings) -> CodecWorker:
        from ray import serve

        return SleepingWorker(settings, replica=serve.get_replica_context().replica_id.unique_id)


def main() -> None:
    from benchmarks.stand_ins.sleeping import SleepingReplica
    from dat_service.ray.service import RayService

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, required=True)
    parser.add_argument("--sleep-ms", type=float, required=True, help="what a batch takes")
    parser.add_argument("--port", type=int, required=True)
    a = parser.parse_args()

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    service = RayService(
        Settings(codec=name_of(a.sleep_ms), port=a.port, replicas=a.replicas), replica_class=SleepingReplica
    )
    try:
        service.start()
        signal.signal(signal.SIGTERM, interrupt)
        print("ready", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        service.stop()


if __name__ == "__main__":
    main()
