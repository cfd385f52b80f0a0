"""Makes an engine by its name, on a device and in a dtype."""

from __future__ import annotations

import torch

from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.engines.base import Engine

ENGINES = ("auto", "torch", "cpu", "onnx", "reference")


DTYPES = ("auto", "fp32", "tf32", "mixed", "fp16", "bf16")  # mixed: encoder fp32, decoder fp16


def offered(cuda: bool) -> list[tuple[str, str]]:
    """Every (engine, dtype) of our own that there can be on CUDA, or on a CPU."""
    there = [dtype for dtype in DTYPES if dtype != "auto" and (cuda or dtype != "tf32")]
    return [*(("torch", dtype) for dtype in there), *([] if cuda else [("cpu", "fp32")]), ("onnx", "fp32")]


def pick_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises ValueError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.empty(0, device=picked)
        if picked.type not in ("cpu", "cuda"):
            raise RuntimeError("must be auto, cpu, cuda or cuda:N")
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {device!r}: {str(error).splitlines()[0]}") from error
    return picked


def true_fp32() -> None:
    """Switches TF32 off in this process: its 10 bits of mantissa lose δ, and cuDNN takes it by itself."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def create(name: str, model: VQGAN, *, device: str = "auto", dtype: str = "auto", tricks: str = "auto") -> Engine:
    """An engine by name, holding `model`; `auto` is the fastest that starts without a further package.

    >>> create("auto", model, device="cpu").name  # doctest: +SKIP
    'cpu'
    >>> engine = create("torch", model, device="cuda", tricks="all,-graphs")  # doctest: +SKIP

    `tricks` as `Tricks.parse` reads it. Raises ValueError for what does not exist or does not go together.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, must be one of {DTYPES}")
    true_fp32()
    if name == "auto":
        plain = pick_device(device).type == "cpu" and dtype in ("auto", "fp32") and tricks in ("auto", "none")
        name = "cpu" if plain else "torch"
    if name in ("cpu", "onnx", "reference") and tricks not in ("auto", "none"):
        raise ValueError(f"tricks is {tricks!r}: the engine {name!r} knows none")
    if name == "cpu":
        from dat_workers.engines.cpu.engine import CpuEngine

        return CpuEngine(model, pick_device(device), dtype)
    if name == "onnx":
        from dat_workers.engines.onnx.engine import OnnxEngine

        return OnnxEngine(model, device, dtype)
    if name == "torch":
        from dat_workers.engines.torch.engine import TorchEngine

        return TorchEngine(model, pick_device(device), dtype, tricks)
    if name == "reference":
        from dat_workers.engines.reference import ReferenceEngine

        return ReferenceEngine(model, pick_device(device), dtype)
    raise ValueError(f"engine is {name!r}, must be one of {ENGINES}")
