"""How fast is Q on this machine, beside the published modules and diffusers, and is it still the same Q?

    python -m benchmarks.codec --codec tiny-f8 --images SHARD... --out benchmarks/results/codec-tiny-f8-cpu.json
    PYTHONPATH=client:workers python -m benchmarks.codec --geometry vq-f8 --device cuda --steps --out FILE.json

The second line needs torch, triton and numpy alone; its weights are random, so it measures speed and not agreement.
Peers are taming-transformers' modules as published and diffusers' VQModel, eager and compiled, all with the same
weights. Those that are not installed are listed as such.

Contestants (contestants.py) run on the same images and take turns (dat_workers/system/timing.py). Each operation is
measured on its own: `q` (encode and decode), `encode` and `decode` go from tensors on the device to tensors on the
device; `host` is `Discretizer.discretize`, from uint8 images in host memory to uint8 images in host memory, as a
replica of the service runs it. The results also hold the share of the chip's measured peak, and memory.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.codec import roofline
from benchmarks.codec.cell import OPERATIONS, Plan, Pool, run_cell, run_steps, true_tokens
from benchmarks.codec.contestants import Candidate, candidates
from benchmarks.codec.report import show_cell, show_steps
from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.codecs.registry import REGISTRY
from dat_workers.engines.config import ENGINE_DTYPES
from dat_workers.engines.factory import pick_device
from dat_workers.engines.torch.precision import fix_arithmetic
from dat_workers.errors import one_line
from dat_workers.system.files import write_atomically

GEOMETRIES = {"vq-f8": "vqgan-openimages-f8-16384", "vq-f16": "vqgan-openimages-f16-16384"}
BASELINE = "taming fp32"
MOST_JUDGED = 16  # distinct images, on which token agreement is taken
RANDOM = "random weights"
STEPS_BATCH = 64  # on CUDA; elsewhere nothing is measured, and the first batch will do
DEFAULTS = {  # of the flags, by device
    "cuda": {"batch": [1, 8, 32, 64, 128], "size": [224, 256], "warmup": [3]},
    "cpu": {"batch": [16], "size": [224], "warmup": [1]},
}


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.codec", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--codec", default="tiny-f8", help="an embedded or installed codec [tiny-f8]")
    weights.add_argument(
        "--geometry", help="random weights in the shape of vq-f8, vq-f16 or a registered codec: speed only"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes [1 8 32 64 128 on CUDA, 16 on a CPU]")
    parser.add_argument("--size", type=int, nargs="+", help="sides of the images [224 256 on CUDA, 224 on a CPU]")
    parser.add_argument("--images", type=Path, nargs="+", help="pictures, folders or shards [scikit-image's]")
    parser.add_argument(
        "--contestants",
        default="",
        help='names or shell patterns with commas, such as "torch*,taming fp32" [all]',
    )
    parser.add_argument("--operations", default=",".join(OPERATIONS), help=f"[{','.join(OPERATIONS)}]")
    parser.add_argument("--baseline", default=BASELINE, help=f"contestant to compare with [{BASELINE}]")
    parser.add_argument("--rounds", type=int, default=7, help="times that each contestant is measured [7]")
    parser.add_argument(
        "--warmup", type=int, help="calls before the rounds of each operation [3 on CUDA, 1 on a CPU]"
    )
    parser.add_argument("--threads", type=int, help="CPU threads [all cores]")
    parser.add_argument("--steps", action="store_true", help="predict, and on CUDA measure, each trick")
    dtypes = [dtype for dtype in ENGINE_DTYPES if dtype != "auto"]
    parser.add_argument("--steps-dtype", default="mixed", choices=dtypes, help="dtype for --steps [mixed]")
    parser.add_argument("--out", type=Path, help="write FILE.json, and beside it the plot FILE.png")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 1 if nothing ran (the reason is on stderr), 130 if it was interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return run(parser().parse_args(words), shlex.join(["python", "-m", "benchmarks.codec", *words]))
    except (ValueError, RuntimeError, OSError) as error:
        report(f"benchmarks.codec: {' '.join(str(error).split())}")
        return 1
    except KeyboardInterrupt:
        report("benchmarks.codec: interrupted; --out holds the cells that were done")
        return 130


def run(a: argparse.Namespace, command: str) -> int:
    """Runs the benchmark and returns the exit status. Raises ValueError for wrong options."""
    if a.threads:
        torch.set_num_threads(a.threads)
    device = pick_device(a.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # CUDA events belong to the current device
    if a.out and (a.out.suffix == ".png" or not a.out.absolute().parent.is_dir()):
        raise ValueError(f"out is {str(a.out)!r}, must be a FILE.json in an existing folder")
    fix_arithmetic()
    defaults = DEFAULTS[device.type]
    batches, sizes = a.batch or defaults["batch"], a.size or defaults["size"]
    operations = [name.strip() for name in a.operations.split(",")]
    if not set(operations) <= set(OPERATIONS):
        raise ValueError(f"operations is {a.operations!r}, must be of {', '.join(OPERATIONS)}")
    if min(*batches, *sizes, a.rounds) < 1:
        raise ValueError(f"batch {batches}, size {sizes}, rounds {a.rounds}: all must be 1 or more")
    model, weights = load(a.codec, a.geometry)
    if any(size % model.spec.factor for size in sizes):
        raise ValueError(f"size is {sizes}, must be multiples of f = {model.spec.factor}")
    chosen = candidates(device, [name.strip() for name in a.contestants.split(",") if name.strip()])
    if not chosen:
        raise ValueError(f"contestants is {a.contestants!r}, which matches no contestant on {device.type}")
    report(f"measuring matrix products on {device}")
    plan = Plan(
        device, operations, a.rounds, a.warmup or defaults["warmup"][0], a.baseline, peaks(device, chosen), report
    )
    results: dict[str, Any] = {
        "benchmark": "codec",
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine.describe(device),
        "codec": {"name": model.spec.name, "weights": weights},
        "flop_per_image": {str(size): roofline.flop(model.spec, size) for size in sizes},
        "matmul_peak_flops": plan.peaks,
        "cells": [],
    }
    started = time.monotonic()
    for i, size in enumerate(sizes):
        pool, results["reference"] = make_pool(model, a.images, size, min(max(batches), MOST_JUDGED), weights)
        for j, batch in enumerate(batches):
            results["cells"].append(run_cell(model, chosen, pool, batch, plan))
            print(show_cell(results["cells"][-1]), flush=True)
            save(results, a.out)  # after every cell, so that a run that is cut short loses nothing
            done, all_cells = i * len(batches) + j + 1, len(sizes) * len(batches)
            left = (time.monotonic() - started) / done * (all_cells - done)
            report(f"{done} of {all_cells} cells done, about {left:.0f} s left")
        if a.steps and i == 0:
            batch = STEPS_BATCH if device.type == "cuda" else batches[0]
            results["steps"] = run_steps(model, pool, batch, a.steps_dtype, plan)
            print(show_steps(results["steps"]), flush=True)
            save(results, a.out)
    return 0 if any("error" not in r for cell in results["cells"] for r in cell["results"]) else 1


def report(line: str) -> None:
    """Shows the progress on stderr."""
    print(line, file=sys.stderr, flush=True)


def save(results: dict[str, Any], out: Path | None) -> None:
    """Writes the JSON file, and beside it the plot if Pillow is installed."""
    if out is None:
        return
    write_atomically(out, (json.dumps(results, indent=1) + "\n").encode())
    try:
        from benchmarks.codec.plot import plot
    except ImportError:
        return
    write_atomically(out.with_suffix(".png"), plot(results))


def load(codec: str, geometry: str | None) -> tuple[VQGAN, str]:
    """Returns the network in fp32 on the CPU, and the fingerprint of its weights, or "random weights"."""
    if geometry is None:
        from dat_workers.codecs.store import CodecStore, load_model

        file = CodecStore().load(codec)
        return load_model(file), f"fingerprint {file.fingerprint[:12]}"
    name = GEOMETRIES.get(geometry, geometry)
    if name not in REGISTRY or not REGISTRY[name].has_tokens:
        raise ValueError(f"geometry is {geometry!r}, must be one of {[*GEOMETRIES, *REGISTRY]}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VQGAN(REGISTRY[name]).eval().requires_grad_(False), RANDOM


def make_pool(model: VQGAN, sources: list[Path] | None, size: int, count: int, weights: str) -> tuple[Pool, str]:
    """Returns up to `count` images with the reference's tokens, and its name; or noise, and the reason for it."""
    reason = weights
    if weights != RANDOM:
        try:
            from dat_workers.images.crops import sample_crops

            images = torch.from_numpy(sample_crops(sources, size, count))
            tokens, name = true_tokens(model, images)
            return Pool(images, tokens), name
        except (ImportError, RuntimeError) as error:
            if sources:
                raise
            reason = f"no photographs: {error}"
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return Pool(noise, None), f"none ({reason}): token agreement not taken"


def peaks(device: torch.device, chosen: Sequence[Candidate]) -> dict[str, float | None]:
    """Returns the FLOP/s of a large matrix product by precision; None if the device lacks that arithmetic."""
    found: dict[str, float | None] = {}
    precisions = {p for c in chosen for p in (("fp32", "fp16") if c.precision == "mixed" else (c.precision,))}
    for precision in sorted(precisions & set(machine.PRECISIONS)):
        try:
            found[precision] = machine.matmul_peak(device, precision)
        except RuntimeError as error:
            report(f"no matrix product in {precision}: {one_line(error)}")
            found[precision] = None
    return found


if __name__ == "__main__":
    sys.exit(main())
