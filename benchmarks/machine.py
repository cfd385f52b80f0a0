"""Describes the machine, and measures its peaks, of which results are shares."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dat_service.bench.timing import clock_for
from dat_workers.engines.torch.precision import arithmetic

PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def describe(device: torch.device) -> dict[str, Any]:
    """Returns CPU, GPU, threads and versions, ready for JSON."""
    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }
    return facts


def cpu_name() -> str:
    """Returns the name of the CPU as Linux gives it, elsewhere as Python does."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _fastest(device: torch.device, call: Callable[[], object]) -> float:
    """Returns the seconds of a call in the fastest of ten samples, the one that was disturbed least."""
    clock = clock_for(device)
    clock(call, 2)
    return min(clock(call, 3) / 3 for _ in range(10))


@torch.inference_mode()
def matmul_peak(device: torch.device, precision: str, side: int | None = None) -> float:
    """Returns the FLOP/s of a large square matrix product (8192 on a GPU, 1024 on a CPU); 2 FLOP a multiply-add."""
    n = side or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(n, n, device=device).to(PRECISIONS[precision]) for _ in range(2))
    with arithmetic(tf32=precision == "tf32"):
        return 2 * n**3 / _fastest(device, lambda: a @ b)


@torch.inference_mode()
def bandwidth(device: torch.device) -> float:
    """Returns the bytes/s of a copy too large for any cache; reading and writing count separately."""
    source = torch.ones((1 << 28) if device.type == "cuda" else (1 << 25), device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _fastest(device, lambda: target.copy_(source))


@torch.inference_mode()
def launch_s(device: torch.device) -> float:
    """Returns the seconds that Python takes to launch one small operation without waiting for it."""
    x = torch.zeros(32, device=device)

    def many() -> None:
        for _ in range(100):
            x.add_(1)

    return _fastest(device, many) / 100


class PeakMemory:
    """Measures the most memory that one contestant needs.

    Create it before the contestant is built, call `start` once that is warm, and `peak` after a call. On a GPU it
    counts the allocator's maximum plus what stays reserved but unused afterwards (the pools of CUDA graphs, which
    no allocation shows). On a CPU it is the growth of the resident set, or None if Linux does not report it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            self.base = torch.cuda.memory_allocated(device)
            self.idle = torch.cuda.memory_reserved(device) - self.base
        else:
            trim()
            self.base = resident("VmRSS") or 0

    def start(self) -> None:
        """Forgets the peak of building and compiling."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at VmRSS (proc(5))
            except OSError:
                self.base = -1

    def peak(self) -> int | None:
        """Returns the peak in bytes."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            most = torch.cuda.max_memory_allocated(self.device) - self.base
            torch.cuda.empty_cache()
            held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return most + max(0, held - self.idle)
        highest = resident("VmHWM")
        return None if highest is None or self.base < 0 else max(0, highest - self.base)


def trim() -> None:
    """Returns freed memory to the system (glibc), so that the next contestant's memory shows as growth."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident(field: str) -> int | None:
    """Returns VmRSS (now) or VmHWM (peak) of this process in bytes; None if /proc does not have it."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
