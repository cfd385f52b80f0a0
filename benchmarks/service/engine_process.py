"""The engine without a service, in a process of its own, for comparison with the service.

    python -m benchmarks.service.engine_process CODEC SIDE

It first finds out which batch is fastest. Then it reads a number of seconds from each line of stdin, discretizes
that batch for so long, and prints `images/s batch`: uint8 images in host memory to uint8 images in host memory, as
in a request.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch

from benchmarks.pictures import shifted_photographs
from benchmarks.processes import print_ready
from dat_workers.discretizer import Discretizer
from dat_workers.engines.config import DEFAULT_ENGINE

BATCHES = (1, 4, 16)
CUDA_BATCHES = (8, 16, 32, 64, 128, 256)
TRIAL_S = 3.0


def images_per_s(discretizer: Discretizer, batch: np.ndarray, seconds: float) -> float:
    """Returns the speed over whole calls that last at least so many seconds together."""
    started, images = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds:
        discretizer.discretize(batch)
        images += len(batch)
    return images / elapsed


def main() -> None:
    codec, side = sys.argv[1], int(sys.argv[2])
    discretizer = Discretizer.warm_from_store(codec, DEFAULT_ENGINE, side)  # with all cores, as a replica has them
    sizes = CUDA_BATCHES if torch.cuda.is_available() else BATCHES
    batches = {size: shifted_photographs(size, side) for size in sizes}
    for batch in batches.values():
        discretizer.discretize(batch)
    speeds = {size: images_per_s(discretizer, batch, TRIAL_S) for size, batch in batches.items()}
    best = max(speeds, key=speeds.__getitem__)
    print_ready()
    for line in sys.stdin:
        print(images_per_s(discretizer, batches[best], float(line)), best, flush=True)


if __name__ == "__main__":
    main()
