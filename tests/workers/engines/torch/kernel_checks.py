"""The Triton kernels against plain PyTorch.

On a CPU test_kernels.py runs this file in a process of its own, under Triton's interpreter (TRITON_INTERPRET=1 is
read at import); test_cuda.py takes the checks in as they are.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dat_workers.engines.torch import kernels

# numpy, which the interpreter runs on, warns of what IEEE arithmetic is asked for here
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# about two roundings of the output's mantissa, on values of a few units
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def norm_reference(x: Tensor, weight: Tensor, bias: Tensor, swish: bool) -> Tensor:
    """In fp64."""
    y = F.group_norm(x.double(), 32, weight.double(), bias.double(), 1e-6)
    return y * y.sigmoid() if swish else y


def norm_inputs(shape: tuple[int, ...], dtype: torch.dtype, offset: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) * 2 + offset
    x = x.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(shape[1], generator=generator).to(DEVICE)
    return x, weight, torch.randn(shape[1], generator=generator).to(DEVICE)


@pytest.mark.parametrize("swish", [True, False])
@pytest.mark.parametrize(("given", "wanted"), [(d, d) for d in TOLERANCE] + [(torch.float16, torch.float32)])
def test_norm_swish(given: torch.dtype, wanted: torch.dtype, swish: bool) -> None:
    x, weight, bias = norm_inputs((2, 64, 12, 10), given, 0.5)
    y = kernels.norm_swish(x, weight, bias, eps=1e-6, swish=swish, dtype=wanted)
    assert y.dtype == wanted
    assert y.shape == x.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    expected = norm_reference(x, weight, bias, swish)
    torch.testing.assert_close(y.double(), expected, atol=TOLERANCE[wanted], rtol=TOLERANCE[wanted])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [(1, 1), (7, 9), (48, 40)])
def test_norm_of_what_is_shifted(dtype: torch.dtype, size: tuple[int, int]) -> None:
    """The bias of the convolution before the norm, larger than the spread, and different within a group."""
    x, weight, bias = norm_inputs((2, 96, *size), dtype, 0.5)
    shift = torch.linspace(-20, 30, 96).to(DEVICE)
    y = kernels.norm_swish(x, weight, bias, shift, eps=1e-6, swish=True, dtype=dtype)
    expected = norm_reference(x.float() + shift[:, None, None], weight, bias, True)
    torch.testing.assert_close(
        y.double(), expected, atol=max(1e-5, TOLERANCE[dtype]), rtol=max(1e-5, TOLERANCE[dtype])
    )


@pytest.mark.parametrize(
    ("channels", "height", "width"),
    [(32, 1, 1), (32, 3, 5), (96, 7, 9), (128, 33, 31), (256, 17, 1), (512, 9, 11), (1024, 2, 3), (32, 113, 301)],
)
def test_norm_of_any_size(channels: int, height: int, width: int) -> None:
    """Tiles that are not full, several tiles a part and several parts an image, channels above and below a tile."""
    x, weight, bias = norm_inputs((2, channels, height, width), torch.float32, -1.0)
    y = kernels.norm_swish(x, weight, bias, eps=1e-6, swish=True, dtype=torch.float32)
    torch.testing.assert_close(y.double(), norm_reference(x, weight, bias, True), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 64, 40, 40), (1, 128, 64, 80)])
def test_norm_with_a_mean_a_thousand_times_its_spread(shape: tuple[int, ...]) -> None:
    """E[x²] - E[x]² in fp32 would be off by tens of percent here, or negative."""
    x, weight, bias = norm_inputs(shape, torch.float32, 4000.0)
    y = kernels.norm_swish(x, weight, bias, eps=1e-6, swish=False, dtype=torch.float32)
    # fp32's own grid at 4000 is 2.4e-4; the mean of a group is known to about that
    torch.testing.assert_close(y.double(), norm_reference(x, weight, bias, False), atol=1e-3, rtol=1e-4)


def test_norm_with_groups_whose_channels_differ() -> None:
    """The merge over a group's channels and an image's parts counts the spread between them."""
    x, weight, bias = norm_inputs((2, 128, 48, 48), torch.float32, 0.0)
    x += torch.arange(128, device=DEVICE)[None, :, None, None] * 3
    x[:, :, 24:] += 50
    y = kernels.norm_swish(x, weight, bias, eps=1e-6, swish=True, dtype=torch.float32)
    torch.testing.assert_close(y.double(), norm_reference(x, weight, bias, True), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("value", [0.0, 3.0, -1234.5])
def test_norm_of_a_constant_is_the_bias(value: float) -> None:
    x, weight, bias = norm_inputs((2, 64, 20, 30), torch.float32, 0.0)
    y = kernels.norm_swish(torch.full_like(x, value), weight, bias, eps=1e-6, swish=False, dtype=torch.float32)
    assert torch.equal(y, bias[None, :, None, None].expand_as(y))


def test_norm_takes_contiguous_tensors_and_slices() -> None:
    x, weight, bias = norm_inputs((2, 64, 9, 14), torch.float32, 0.0)
    kwargs: dict[str, Any] = {"eps": 1e-6, "swish": True, "dtype": torch.float32}
    y = kernels.norm_swish(x, weight, bias, **kwargs)
    assert torch.equal(kernels.norm_swish(x.contiguous(), weight, bias, **kwargs), y)
    part = x[:, :, 1:, 2:7]
    expected = norm_reference(part, weight, bias, True)
    torch.testing.assert_close(
        kernels.norm_swish(part, weight, bias, **kwargs).double(), expected, atol=1e-5, rtol=1e-5
    )


def test_one_image_with_infinity_leaves_the_others_alone() -> None:
    x, weight, bias = norm_inputs((3, 32, 8, 8), torch.float32, 0.0)
    clean = kernels.norm_swish(x, weight, bias, eps=1e-6, swish=True, dtype=torch.float32)
    x[1, 5, 3, 3] = torch.inf
    y = kernels.norm_swish(x, weight, bias, eps=1e-6, swish=True, dtype=torch.float32)
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    assert not y[1, 5].isfinite().any()


@pytest.mark.parametrize(
    ("vectors", "entries", "d"),
    [(1, 1, 4), (5, 3, 4), (33, 256, 4), (100, 1000, 8), (64, 130, 5), (40, 300, 256), (37, 129, 100)],
)
def test_nearest(vectors: int, entries: int, d: int) -> None:
    generator = torch.Generator().manual_seed(vectors)
    z = torch.randn(vectors, d, generator=generator).to(DEVICE)
    codebook = torch.randn(entries, d, generator=generator).to(DEVICE)
    indices = kernels.nearest(z, codebook)
    assert indices.dtype == torch.int64
    distances = torch.cdist(z.double(), codebook.double()).square()
    ours = distances.gather(1, indices[:, None])[:, 0]
    # exact but for ties that fp32 cannot tell apart
    assert (ours - distances.min(1).values).max() <= 4e-7 * (distances.max() + 1)
    assert (indices == distances.argmin(1)).float().mean() > 0.95


def test_nearest_takes_the_lowest_of_equal_entries() -> None:
    """Copies of an entry within a block, and in blocks further on; small whole numbers, so that sums are exact."""
    base = torch.cartesian_prod(*[torch.arange(4.0)] * 4)[torch.randperm(256)[:100]]
    codebook = torch.cat([base, base, base.flip(0), base]).to(DEVICE)
    indices = kernels.nearest(base.to(DEVICE), codebook)
    assert torch.equal(indices.cpu(), torch.arange(100))


def test_nearest_far_from_the_origin_stays_within_fp32() -> None:
    """|z|² of 4e4 leaves steps of 0.004 in a distance: the pick is within a few of them of the nearest."""
    generator = torch.Generator().manual_seed(1)
    z = (torch.randn(50, 4, generator=generator) + 100).to(DEVICE)
    codebook = (torch.randn(500, 4, generator=generator) + 100).to(DEVICE)
    indices = kernels.nearest(z, codebook)
    distances = torch.cdist(z.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    assert (distances.gather(1, indices[:, None])[:, 0] - distances.min(1).values).max() < 0.03


def test_nearest_of_what_is_no_number_is_an_index() -> None:
    z = torch.tensor([[torch.nan] * 4, [torch.inf] * 4, [0.0] * 4], device=DEVICE)
    codebook = torch.tensor([[1.0] * 4, [0.1] * 4], device=DEVICE)
    assert kernels.nearest(z, codebook).tolist() == [0, 0, 1]
