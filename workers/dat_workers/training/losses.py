"""The terms of the codec's training (Appendix A of the paper, Eq. 8-10)."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Perceptual = Callable[[Tensor, Tensor], Tensor]


def ssim(x: Tensor, y: Tensor, window: int = 7) -> Tensor:
    """Mean structural similarity (Wang et al., 2004) with a uniform window; x, y [N,3,H,W] in -1..1."""
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    mx, my = F.avg_pool2d(x, window, 1), F.avg_pool2d(y, window, 1)
    vx = F.avg_pool2d(x * x, window, 1) - mx * mx
    vy = F.avg_pool2d(y * y, window, 1) - my * my
    cov = F.avg_pool2d(x * y, window, 1) - mx * my
    ratio = ((2 * mx * my + c1) * (2 * cov + c2)) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return ratio.mean()


def structure_term(x: Tensor, y: Tensor) -> Tensor:
    """Stands where the perceptual term would: multi-scale L1 (1, 1/2, 1/4, 1/8) plus 1 - SSIM.

    LPIPS needs downloaded weights; this needs none. It is not a perceptual metric and does not claim to be.
    """
    total = 1 - ssim(x, y)
    for scale in (1, 2, 4, 8):
        total = total + (F.avg_pool2d(x, scale) - F.avg_pool2d(y, scale)).abs().mean() / 4
    return total


def perceptual_term(kind: str, device: torch.device) -> Perceptual:
    """`structure` (above) or `lpips` (needs `pip install lpips` and its weights at hand)."""
    if kind == "structure":
        return structure_term
    try:
        import lpips
    except ImportError as error:
        raise RuntimeError("--perceptual lpips needs: pip install lpips") from error
    metric = lpips.LPIPS(net="vgg", verbose=False).to(device).requires_grad_(False)
    return lambda x, y: cast(Tensor, metric(x, y).mean())


class PatchDiscriminator(nn.Sequential):
    """Says of every patch whether it is real (Isola et al., 2017); [N,3,H,W] to logits [N,1,h,w].

    GroupNorm instead of the published BatchNorm: batches here are small and of single crops.
    """

    def __init__(self, width: int = 32, layers: int = 3) -> None:
        modules: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        channels = width
        for i in range(1, layers):
            out = min(width * 2**i, 512)
            modules += [nn.Conv2d(channels, out, 4, 2, 1), nn.GroupNorm(8, out), nn.LeakyReLU(0.2)]
            channels = out
        modules.append(nn.Conv2d(channels, 1, 4, 1, 1))
        super().__init__(*modules)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge form of Eq. 9, as taming-transformers trains it."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """λ of Eq. 10: how the two terms' gradients at the decoder's last layer compare, at most 1e4."""
    (g_rec,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (g_adv,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    weight: Tensor = g_rec.norm() / (g_adv.norm() + 1e-6)
    return weight.clamp(0, 1e4).detach()
