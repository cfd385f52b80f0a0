"""How many images per second does each engine of this machine discretize, and are the tokens the right ones?

    dat bench codec --codec tiny-f8 --batch 16

Every engine and dtype discretizes the same batch, uint8 images in host memory to uint8 images in host memory as a
replica of the service does, in turn with all others. They are compared with the engine `reference`, which runs
taming-transformers' own modules. `python -m benchmarks.codec` also measures the peers and how near the chip's peak
they all come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dat_service.bench.timing import Timing, ratio, time_in_turns
from dat_workers.codecs.store import CodecStore, load_model
from dat_workers.discretizer import Discretizer
from dat_workers.engines.config import EngineConfig
from dat_workers.engines.factory import create, engine_dtype_pairs, pick_device
from dat_workers.errors import InvalidInput, one_line
from dat_workers.images.crops import sample_crops

REFERENCE = "reference fp32"
PHOTOGRAPHS = 16  # distinct ones; larger batches repeat them


@dataclass(frozen=True)
class Row:
    """The result of one engine and dtype, or why it could not be measured."""

    engine: str  # with its dtype, as "torch fp32"
    images_per_s: tuple[float, ...] = ()  # of each round
    times_reference: float | None = None  # how many times as fast as the reference, median of the rounds
    token_agreement: float | None = None  # share of tokens that equal the reference's
    error: str | None = None


def choose_engines(device: torch.device, engines: Sequence[str], dtypes: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the (engine, dtype) pairs of that name, or all; half precision on a CPU is slow and must be named.

    Raises InvalidInput if the names fit no pair of this device.
    """
    cuda = device.type == "cuda"
    pairs = [("reference", "fp32"), *engine_dtype_pairs(cuda)]
    if not engines and not dtypes:
        return [(engine, dtype) for engine, dtype in pairs if cuda or dtype == "fp32"]
    chosen = [pair for pair in pairs if (not engines or pair[0] in engines) and (not dtypes or pair[1] in dtypes)]
    if not chosen:
        possible = ", ".join(f"{engine} {dtype}" for engine, dtype in pairs)
        raise InvalidInput("engine and dtype", " ".join((*engines, *dtypes)), f"any of {possible}")
    return chosen


def measure(
    codec: str,
    pairs: Sequence[tuple[str, str]],
    *,
    batch: int,
    size: int,
    device: str = "auto",
    pictures: Sequence[Path] | None = None,
    rounds: int = 5,
    report: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Measures every pair on a batch of `batch` centre crops, size x size, of the pictures.

    Without pictures it takes the photographs inside scikit-image. Raises CodecError for an unknown codec,
    InvalidInput for unreadable pictures, and RuntimeError if scikit-image is needed and missing.
    """
    crops = sample_crops(pictures, size, min(batch, PHOTOGRAPHS))
    images = np.resize(crops, (batch, *crops.shape[1:]))
    file = CodecStore().load(codec)
    discretizers: dict[str, Discretizer] = {}
    tokens: dict[str, np.ndarray] = {}
    errors: dict[str, str] = {}
    for engine, dtype in pairs:
        name = f"{engine} {dtype}"
        report(f"building {name}")
        try:
            built = create(EngineConfig(engine, device, dtype), load_model(file))
            discretizer = Discretizer(file.spec, file.fingerprint, built)
            discretizer.warm_up(size)
            tokens[name] = discretizer.discretize(images, outputs=["indices"])["indices"]
            discretizers[name] = discretizer
        except Exception as error:  # a package that is missing, too little memory, ...: the others go on
            errors[name] = one_line(error)
    report(f"timing {len(discretizers)} engines")
    timings = time_in_turns(
        {name: lambda d=d: d.discretize(images) for name, d in discretizers.items()},  # type: ignore[misc]
        rounds=rounds,
        warmup=1,
    )
    rows = [row(name, timing, timings.get(REFERENCE), tokens, batch) for name, timing in timings.items()]
    return rows + [Row(name, error=error) for name, error in errors.items()]


def row(name: str, timing: Timing, reference: Timing | None, tokens: dict[str, np.ndarray], batch: int) -> Row:
    """Returns the result of one engine, compared with the reference if that ran."""
    if timing.error:
        return Row(name, error=timing.error)
    times = ratio(timing, reference) if reference else None
    return Row(
        name,
        tuple(batch / seconds for seconds in timing.seconds),
        times.median if times else None,
        float((tokens[name] == tokens[REFERENCE]).mean()) if REFERENCE in tokens else None,
    )


def default_batch(device: str) -> int:
    """Returns the batch that is large enough to show an engine's speed on this device."""
    return 64 if pick_device(device).type == "cuda" else 16
