"""The engine without a service, in a process of its own: what the service is compared with.

    python -m benchmarks.service.engine_process CODEC SIDE

Reads a number of seconds a line, discretizes for so long and writes `images/s batch`. It tries batches first and
keeps the best. uint8 in host memory to uint8 in host memory, as a request is.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch

from benchmarks.pictures import pictures
from dat_workers.discretizer import Discretizer
from dat_workers.engines.config import DEFAULT_ENGINE

BATCHES = (1, 4, 16)
CUDA_BATCHES = (8, 16, 32, 64, 128, 256)
TRIAL_S = 3.0


def images_per_s(discretizer: Discretizer, batch: np.ndarray, seconds: float) -> float:
    """Of whole calls, for at least so long."""
    began, images = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds:
        discretizer.discretize(batch)
        images += len(batch)
    return images / spent


def main() -> None:
    codec, side = sys.argv[1], int(sys.argv[2])
    discretizer = Discretizer.warm_from_store(codec, DEFAULT_ENGINE, side)  # with all cores, as a replica has them
    tried = CUDA_BATCHES if torch.cuda.is_available() else BATCHES
    batches = {size: pictures(size, side) for size in tried}
    for batch in batches.values():
        discretizer.discretize(batch)
    speeds = {size: images_per_s(discretizer, batch, TRIAL_S) for size, batch in batches.items()}
    best = max(speeds, key=speeds.__getitem__)
    print("ready", flush=True)
    for line in sys.stdin:
        print(images_per_s(discretizer, batches[best], float(line)), best, flush=True)


if __name__ == "__main__":
    main()
