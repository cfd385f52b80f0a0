"""Measures how many images per second each engine on this machine discretizes, and how many tokens are right.

    dat bench codec --codec tiny-f8 --batch 16

Every engine, with every dtype, discretizes the same batch, and they take turns; on CUDA only a few at a time, each
time beside the reference, because of their memory. As in a replica of the service, the images are uint8 in host
memory before and after. The results are compared with those of the engine `reference`, which runs
taming-transformers' own modules; its tokens are those of a CPU. `python -m benchmarks.codec` also measures the
peers of this project, and which share of the chip's peak speed each contestant reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dat_client.dataset_format.left_out import LeftOut
from dat_client.wire.tensors import Array
from dat_service.bench.timing import Timing, groups_with_baseline, ratio, time_in_turns
from dat_workers.codecs.store import CodecStore, load_model
from dat_workers.discretizer import Discretizer
from dat_workers.engines.config import EngineConfig
from dat_workers.engines.device_errors import free_cached_memory
from dat_workers.engines.factory import create, engine_dtype_pairs, pick_device
from dat_workers.errors import InvalidInput, one_line
from dat_workers.images.crops import sample_crops
from dat_workers.verify.agreement import reference_engine

REFERENCE = "reference fp32"
TRUE = "reference fp32 on the CPU"
AT_ONCE_ON_CUDA = 2  # engines beside the reference; each holds 10 GB or more with its CUDA graphs
PHOTOGRAPHS = 16  # the number of distinct photographs in a batch; larger batches repeat them


@dataclass(frozen=True)
class Row:
    """The result of one engine with one dtype, or the error that prevented its measurement."""

    engine: str  # the name of the engine and its dtype, such as "torch fp32"
    images_per_s: tuple[float, ...] = ()  # one speed for each round
    times_reference: float | None = None  # its speed divided by the reference's, median of all rounds
    token_agreement: float | None = None  # the share of tokens that equal the reference's, 0 to 1
    error: str | None = None


def choose_engines(device: torch.device, engines: Sequence[str], dtypes: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the (engine, dtype) pairs to measure on a device.

    These are the pairs whose engine and dtype are in the lists; an empty list allows every name. If both lists are
    empty, a CPU is measured with fp32 only, because half precision is slow there. Raises InvalidInput if no pair
    that works on this device matches.
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
    pictures: Sequence[str | Path] | None = None,
    rounds: int = 5,
    report: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Returns one row for each pair, measured on a batch of `batch` centre crops of `size` x `size` pixels.

    The crops are cut out of `pictures`, by default out of the photographs that scikit-image contains. `report`
    gets a line of text before each step. Raises CodecError for an unknown codec, InvalidInput for unreadable
    pictures, and RuntimeError if scikit-image is needed but not installed.
    """
    left_out = LeftOut()
    crops = sample_crops(pictures, size, min(batch, PHOTOGRAPHS), left_out=left_out)
    for line in left_out.lines():
        report(line)
    images = np.resize(crops, (batch, *crops.shape[1:]))
    file = CodecStore().load(codec)
    names = {f"{engine} {dtype}": EngineConfig(engine, device, dtype) for engine, dtype in pairs}
    cuda = pick_device(device).type == "cuda"
    tokens: dict[str, Array] = {}
    if cuda and REFERENCE in names:
        report("computing the reference's tokens on the CPU")
        try:
            reference = Discretizer(file.spec, file.fingerprint, reference_engine(load_model(file)))
            indices = reference.discretize(crops, outputs=["indices"])["indices"]
            tokens[TRUE] = np.resize(indices, (batch, *indices.shape[1:]))
        except RuntimeError as error:
            report(f"no token agreement: {one_line(error)}")
    rows: dict[str, Row] = {}
    for group in groups_with_baseline(list(names), REFERENCE, AT_ONCE_ON_CUDA if cuda else len(names)):
        ready: dict[str, Discretizer] = {}
        for name in group:
            report(f"building {name}")
            try:
                ready[name] = Discretizer(file.spec, file.fingerprint, create(names[name], load_model(file)))
                ready[name].warm_up(size)
                tokens[name] = ready[name].discretize(images, outputs=["indices"])["indices"]
            except Exception as error:  # such as a missing package or too little memory; the other pairs still run
                ready.pop(name, None)
                rows[name] = Row(name, error=one_line(error))
        report(f"timing {len(ready)} engines")
        calls = {name: partial(discretizer.discretize, images) for name, discretizer in ready.items()}
        timings = time_in_turns(calls, rounds=rounds, warmup=1)
        expected = tokens.get(TRUE, tokens.get(REFERENCE))
        for name, timing in timings.items():
            rows.setdefault(name, row(name, timing, timings.get(REFERENCE), tokens[name], expected, batch))
        del ready, calls
        free_cached_memory()
    return [row for row in rows.values() if not row.error] + [row for row in rows.values() if row.error]


def row(
    name: str, timing: Timing, reference: Timing | None, tokens: Array, expected: Array | None, batch: int
) -> Row:
    """Returns the result of one engine, compared with the reference's timing and tokens if there are any."""
    if timing.error:
        return Row(name, error=timing.error)
    times = ratio(timing, reference) if reference else None
    return Row(
        name,
        tuple(batch / seconds for seconds in timing.seconds),
        times.median if times else None,
        None if expected is None else float((tokens == expected).mean()),
    )


def default_batch(device: str) -> int:
    """Returns the number of images per batch with which an engine reaches about its full speed on this device."""
    return 64 if pick_device(device).type == "cuda" else 16
