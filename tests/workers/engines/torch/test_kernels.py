"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for the chips they are meant for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.workers.engines.torch.compilation import SHARED_KB, Compiled, compiled

pytest.importorskip("triton", reason="Triton comes with PyTorch's builds for CUDA alone")
HERE = Path(__file__).parent
each_arch = pytest.mark.parametrize("arch", SHARED_KB)


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda.py runs the checks on the GPU itself")
def test_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "kernel_checks.py")]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def check_resources(kernel: Compiled, arch: int) -> None:
    assert kernel.spilled == 0
    assert kernel.shared <= SHARED_KB[arch] * 1024


@each_arch
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_norm_compiles(dtype: str, arch: int) -> None:
    from dat_workers.engines.torch import kernels

    tile = {"BLOCK_P": 32, "BLOCK_C": 128}
    pointers = {"x_ptr": f"*{dtype}", "mean_ptr": "*fp32", "m2_ptr": "*fp32"}
    moments = compiled(kernels._moments, pointers, tile, arch=arch)
    # The interpreter divides exactly. "/" becomes div.full, which is off by up to 2 units in the last place.
    check_resources(moments, arch)
    assert (moments.count("div.rn.f32"), moments.count("div.full")) == (3, 0)
    vectors = dict.fromkeys(("weight_ptr", "bias_ptr", "shift_ptr", "mean_ptr", "rstd_ptr"), "*fp32")
    pointers = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", **vectors}
    for shifted in (False, True):
        constants = {"GROUP_SIZE": 8, "SWISH": True, "SHIFTED": shifted, **tile}
        check_resources(compiled(kernels._normalise, pointers, constants, arch=arch), arch)


@each_arch
def test_merge_compiles(arch: int) -> None:
    from dat_workers.engines.torch import kernels

    names = ("mean_ptr", "m2_ptr", "shift_ptr", "group_mean_ptr", "group_rstd_ptr")
    pointers = dict.fromkeys(names, "*fp32")
    constants = {"GROUP_SIZE": 16, "SHIFTED": True, "BLOCK_PARTS": kernels.MOST_PARTS, "BLOCK_G": 16}
    for one in ({}, {"pixels": 1, "parts": 1}):  # Triton takes an argument of 1 for a constant
        merge = compiled(kernels._merge, pointers, constants | one, arch=arch, floats=("eps",))
        check_resources(merge, arch)
        assert (merge.count("div.rn.f32"), merge.count("div.full")) == (3, 0)


@each_arch
@pytest.mark.parametrize("d", [4, 8, 256])
def test_nearest_compiles_to_fused_multiply_adds(d: int, arch: int) -> None:
    """A matrix instruction on fp32 would be TF32; separate products and sums would round near-ties differently."""
    from dat_workers.engines.torch import kernels

    pointers = {"z_ptr": "*fp32", "codebook_ptr": "*fp32", "norms_ptr": "*fp32", "out_ptr": "*i64"}
    blocks = kernels.nearest_blocks(d)
    nearest = compiled(kernels._nearest, pointers, {"D": d, **blocks}, arch=arch)
    check_resources(nearest, arch)
    threads = 4 * 32
    assert nearest.count("fma.rn.f32") >= blocks["BLOCK_M"] * blocks["BLOCK_K"] * blocks["BLOCK_D"] / threads
    assert nearest.count("mul") < 50  # one a distance and a few of addresses
    assert "mma" not in nearest.ptx
