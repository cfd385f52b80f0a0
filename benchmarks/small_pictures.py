"""Are small pictures as fast a pixel as large ones on this CPU, and how many of their tokens are wrong?

    python -m benchmarks.small_pictures --rounds 25
    python -m benchmarks.small_pictures --tokens 100000 SHARD...

The first line prints the pixel rate of the engine `cpu` for batches and for single pictures. All sizes take turns
(dat_service/bench/timing.py); the ratio to 224² is the median over the rounds. The second line counts the tokens of
crops of 32² and 64² that differ from a forward pass in fp64: those of the engine `cpu` and those of
taming-transformers' modules.
Results: benchmarks/results/small-pictures.md.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import cpu_name
from dat_service.bench.timing import ratio, time_in_turns
from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.codecs.store import load_model
from dat_workers.engines.base import Engine, rows_at_once
from dat_workers.engines.config import EngineConfig
from dat_workers.engines.factory import create
from dat_workers.images.crops import centre_crops

LARGE = 224
CASES = ((32, 128), (48, 64), (64, 32), (96, 16), (LARGE, 4), (32, 1), (64, 1), (LARGE, 1))  # side, pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", type=Path, help="shards, folders or pictures, to count tokens")
    parser.add_argument("--codec", default="tiny-f8")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=100_000, help="count at least so many tokens [100000]")
    arguments = parser.parse_args()
    model = load_model(arguments.codec)
    engine = create(EngineConfig("cpu", device="cpu"), model)
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    if arguments.sources:
        count_tokens(engine, model, arguments.sources, arguments.tokens)
    else:
        show_rates(engine, arguments.rounds)


def show_rates(engine: Engine, rounds: int) -> None:
    """Prints the pixel rate of each case, and its ratio to the rate at 224²."""

    def call(side: int, count: int) -> Callable[[], object]:
        images = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))
        return lambda: engine.decode(engine.encode(images))

    timings = time_in_turns(
        {f"{count} x {side}²": call(side, count) for side, count in CASES}, rounds=rounds, warmup=1
    )
    for side, count in CASES:
        timing = timings[f"{count} x {side}²"]
        relative = ratio(timing, timings[f"4 x {LARGE}²"])
        if relative is None:
            raise RuntimeError(f"{count} x {side}² was not measured: {timing.error}")
        share = (count * side**2) / (4 * LARGE**2)
        low, median, high = (share * times for times in (relative.low, relative.median, relative.high))
        rate = count * side**2 / timing.median / 1e6
        ms = 1e3 * timing.median
        times = f"{median:.2f} of 224² ({low:.2f} to {high:.2f})"
        print(f"{count:4} x {side}²: {ms:7.1f} ms, {rate:.3f} Mpixel/s, {times}")
    print(f"load {os.getloadavg()[0]:.1f} after the run")


def count_tokens(engine: Engine, model: VQGAN, sources: list[Path], least: int) -> None:
    """Prints how many tokens of at least `least`, half of them of 32² crops, differ from fp64."""
    photographs = centre_crops(sources, 128)
    exact = copy.deepcopy(model).double()
    reference = create(EngineConfig("reference", device="cpu"), model)
    for side in (32, 64):
        count = -(-least // 2 // (side // model.spec.factor) ** 2)
        images = torch.from_numpy(crops(photographs, side, count)).float().div_(255)
        expected = in_parts(lambda x: exact.encode(x.double() * 2 - 1), images, 1)
        ours = in_parts(engine.encode, images, rows_at_once(engine, side * side))
        theirs = in_parts(reference.encode, images, 1)
        wrong, wrong_reference = (int((tokens != expected).sum()) for tokens in (ours, theirs))
        print(
            f"{side}²: of {expected.numel()} tokens differ from fp64: {wrong} of the engine {engine.name}, "
            f"{wrong_reference} of taming-transformers' modules"
        )


def crops(photographs: np.ndarray, side: int, count: int) -> np.ndarray:
    """Returns `count` crops of `side` x `side`, at random places of photographs in turn."""
    rng = np.random.default_rng(0)
    places = rng.integers(0, photographs.shape[2] - side + 1, (count, 2))
    return np.stack(
        [photographs[i % len(photographs), :, y : y + side, x : x + side] for i, (y, x) in enumerate(places)]
    )


@torch.inference_mode()
def in_parts(compute: Callable[[Tensor], Tensor], images: Tensor, rows: int) -> Tensor:
    return torch.cat([compute(part) for part in torch.split(images, rows)])


if __name__ == "__main__":
    main()
