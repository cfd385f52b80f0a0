from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dat_client import Client, InvalidRequest
from dat_client.torch import straight_through


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_q_forward_and_the_identity_backward(codec: Client, x: Tensor, dtype: torch.dtype) -> None:
    images = (x / 255).to(dtype).requires_grad_()
    q = straight_through(codec, images)
    if dtype in (torch.float32, torch.float64):  # half pictures are other pictures
        expected = codec.discretize(x).reconstruction
        assert torch.equal((q.detach() * 255).round().to(torch.uint8), expected)
    assert q.dtype == dtype
    assert q.device == images.device
    upstream = torch.randn(q.shape).to(dtype)
    q.backward(upstream)
    assert torch.equal(images.grad, upstream)


def test_it_changes_the_picture_and_leaves_its_argument(codec: Client, x: Tensor) -> None:
    images = x / 255
    before = images.clone()
    q = straight_through(codec, images)
    assert not q.requires_grad
    assert torch.equal(images, before)
    assert 0.001 < (q - images).abs().mean() < 0.2


def test_uint8_and_fp32_answers(codec: Client, x: Tensor) -> None:
    rounded, exact = straight_through(codec, x), straight_through(codec, x, output_dtype="FP32")
    assert rounded.dtype == exact.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(codec: Client, x: Tensor, dtype: torch.dtype) -> None:
    images = (x / 255).requires_grad_()
    convolution = torch.nn.Conv2d(3, 4, 3)
    with torch.autocast("cpu", dtype):
        out = convolution(straight_through(codec, images))
        assert out.dtype == dtype
    out.float().sum().backward()
    with torch.autocast("cpu", dtype):
        leaf = (straight_through(codec, x)).requires_grad_()
        convolution(leaf).float().sum().backward()
    assert torch.equal(images.grad, leaf.grad)


def test_inside_a_larger_graph(codec: Client, x: Tensor) -> None:
    scale = torch.tensor(0.9, requires_grad=True)
    straight_through(codec, scale * (x / 255)).sum().backward()
    assert torch.isclose(scale.grad, (x / 255).sum())


def test_pictures_on_grey_levels_travel_as_uint8(server, x: Tensor) -> None:
    with Client(server.url) as client:
        straight_through(client, x / 255)
        straight_through(client, x.float().mul(1 / 255))  # as a GPU divides
        straight_through(client, (x / 255).mul(0.99))
    kinds = [request.inputs["images"].dtype.name for request in server.requests]
    assert kinds == ["uint8", "uint8", "float32"]


def test_compiled_functions_may_hold_it(codec: Client, x: Tensor) -> None:
    @torch.compile(backend="eager")
    def step(images: Tensor) -> Tensor:
        return straight_through(codec, images * 1.0).mean()

    assert torch.isclose(step(x / 255), straight_through(codec, x).mean())


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (torch.rand(3, 8, 8), r"\[N,3,H,W\]"),
        (torch.randn(1, 3, 8, 8), "0..1"),
        (torch.full((1, 3, 8, 8), float("nan")), "nan"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_picture_is_refused(codec: Client, images: Tensor, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        straight_through(codec, images)
    assert caught.value.field == "images"
