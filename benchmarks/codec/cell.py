"""Builds, judges and times all contestants on one size and one batch (a "cell" of the results)."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.codec import roofline
from benchmarks.codec.contestants import Candidate, Codec, engine_candidate
from dat_service.bench.timing import Timing, clock_for, cpu_clock, groups_with_baseline, ratio, time_in_turns
from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.discretizer import Discretizer
from dat_workers.engines.config import EngineConfig
from dat_workers.engines.device_errors import free_cached_memory
from dat_workers.engines.factory import create
from dat_workers.errors import one_line
from dat_workers.verify.agreement import reference_engine

OPERATIONS = ("q", "encode", "decode", "host")
AT_ONCE_ON_CUDA = 2  # contestants beside the baseline


@dataclass(frozen=True)
class Plan:
    """Settings that are the same for all cells."""

    device: torch.device
    operations: Sequence[str]
    rounds: int
    warmup: int
    baseline: str
    peaks: Mapping[str, float | None]  # FLOP/s of a matrix product, by precision
    report: Callable[[str], None]  # shows the progress


@dataclass(frozen=True)
class Pool:
    """The distinct images that fill the batches.

    images: uint8 [n,3,H,W] on the CPU. tokens: int64 [n,h,w] of the reference, or None if agreement would mean
    nothing, with random weights or noise for images.
    """

    images: Tensor
    tokens: Tensor | None


def true_tokens(model: VQGAN, images: Tensor) -> tuple[Tensor, str]:
    """Returns the tokens of uint8 [n,3,H,W] by the reference on the CPU, or else by our fp32, and its name."""
    try:
        engine = reference_engine(copy.deepcopy(model))
    except RuntimeError:
        engine = create(EngineConfig("torch", "cpu", "fp32"), copy.deepcopy(model))
    parts = torch.split(images.float().div_(255), 1)
    return torch.cat([engine.encode(part) for part in parts]), f"{engine.name} fp32 on the CPU"


def run_cell(model: VQGAN, candidates: Sequence[Candidate], pool: Pool, batch: int, plan: Plan) -> dict[str, Any]:
    """Returns the results of all contestants for batches of that size, ready for JSON.

    Every cell builds them again, because graphs and compiled code fit one shape and memory is counted from zero. On
    CUDA a few are built at a time, because each holds 10 GB or more; the baseline runs beside all of them, and its
    first results count. A contestant that fails to build or to run is listed with its error and does not stop the
    others.
    """
    torch.compiler.reset()  # otherwise the limit on recompilations silently leaves later shapes uncompiled
    by_name = {candidate.name: candidate for candidate in candidates}
    first = plan.baseline if plan.baseline in by_name else next(iter(by_name))
    at_once = AT_ONCE_ON_CUDA if plan.device.type == "cuda" else len(by_name)
    results: dict[str, dict[str, Any]] = {}
    for group in groups_with_baseline(list(by_name), first, at_once):
        for row in _run_group(model, [by_name[name] for name in group], pool, batch, plan):
            results.setdefault(row["contestant"], row)
        free_cached_memory()
    baseline = next((name for name in [first, *by_name] if "error" not in results[name]), None)
    size = pool.images.shape[2]
    return {"size": size, "batch": batch, "baseline": baseline, "results": [results[name] for name in by_name]}


def _run_group(
    model: VQGAN, candidates: Sequence[Candidate], pool: Pool, batch: int, plan: Plan
) -> list[dict[str, Any]]:
    """Builds, judges and times some contestants in turns; the first that can be built is their baseline."""
    host = pool.images.repeat(-(-batch // len(pool.images)), 1, 1, 1)[:batch]
    images = host.to(plan.device).float().div_(255)
    size = images.shape[2]
    built: dict[str, Codec] = {}
    rows: dict[str, dict[str, Any]] = {}
    indices: dict[str, Tensor] = {}
    for candidate in candidates:
        plan.report(f"{batch} of {size}²: building {candidate.name}")
        row = rows[candidate.name] = {"contestant": candidate.name, "precision": candidate.precision}
        memory = machine.PeakMemory(plan.device)
        try:
            codec = candidate.build(model, images.shape)
            codec.decode(codec.encode(images))  # compiles, captures
            memory.start()
            tokens = codec.encode(images)
            row["finite"] = bool(codec.decode(tokens).isfinite().all())
            row["peak_bytes"] = memory.peak()
        except Exception as error:
            absent = isinstance(error, ImportError) or isinstance(error.__cause__, ImportError)
            row["error"] = f"not installed ({error})" if absent else one_line(error)
        else:
            built[candidate.name], indices[candidate.name] = codec, tokens
            if pool.tokens is not None:
                judged = pool.tokens[:batch]
                row["token_agreement"] = float((tokens[: len(judged)].cpu() == judged).double().mean())
    baseline = next(iter(built), None)
    for operation in plan.operations:
        calls = _calls(operation, built, images, host, indices, model)
        plan.report(f"{batch} of {size}²: timing {operation} of {len(calls)} contestants")
        clock = cpu_clock if operation == "host" else clock_for(plan.device)  # results in numpy are complete
        timings = time_in_turns(calls, rounds=plan.rounds, warmup=plan.warmup, clock=clock)
        for name, timing in timings.items():
            result = rates(timing, batch)
            if baseline in timings and (times := ratio(timing, timings[baseline])):
                result["times_baseline"] = {"median": times.median, "low": times.low, "high": times.high}
            least_s = least_seconds(model, size, operation, rows[name]["precision"], plan.peaks)
            if least_s and not timing.error:
                result["share_of_peak"] = result["images_per_s"] * least_s
            rows[name][operation] = result
    return list(rows.values())


def rates(timing: Timing, images: int) -> dict[str, Any]:
    """Returns a timing in images/s, ready for JSON: median, lowest, highest and every round; or the error."""
    if timing.error:
        return {"error": timing.error}
    each = [images / s for s in timing.seconds]
    return {
        "images_per_s": statistics.median(each),
        "low": min(each),
        "high": max(each),
        "rounds": each,
        "calls_a_round": timing.calls,
    }


def _calls(
    operation: str,
    built: Mapping[str, Codec],
    images: Tensor,
    host: Tensor,
    indices: Mapping[str, Tensor],
    model: VQGAN,
) -> dict[str, Callable[[], object]]:
    def call(name: str, codec: Codec) -> Callable[[], object]:
        if operation == "encode":
            return lambda: codec.encode(images)
        if operation == "decode":
            return lambda: codec.decode(indices[name])
        if operation == "q":
            return lambda: codec.decode(codec.encode(images))
        assert codec.engine is not None
        discretizer, array = Discretizer(model.spec, "benchmark", codec.engine), host.numpy()
        return lambda: discretizer.discretize(array)

    return {name: call(name, codec) for name, codec in built.items() if operation != "host" or codec.engine}


def least_seconds(
    model: VQGAN, size: int, operation: str, precision: str, peaks: Mapping[str, float | None]
) -> float | None:
    """Returns the seconds for the FLOP of one image at the peaks of matrix products; None if a peak is not known.

    `mixed` has two: the encoder is fp32, the decoder fp16.
    """
    halves = {"encode": "fp32", "decode": "fp16"} if precision == "mixed" else {}
    seconds = 0.0
    for half, flop in roofline.flop(model.spec, size).items():
        if operation in ("q", half):
            peak = peaks.get(halves.get(half, precision))
            if not peak:
                return None
            seconds += flop / peak
    return seconds or None


def run_steps(model: VQGAN, pool: Pool, batch: int, dtype: str, plan: Plan) -> dict[str, Any]:
    """Predicts, and on CUDA measures, each trick of the torch engine alone, all of them, and all but each.

    The prediction is for Q from device to device; there is one with all tricks for every dtype besides. The
    measurement adds `host`, which shows the copies.
    """
    tricks = roofline.TRICKS
    settings = {"none": (), **{t: (t,) for t in tricks}, "all": tricks}
    settings |= {f"all,-{t}": tuple(trick for trick in tricks if trick != t) for t in tricks}
    cuda = plan.device.type == "cuda"
    limits = roofline.H200
    if cuda:
        half = "bf16" if dtype == "bf16" else "fp16"
        peaks = {p: plan.peaks.get(p) or machine.matmul_peak(plan.device, p) for p in (half, "tf32", "fp32")}
        limits = roofline.Limits(
            peaks[half],
            peaks["tf32"],
            peaks["fp32"],
            machine.bandwidth(plan.device),
            machine.launch_s(plan.device),
            "this GPU, measured in this run",
        )
    size = pool.images.shape[2]

    def predicted_rate(dtype: str, on: Sequence[str]) -> float:
        return batch / roofline.predict(model.spec, size, batch, on, limits, dtype)

    predicted = {setting: predicted_rate(dtype, on) for setting, on in settings.items()}
    rows = [{"tricks": setting, "predicted_images_per_s": rate} for setting, rate in predicted.items()]
    by_dtype = {d: predicted_rate(d, tricks) for d in roofline.DTYPES}
    steps = {"size": size, "batch": batch, "dtype": dtype, "limits": vars(limits), "rows": rows}
    steps["predicted_by_dtype"] = by_dtype
    if not cuda:
        return steps | {"not_measured": "no CUDA"}
    runners = [engine_candidate("torch", dtype, plan.device, setting) for setting in settings]
    cell = run_cell(model, runners, pool, batch, plan)
    for row, result in zip(rows, cell["results"], strict=True):
        row["measured"] = result
    return steps
