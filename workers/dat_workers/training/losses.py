"""The loss terms of a codec's training (Appendix A of the paper, Eq. 8-10)."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PerceptualTerm = Callable[[Tensor, Tensor], Tensor]

SSIM_WINDOW = 7  # pixels a side


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Returns the mean structural similarity (Wang et al., 2004) with a uniform window; x, y [N,3,H,W] in -1..1."""
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    mx, my = F.avg_pool2d(x, SSIM_WINDOW, 1), F.avg_pool2d(y, SSIM_WINDOW, 1)
    vx = F.avg_pool2d(x * x, SSIM_WINDOW, 1) - mx * mx
    vy = F.avg_pool2d(y * y, SSIM_WINDOW, 1) - my * my
    cov = F.avg_pool2d(x * y, SSIM_WINDOW, 1) - mx * my
    ratio = ((2 * mx * my + c1) * (2 * cov + c2)) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return ratio.mean()


def structure_term(x: Tensor, y: Tensor) -> Tensor:
    """Returns multi-scale L1 (1, 1/2, 1/4, 1/8) plus 1 - SSIM, instead of a perceptual term.

    Unlike LPIPS it needs no downloaded weights. It is not a perceptual metric.
    """
    total = 1 - ssim(x, y)
    for scale in (1, 2, 4, 8):
        total = total + (F.avg_pool2d(x, scale) - F.avg_pool2d(y, scale)).abs().mean() / 4
    return total


def perceptual_term(kind: str, device: torch.device) -> PerceptualTerm:
    """Returns the term named `kind`: `structure` (see above), or `lpips`, which needs downloaded weights.

    Raises RuntimeError if lpips is not installed.
    """
    if kind == "structure":
        return structure_term
    try:
        import lpips
    except ImportError as error:
        raise RuntimeError("--perceptual lpips needs: pip install lpips") from error
    metric = lpips.LPIPS(net="vgg", verbose=False).to(device).requires_grad_(False)
    return lambda x, y: cast(Tensor, metric(x, y).mean())


class PatchDiscriminator(nn.Sequential):
    """Judges whether each patch is real (Isola et al., 2017): maps images [N,3,H,W] to logits [N,1,h,w].

    It has GroupNorm instead of the published BatchNorm, because the batches here are small and consist of single
    crops.
    """

    def __init__(self) -> None:
        modules: list[nn.Module] = [nn.Conv2d(3, 32, 4, 2, 1), nn.LeakyReLU(0.2)]
        for inputs, outputs in ((32, 64), (64, 128)):
            modules += [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.GroupNorm(8, outputs), nn.LeakyReLU(0.2)]
        super().__init__(*modules, nn.Conv2d(128, 1, 4, 1, 1))


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Returns the discriminator's loss: the hinge form of Eq. 9, which taming-transformers uses."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Returns λ of Eq. 10: the ratio of the two terms' gradients at the decoder's last layer, at most 1e4."""
    (g_rec,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (g_adv,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    weight: Tensor = g_rec.norm() / (g_adv.norm() + 1e-6)
    return weight.clamp(0, 1e4).detach()
