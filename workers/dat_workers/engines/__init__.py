"""How a codec is run. An engine turns images into indices and indices into pictures, nothing else."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dat_workers.codecs.vqgan import VQGAN
from dat_workers.errors import EngineError

ENGINES = ("auto", "torch", "cpu", "onnx", "reference")
DTYPES = ("auto", "fp32", "fp16", "bf16")


class Engine(Protocol):
    """What the discretizer asks of an engine. Tensors come and go on the CPU; H and W are multiples of f."""

    name: str
    device: torch.device
    dtype: str
    batch: int  # images of 224 x 224 that are worth handing over at once

    def encode(self, images: Tensor) -> Tensor:
        """Indices int64 [N,H/f,W/f] of images fp32 [N,3,H,W] in 0..1."""
        ...

    def decode(self, indices: Tensor) -> Tensor:
        """Pictures fp32 [N,3,H,W] of indices [N,h,w], about 0..1: not clipped, so that an overflow can be seen."""
        ...


def pick_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises ValueError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {device!r}: {str(error).splitlines()[0]}") from error
    return picked


def checked_latents(z: Tensor) -> Tensor:
    """`z` itself; raises EngineError where it is not finite: the nearest entry to a NaN would be token 0."""
    if not bool(z.isfinite().all()):
        raise EngineError("the encoder's latent vectors are not finite; run the codec with --dtype fp32")
    return z


def true_fp32() -> None:
    """Switches TF32 off in this process: its 10 bits of mantissa lose δ, and cuDNN takes it by itself."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def create(name: str, model: VQGAN, *, device: str = "auto", dtype: str = "auto") -> Engine:
    """An engine by name, holding `model`; `auto` is the fastest that starts without a further package.

    >>> create("auto", model, device="cpu").name  # doctest: +SKIP
    'cpu'
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, must be one of {DTYPES}")
    true_fp32()
    if name == "auto":
        name = "cpu" if pick_device(device).type == "cpu" and dtype in ("auto", "fp32") else "torch"
    if name == "cpu":
        from dat_workers.engines.cpu_engine import CpuEngine

        return CpuEngine(model, pick_device(device), dtype)
    if name == "onnx":
        from dat_workers.engines.onnx_engine import OnnxEngine

        return OnnxEngine(model, device, dtype)
    if name == "torch":
        from dat_workers.engines.torch_engine import TorchEngine

        return TorchEngine(model, pick_device(device), dtype)
    if name == "reference":
        from dat_workers.engines.reference import ReferenceEngine

        return ReferenceEngine(model, pick_device(device), dtype)
    raise ValueError(f"engine is {name!r}, must be one of {ENGINES}")
