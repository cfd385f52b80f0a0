"""Fixes the arithmetic that PyTorch sets for a whole process: TF32, cuDNN's choice of kernels, short sums.

PyTorch has no such settings for a single call or thread. The engines therefore set them for the process when an
engine is created (`fix_arithmetic`), and once more around each computation on CUDA (`arithmetic`), because other
code in the process may change them in between.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

# Since version 2.9 PyTorch has `fp32_precision`, and mixing it with the older flags raises errors. It must be set
# for convolutions by name: `cudnn.allow_tf32 = False` sets them to "none", which stands for the value of
# `torch.backends.fp32_precision`, and other code in the process may have set that to "tf32".
HAS_FP32_PRECISION = hasattr(torch.backends.cudnn, "conv")

_LOCK = threading.RLock()  # held while a block of `arithmetic` runs, so that two threads' blocks do not interleave

Setting = tuple[Any, str, object]  # the object, its attribute, and the value


def _tf32_settings(tf32: bool) -> list[Setting]:
    """Returns the settings that allow or forbid TF32, which rounds the factors of fp32 products to 10 bits."""
    backends = torch.backends
    if not HAS_FP32_PRECISION:
        return [(backends.cudnn, "allow_tf32", tf32), (backends.cuda.matmul, "allow_tf32", tf32)]
    value = "tf32" if tf32 else "ieee"
    convolutions: Any = getattr(backends.cudnn, "conv")  # noqa: B009  PyTorch's annotations lack it
    return [(convolutions, "fp32_precision", value), (backends.cuda.matmul, "fp32_precision", value)]


def _cuda_settings(tf32: bool) -> list[Setting]:
    """Returns all settings of computations on CUDA.

    `cudnn.benchmark` picks kernels by their speed, again in each process, and different kernels decide near-ties
    between two codebook entries differently. The sums of half-precision products stay in fp32.
    """
    matmul = torch.backends.cuda.matmul
    return [
        *_tf32_settings(tf32),
        (torch.backends.cudnn, "benchmark", False),
        (torch.backends.cudnn, "deterministic", True),
        (matmul, "allow_fp16_reduced_precision_reduction", False),
        (matmul, "allow_bf16_reduced_precision_reduction", False),
    ]


def fix_arithmetic() -> None:
    """Switches TF32 off in this process, and lets cuDNN pick the same kernels in every process.

    δ is about 7 % of a grey level, too little for TF32's 10 bits of mantissa. On a CPU, oneDNN would compute fp32
    in bf16 after `torch.set_float32_matmul_precision("medium")`.
    """
    settings = _cuda_settings(tf32=False)
    if HAS_FP32_PRECISION:
        for operation in ("conv", "matmul"):
            settings.append((getattr(torch.backends.mkldnn, operation), "fp32_precision", "ieee"))
    with _LOCK:
        _apply(settings)


@contextlib.contextmanager
def arithmetic(*, tf32: bool) -> Iterator[None]:
    """Fixes the arithmetic on CUDA inside the block, with or without TF32, and restores it afterwards.

    Blocks of different threads run one after the other, because the settings are the same for all threads. Blocks
    of one thread may be nested.
    """
    settings = _cuda_settings(tf32)
    with _LOCK:
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in settings]
        _apply(settings)
        try:
            yield
        finally:
            _apply(before)


def _apply(settings: list[Setting]) -> None:
    for owner, name, value in settings:
        setattr(owner, name, value)
