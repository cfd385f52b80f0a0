"""`dat codecs verify`: every engine and dtype of this machine against the reference, and which of them to use."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.engines.base import Engine
from dat_workers.engines.config import EngineConfig
from dat_workers.engines.factory import create, engine_dtype_pairs
from dat_workers.system.timing import alternate, clock_for, one_line
from dat_workers.verify.agreement import Agreement, Yardstick, judge
from dat_workers.verify.diagnose import find_overflow

TIMED = {"cuda": 64, "cpu": 2}  # images a call; more tell nothing new on a CPU, which takes them one at a time


@dataclass(frozen=True)
class Row:
    """One engine and dtype: how it agrees and how fast it is, or why it could not be run."""

    engine: str
    dtype: str
    default: bool  # whether it is what runs where nothing is asked for
    agreement: Agreement | None = None
    images_per_s: float | None = None  # of Q, median of a few rounds: to rank by, no benchmark
    overflow: str | None = None  # the layer
    error: str | None = None

    @property
    def name(self) -> str:
        return f"{self.engine} {self.dtype}"

    @property
    def shortfall(self) -> str:
        """What is not as it must be; empty where all is."""
        return self.agreement.shortfall if self.agreement else self.error or "not run"

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it: NaN is null."""
        values = asdict(self) | {"shortfall": self.shortfall}
        if self.agreement:
            values["agreement"] = {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in asdict(self.agreement).items()
            }
        return values


def survey(
    model: VQGAN,
    yardstick: Yardstick,
    *,
    device: str = "auto",
    engines: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    rounds: int = 3,
    say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """A row for every engine and dtype, or for those named. What cannot be made or run is a row with its error."""
    rows: dict[str, Row] = {}
    made: dict[str, Engine] = {}
    default = create(EngineConfig(device=device), copy.deepcopy(model))  # what runs where nothing is asked for
    names = [name if name != "auto" else default.name for name in engines]
    named = [dtype if dtype != "auto" else default.dtype for dtype in dtypes]
    cuda = default.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(default.device)  # events and graphs are of the current device
    there = [*engine_dtype_pairs(cuda), ("reference", "fp32")]
    if names and named:
        pairs = [(name, dtype) for name in names for dtype in named]
    elif names or named:
        pairs = [pair for pair in there if pair[0] in names or pair[1] in named]
    else:
        pairs = there[:-1] + ([] if cuda else [("torch", "tf32")])
    for name, dtype in pairs:
        row = Row(name, dtype, (name, dtype) == (default.name, default.dtype))
        if dtype == "tf32" and not cuda:
            rows[row.name] = replace(row, error="not measured: TF32 needs CUDA")
            continue
        say(f"judging {row.name}")
        try:
            engine = create(EngineConfig(name, device, dtype), copy.deepcopy(model))
            engine.warm_up(yardstick.images.shape[2])
            agreement = judge(engine, yardstick)
            overflow = None
            if agreement.non_finite:
                found = find_overflow(model, yardstick.images, yardstick.tokens, device=device, dtype=dtype)
                overflow = str(found) if found else "no layer, when run one by one"
        except Exception as error:
            rows[row.name] = replace(row, error=one_line(error))
            continue
        made[row.name] = engine
        rows[row.name] = replace(row, agreement=agreement, overflow=overflow)
    speeds = _speeds(made, yardstick.images[: TIMED["cuda" if cuda else "cpu"]], rounds, say)
    return [replace(row, images_per_s=speeds.get(row.name)) for row in rows.values()]


def _speeds(
    made: dict[str, Engine], images: torch.Tensor, rounds: int, say: Callable[[str], None]
) -> dict[str, float]:
    """Images/s of Q from device to device, contestants in turn; those that fail are left out."""

    def call(engine: Engine, x: torch.Tensor) -> Callable[[], object]:
        return lambda: engine.decode(engine.encode(x))

    speeds: dict[str, float] = {}
    if not made:
        return speeds
    say(f"timing {len(made)} engines")
    device = next(iter(made.values())).device
    calls = {name: call(engine, images.to(engine.device)) for name, engine in made.items()}
    timings = alternate(calls, rounds=rounds, warmup=1, clock=clock_for(device), least_s=0)
    for name, timing in timings.items():
        if not timing.error:
            speeds[name] = len(images) / timing.median
    return speeds


def fastest(rows: Sequence[Row]) -> Row | None:
    """The default by measurement: the fastest of those that fall short nowhere (DESIGN.md, "Numerics")."""
    good = [row for row in rows if not row.shortfall and row.images_per_s]
    return max(good, key=lambda row: row.images_per_s or 0, default=None)


def judged(rows: Sequence[Row], *, engines: bool, dtypes: bool) -> list[Row]:
    """The rows that decide: all that were asked for by name, else the default alone.

    An engine whose package is not installed decides only where both it and the dtype were named.
    """
    asked = [row for row in rows if engines or dtypes or row.default]
    return [row for row in asked if (engines and dtypes) or "pip install" not in (row.error or "")]
