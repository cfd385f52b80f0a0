"""Triton kernels of the torch engine: GroupNorm with swish in NHWC, and the nearest codebook entry.

    y = norm_swish(x, weight, bias, eps=1e-6, swish=True, dtype=torch.float16)
    indices = nearest(latents, codebook)

Both take CUDA tensors, or CPU tensors under Triton's interpreter (set TRITON_INTERPRET=1 before the import), with
which the tests run without a GPU. All offsets are 64 bits wide, because 128 images of 256 x 256 with 256 channels
have 2^31 elements, one more than signed 32 bits can address.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUPS = 32  # groups of every GroupNorm in these networks
TILE = 4096  # elements per program: 32 per thread
MOST_PARTS = 256  # limit of the parts of an image; the moments of each part are computed and then merged
# Triton 3.10 no longer fuses a·b + c by default, and 3.9 warns of this change. With an explicit setting every
# version gives the same bits.
FUSION = {"enable_fp_fusion": False}


@triton.jit
def _moments(x_ptr, mean_ptr, m2_ptr, pixels, channels, rows, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Computes the mean and the sum of squared deviations of each channel over `rows` pixels of one image.

    The mean of each tile is subtracted before squaring, and tiles are merged by Chan's formula (Chan, Golub,
    LeVeque, 1979), because E[x²] - E[x]² would lose all digits if the mean is large.
    """
    part = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = part * rows
    end = tl.minimum(first + rows, pixels)
    count = 0.0
    mean = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    for start in range(first, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < end)[:, None] & (c < channels)[None, :]
        offsets = (image * pixels + p)[:, None] * channels + c[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        n = tl.minimum(end - start, BLOCK_P).to(tl.float32)
        rough = tl.div_rn(tl.sum(x, 0), n)  # "/" divides to within 2 ulp only
        deviation = tl.where(mask, x - rough[None, :], 0.0)
        rest = tl.div_rn(tl.sum(deviation, 0), n)  # the rounding error of the mean
        total = count + n
        delta = rough + rest - mean
        share = tl.div_rn(n, total)
        mean += delta * share
        m2 += tl.sum(deviation * deviation, 0) - n * rest * rest + delta * delta * (count * share)
        count = total
    at = (image * tl.num_programs(0) + part) * channels + c
    tl.store(mean_ptr + at, mean, mask=c < channels)
    tl.store(m2_ptr + at, m2, mask=c < channels)


@triton.jit
def _merge(
    mean_ptr, m2_ptr, shift_ptr, group_mean_ptr, group_rstd_ptr, pixels, channels, rows, parts, eps,
    GROUP_SIZE: tl.constexpr, SHIFTED: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Merges the moments of parts and channels into mean and 1/sqrt(variance + eps) of one group of one image.

    A shift of a channel moves its mean and leaves the sum of its squared deviations as it is.
    """
    image = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    part = tl.arange(0, BLOCK_PARTS)
    j = tl.arange(0, BLOCK_G)
    mask = (part < parts)[:, None] & (j < GROUP_SIZE)[None, :]
    offsets = (image * parts + part)[:, None] * channels + group * GROUP_SIZE + j[None, :]
    means = tl.load(mean_ptr + offsets, mask=mask, other=0.0)
    m2 = tl.load(m2_ptr + offsets, mask=mask, other=0.0)
    n = tl.minimum(tl.maximum(pixels - part * rows, 0), rows).to(tl.float32)[:, None]
    total = pixels * GROUP_SIZE * 1.0  # not .to(), because Triton specialises pixels = 1 to a Python int
    origin = tl.load(mean_ptr + image * parts * channels + group * GROUP_SIZE)  # a value close to all the means
    if SHIFTED:
        means += tl.load(shift_ptr + group * GROUP_SIZE + j, mask=j < GROUP_SIZE, other=0.0)[None, :]
        origin += tl.load(shift_ptr + group * GROUP_SIZE)
    shifted = tl.where(mask, means - origin, 0.0)
    shift = tl.div_rn(tl.sum(tl.sum(n * shifted, 1), 0), total)
    deviation = tl.where(mask, shifted - shift, 0.0)
    variance = tl.div_rn(tl.sum(tl.sum(m2, 1), 0) + tl.sum(tl.sum(n * deviation * deviation, 1), 0), total)
    at = image * tl.num_programs(1) + group
    tl.store(group_mean_ptr + at, origin + shift)
    tl.store(group_rstd_ptr + at, tl.div_rn(1.0, tl.sqrt_rn(variance + eps)))


@triton.jit
def _normalise(
    x_ptr, y_ptr, weight_ptr, bias_ptr, shift_ptr, mean_ptr, rstd_ptr, pixels, channels, groups,
    GROUP_SIZE: tl.constexpr, SWISH: tl.constexpr, SHIFTED: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Computes (x + shift - mean)·rstd·weight + bias, then swish, in fp32 with one rounding; the second pass."""
    image = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    mask = (p < pixels)[:, None] & inside[None, :]
    offsets = (image * pixels + p)[:, None] * channels + c[None, :]
    of_group = image * groups + c // GROUP_SIZE
    mean = tl.load(mean_ptr + of_group, mask=inside, other=0.0)
    rstd = tl.load(rstd_ptr + of_group, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + c, mask=inside, other=0.0)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if SHIFTED:
        x += tl.load(shift_ptr + c, mask=inside, other=0.0)[None, :]
    y = (x - mean[None, :]) * (rstd * weight)[None, :] + bias[None, :]
    if SWISH:
        y = y * tl.sigmoid(y)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


def norm_swish(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None = None,
    *,
    eps: float,
    swish: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Applies GroupNorm over 32 groups to x + shift, then x·sigmoid(x) if `swish` is set.

    x: fp16, bf16 or fp32 [N,C,H,W], with C a multiple of 32; if it is not in NHWC order, it is copied first.
    weight, bias: fp32 [C]. shift: fp32 [C], the bias of the convolution before the norm, or None. Returns [N,C,H,W]
    of `dtype` in NHWC order.
    """
    n, channels, height, width = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)
    pixels = height * width
    block_c = min(128, triton.next_power_of_2(channels))
    block_p = TILE // block_c
    rows = triton.cdiv(triton.cdiv(pixels, MOST_PARTS), block_p) * block_p
    parts = triton.cdiv(pixels, rows)
    means, m2 = x.new_empty((2, n, parts, channels), dtype=torch.float32).unbind()
    group_mean, group_rstd = x.new_empty((2, n, GROUPS), dtype=torch.float32).unbind()
    columns = triton.cdiv(channels, block_c)
    blocks = {"BLOCK_P": block_p, "BLOCK_C": block_c, **FUSION}
    _moments[(parts, n, columns)](x, means, m2, pixels, channels, rows, **blocks)
    size, shifted = channels // GROUPS, shift is not None
    shift = weight if shift is None else shift  # a pointer that is not read
    _merge[(n, GROUPS)](
        means, m2, shift, group_mean, group_rstd, pixels, channels, rows, parts, eps,
        GROUP_SIZE=size, SHIFTED=shifted, BLOCK_PARTS=triton.next_power_of_2(parts),
        BLOCK_G=triton.next_power_of_2(size), **FUSION,
    )  # fmt: skip
    _normalise[(triton.cdiv(pixels, block_p), n, columns)](
        x, y, weight, bias, shift, group_mean, group_rstd, pixels, channels, GROUPS, GROUP_SIZE=size, SWISH=swish,
        SHIFTED=shifted, **blocks,
    )  # fmt: skip
    return y


@triton.jit
def _nearest(
    z_ptr, codebook_ptr, norms_ptr, out_ptr, vectors, entries, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Finds the nearest of `entries` codebook vectors for each of BLOCK_M latent vectors of size D."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = (m < vectors)[:, None]
    norm = tl.zeros([BLOCK_M], tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        z = tl.load(z_ptr + m[:, None] * D + d[None, :], mask=here & (d < D)[None, :], other=0.0)
        norm += tl.sum(z * z, 1)
    best = tl.full([BLOCK_M], float("inf"), tl.float32)
    index = tl.zeros([BLOCK_M], tl.int32)
    for k0 in range(0, entries, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        known = k < entries
        dot = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            z = tl.load(z_ptr + m[:, None] * D + d[None, :], mask=here & (d < D)[None, :], other=0.0)
            of_entry = k[None, :] * D + d[:, None]
            e = tl.load(codebook_ptr + of_entry, mask=known[None, :] & (d < D)[:, None], other=0.0)
            dot = tl.dot(z, e, dot, input_precision="ieee")  # the default is TF32, with 10 bits of mantissa
        norms = tl.load(norms_ptr + k, mask=known, other=float("inf"))
        distance = (norm[:, None] + norms[None, :]) - 2.0 * dot
        distance = tl.where(distance < float("inf"), distance, float("inf"))  # a NaN must not win
        low, at = tl.min(distance, 1, return_indices=True, return_indices_tie_break_left=True)
        index = tl.where(low < best, k0 + at, index)
        best = tl.minimum(low, best)
    tl.store(out_ptr + m, index.to(tl.int64), mask=m < vectors)


def nearest_blocks(d: int) -> dict[str, int]:
    """Returns the sizes of the blocks of the search for vectors of size d; they do not change the result."""
    # tl.dot needs sides of 16 or more. With d of several blocks, 128 entries at a time spill registers on sm_89.
    return {"BLOCK_D": 16, "BLOCK_M": 32, "BLOCK_K": 128 if d <= 16 else 64}


def nearest(latents: Tensor, codebook: Tensor) -> Tensor:
    """Returns the indices, int64 [M], of the vectors in codebook fp32 [K,d] nearest to latents fp32 [M,d] (Eq. 3).

    Distances are computed by the published formula, |z|² + |e|² - 2 z·e, in IEEE fp32. Among equal distances the
    lowest index wins. The distances are held in registers, BLOCK_M x BLOCK_K at a time.
    """
    latents, codebook = latents.contiguous(), codebook.contiguous()
    vectors, d = latents.shape
    out = torch.empty(vectors, dtype=torch.int64, device=latents.device)
    blocks = nearest_blocks(d)
    grid = (triton.cdiv(vectors, blocks["BLOCK_M"]),)
    norms = codebook.square().sum(1)
    _nearest[grid](latents, codebook, norms, out, vectors, len(codebook), D=d, **blocks, **FUSION)
    return out
