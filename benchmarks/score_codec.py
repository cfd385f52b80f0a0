"""How good is a codec on pictures it never saw, and how fast is it here?

    python benchmarks/score_codec.py tiny-f8 SHARD...

It prints the PSNR of Q(x) over centre crops, the share of the codebook that those crops use, and the images/s of
`Discretizer.discretize` with uint8 in and out, in batches of 16: median, lowest and highest of the rounds.
Results: docs/tiny-f8.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from benchmarks.tables import rate
from dat_service.bench.timing import time_in_turns
from dat_workers.discretizer import Discretizer
from dat_workers.engines.config import EngineConfig
from dat_workers.images.crops import centre_crops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codec")
    parser.add_argument("sources", nargs="+", type=Path, help="shards, folders or pictures")
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--engine", default="torch")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    x = centre_crops(arguments.sources, arguments.crop)
    discretizer = Discretizer.from_store(
        arguments.codec, EngineConfig(arguments.engine, arguments.device, arguments.dtype)
    )
    q = discretizer.discretize(x, outputs=("reconstruction", "indices"))
    mse = np.square(x.astype(np.float64) - q["reconstruction"]).reshape(len(x), -1).mean(1)
    psnr = 10 * np.log10(255**2 / np.maximum(mse, 1e-10))
    used_entries, entries = len(np.unique(q["indices"])), discretizer.spec.codebook_size
    print(f"{arguments.codec}, fingerprint {discretizer.fingerprint[:12]}, {discretizer.engine.describe()}")
    print(f"{len(x)} centre crops of {arguments.crop} x {arguments.crop}")
    print(f"PSNR mean {psnr.mean():.2f} dB, median {np.median(psnr):.2f}, lowest {psnr.min():.2f}")
    print(f"codebook: {used_entries} of {entries} entries in use, {used_entries / entries:.1%}")
    batch = x[:16]
    timing = time_in_turns({"": lambda: discretizer.discretize(batch)}, rounds=arguments.rounds, warmup=1)[""]
    speeds = [len(batch) / seconds for seconds in timing.seconds]
    print(f"speed: {rate(speeds)} images/s over {len(speeds)} rounds, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
