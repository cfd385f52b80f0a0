"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for the chip they are meant for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with PyTorch's builds for CUDA alone")
HERE = Path(__file__).parent
HOPPER = 90
SHARED_BYTES = 227 * 1024  # a block's share on Hopper (CUDA programming guide, "Compute Capability 9.0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda.py runs the checks on the GPU itself")
def test_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "kernel_checks.py")]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def compiled(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], floats: tuple[str, ...] = ()) -> Any:
    """The kernel for Hopper; this needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = pointers | dict.fromkeys(constants, "constexpr") | dict.fromkeys(floats, "fp32")
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    numbered = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=numbered)
    return triton.compile(source, target=GPUTarget("cuda", HOPPER, 32), options={"enable_fp_fusion": False})


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_norm_compiles_for_hopper(dtype: str) -> None:
    from dat_workers.engines.torch import kernels

    tile = {"BLOCK_P": 32, "BLOCK_C": 128}
    moments = {"x_ptr": f"*{dtype}", "mean_ptr": "*fp32", "m2_ptr": "*fp32"}
    assert compiled(kernels._moments, moments, tile).metadata.shared <= SHARED_BYTES
    vectors = dict.fromkeys(("weight_ptr", "bias_ptr", "mean_ptr", "rstd_ptr"), "*fp32")
    second = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", **vectors}
    constants = {"GROUP_SIZE": 8, "SWISH": True, **tile}
    assert compiled(kernels._normalise, second, constants).metadata.shared <= SHARED_BYTES


def test_merge_compiles_for_hopper() -> None:
    from dat_workers.engines.torch import kernels

    pointers = dict.fromkeys(("mean_ptr", "m2_ptr", "group_mean_ptr", "group_rstd_ptr"), "*fp32")
    constants = {"GROUP_SIZE": 16, "BLOCK_PARTS": kernels.MOST_PARTS, "BLOCK_G": 16}
    for one in ({}, {"pixels": 1, "parts": 1}):  # Triton takes an argument of 1 for a constant
        assert compiled(kernels._merge, pointers, constants | one, ("eps",)).metadata.shared <= SHARED_BYTES


@pytest.mark.parametrize("d", [4, 8, 256])
def test_nearest_compiles_for_hopper_without_tensor_cores(d: int) -> None:
    """A matrix instruction on fp32 would be TF32."""
    from dat_workers.engines.torch import kernels

    pointers = {"z_ptr": "*fp32", "codebook_ptr": "*fp32", "norms_ptr": "*fp32", "out_ptr": "*i64"}
    binary = compiled(kernels._nearest, pointers, {"D": d, **kernels.NEAREST_BLOCKS})
    assert binary.metadata.shared <= SHARED_BYTES
    assert "fma.rn.f32" in binary.asm["ptx"]
    assert "mma" not in binary.asm["ptx"]
