"""Computes Q as a differentiable function whose gradient is the identity (Eq. 7)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dat_client.calls.checks import seconds
from dat_client.client import Client
from dat_client.torch._images import checked_images, float_dtype, from_wire, is_empty, to_wire
from dat_client.torch._outage import OUTAGE_S, Outages


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor, q: Tensor) -> Tensor:
        return q

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def straight_through(
    client: Client,
    x: Tensor,
    *,
    output_dtype: str = "UINT8",
    timeout_s: float | None = None,
    outage_s: float = OUTAGE_S,
) -> Tensor:
    """Returns Q(x) as a differentiable function of x, whose backward pass is the identity: ∂Q(x)/∂x ≈ I (Eq. 7).

        loss = F.cross_entropy(model(straight_through(client, x)), labels)
        loss.backward()                       # x.grad is the gradient at Q(x)

    Args:
        x: [N,3,H,W] on any device: float in 0..1 before normalisation, or uint8.
        output_dtype: the datatype in which the server sends Q(x): UINT8 (256 levels, a quarter of FP32's bytes),
            FP16 or FP32.
        timeout_s: as in `Client.discretize`.
        outage_s: as in `adversarial`.

    Returns:
        [N,3,H,W] on the device of `x` and in its dtype (float32 for uint8).

    Raises the errors of `Client.discretize`.
    """
    sent = to_wire(checked_images(x))
    outages = Outages(client, seconds("outage_s", outage_s))
    if is_empty(sent):
        return x.to(float_dtype(x))
    answer = outages.outlast(lambda: client.discretize(sent, output_dtype=output_dtype, timeout_s=timeout_s))
    q = from_wire(answer.reconstruction, x.device, float_dtype(x))
    differentiable: Tensor = _StraightThrough.apply(x, q)
    return differentiable
