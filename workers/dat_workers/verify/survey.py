"""Measures every engine and dtype of this machine against the reference, and names the fastest that passes.

`dat codecs verify` prints the result.
"""

from __future__ import annotations

import copy
import math
import statistics
import timeit
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.engines.base import Engine
from dat_workers.engines.config import EngineConfig
from dat_workers.engines.device_errors import free_cached_memory
from dat_workers.engines.factory import create, engine_dtype_pairs
from dat_workers.errors import one_line
from dat_workers.verify.agreement import Agreement, ReferenceOutputs, compare_outputs
from dat_workers.verify.diagnose import find_overflow

# Images per timed call. A CPU computes one image at a time, so more images would not change the rate.
TIMED_IMAGES = {"cuda": 64, "cpu": 2}


@dataclass(frozen=True)
class Row:
    """The agreement and speed of one engine and dtype, or the reason why it could not run."""

    engine: str
    dtype: str
    default: bool  # whether it runs when neither engine nor dtype is chosen
    agreement: Agreement | None = None
    images_per_s: float | None = None  # of Q, the median of a few rounds: good for a ranking, not a benchmark
    overflow: str | None = None  # the layer
    error: str | None = None

    @property
    def name(self) -> str:
        return f"{self.engine} {self.dtype}"

    @property
    def shortfall(self) -> str:
        """The limits that the engine misses, or the reason why it did not run; empty if it passes."""
        return self.agreement.shortfall if self.agreement else self.error or "not run"

    @property
    def undecided(self) -> bool:
        """Whether too few tokens were compared to say that the engine passes or that it does not."""
        return self.agreement is not None and self.agreement.undecided

    def to_dict(self) -> dict[str, Any]:
        """Returns the row as plain JSON types, with None in place of NaN, which JSON does not have."""
        values = asdict(self) | {"shortfall": self.shortfall, "undecided": self.undecided}
        if self.agreement:
            values["agreement"] = {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in asdict(self.agreement).items()
            }
        return values


def survey(
    model: VQGAN,
    expected: ReferenceOutputs,
    *,
    device: str = "auto",
    engines: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    rounds: int = 3,
    report: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Returns a row for every engine and dtype, or for the named ones.

    An engine that cannot be created or run has a row with its error. `report` receives a line before each step.
    There is one engine at a time, because with its CUDA graphs each holds 10 GB or more.
    """
    engine = create(EngineConfig(device=device), copy.deepcopy(model))
    default = (engine.name, engine.dtype)
    cuda = engine.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(engine.device)  # CUDA events and graphs belong to the current device
    del engine
    rows = []
    for name, dtype in _pairs(default, cuda, engines, dtypes):
        row = Row(name, dtype, (name, dtype) == default)
        if dtype == "tf32" and not cuda:
            rows.append(replace(row, error="not measured: TF32 needs CUDA"))
            continue
        report(f"comparing and timing {row.name}")
        free_cached_memory()
        try:
            rows.append(_measured(row, model, expected, device, rounds))
        except Exception as error:
            rows.append(replace(row, error=one_line(error)))
    return rows


def _measured(row: Row, model: VQGAN, expected: ReferenceOutputs, device: str, rounds: int) -> Row:
    """Returns the row with the results of its engine, which is created here and dropped at the end."""
    engine = create(EngineConfig(row.engine, device, row.dtype), copy.deepcopy(model))
    engine.warm_up(expected.images.shape[2])
    agreement = compare_outputs(engine, expected)
    overflow = None
    if agreement.non_finite:
        layer = find_overflow(model, expected.images, expected.indices, device=device, dtype=row.dtype)
        overflow = str(layer) if layer else "no layer, when they run one by one"
    timed = expected.images[: TIMED_IMAGES[engine.device.type]]
    return replace(row, agreement=agreement, overflow=overflow, images_per_s=_images_per_s(engine, timed, rounds))


def _pairs(
    default: tuple[str, str], cuda: bool, engines: Sequence[str], dtypes: Sequence[str]
) -> list[tuple[str, str]]:
    """Returns the (engine, dtype) pairs to survey; `auto` stands for those of `default`."""
    names = [default[0] if name == "auto" else name for name in engines]
    chosen_dtypes = [default[1] if dtype == "auto" else dtype for dtype in dtypes]
    if names and chosen_dtypes:
        return [(name, dtype) for name in names for dtype in chosen_dtypes]
    available = engine_dtype_pairs(cuda)
    if names or chosen_dtypes:
        available.append(("reference", "fp32"))
        return [(name, dtype) for name, dtype in available if name in names or dtype in chosen_dtypes]
    return available if cuda else [*available, ("torch", "tf32")]


def _images_per_s(engine: Engine, images: torch.Tensor, rounds: int) -> float | None:
    """Times Q of images on the engine's device. Returns None if it fails, for example for lack of memory."""
    on_device = images.to(engine.device)

    def q() -> None:
        engine.decode(engine.encode(on_device))
        if on_device.is_cuda:
            torch.cuda.synchronize()

    try:
        q()  # the first call with this number of images is slower
        return len(images) / statistics.median(timeit.repeat(q, number=1, repeat=rounds))
    except Exception:
        return None


def fastest_passing(rows: Sequence[Row]) -> Row | None:
    """Returns the fastest row that misses no limit, which is the recommended default, or None if all miss one."""
    passing = [row for row in rows if not row.shortfall and row.images_per_s]
    return max(passing, key=lambda row: row.images_per_s or 0, default=None)


def deciding_rows(rows: Sequence[Row], *, engines: bool, dtypes: bool) -> list[Row]:
    """Returns the rows that decide the exit status: all if engines or dtypes were named, or else the default alone.

    An engine whose package is not installed decides only if both it and the dtype were named.
    """
    named = [row for row in rows if engines or dtypes or row.default]
    return [row for row in named if (engines and dtypes) or "pip install" not in (row.error or "")]
