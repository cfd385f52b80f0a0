"""Algorithm 1's step on the image, x_adv = clip(base + δ, 0, 1), and the random replacement of tokens (Table 8).

Everything is fp32 (the L2 norm fp64) and per sample: the result for a sample does not depend on the other samples
of its batch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dat_client.wire import vocabulary
from dat_client.wire.tensors import Array

Base = Literal["x", "reconstruction"]
Normalize = Literal["none", "l2", "sign"]
TINY_NORM = 1e-10  # added to the L2 norm, as the authors' code does, so that a zero gradient gives δ = 0


@dataclass(frozen=True)
class Step:
    """Describes how δ is computed from a gradient.

    base: where the step starts, at `x` or at Q(x) (`reconstruction`). alpha: step size, in units of pixel value
    (0..1) per unit of gradient. epsilon: the bound to which δ is clamped (Table 12); None for no bound.
    """

    base: Base = "x"
    normalize: Normalize = "none"
    alpha: float = 0.1
    epsilon: float | None = None


PRESETS = {name: Step(**values) for name, values in vocabulary.PRESETS.items()}


def direction(gradients: Tensor, normalize: Normalize) -> Tensor:
    """Returns the gradient, fp32 [N,3,H,W], as it enters the step.

    `none` leaves it (the per-sample gradient of a summed loss), `l2` divides each sample by its L2 norm + 1e-10,
    `sign` takes signs.
    """
    if normalize == "l2":
        # In fp64 the squares of fp32's largest numbers do not overflow, and the sum does not depend on its order.
        exact = gradients.double()
        norms = exact.flatten(1).norm(dim=1)[:, None, None, None]
        unit: Tensor = exact / (norms + TINY_NORM)
        return unit.float()
    return gradients.sign() if normalize == "sign" else gradients


def perturb(x: Tensor, reconstruction: Tensor, gradients: Tensor, step: Step) -> Tensor:
    """Returns clip(base + δ, 0, 1), δ = α·direction(g) clamped to ±ε (Algorithm 1, line 4); all fp32 [N,3,H,W]."""
    delta = step.alpha * direction(gradients, step.normalize)
    if step.epsilon is not None:
        delta = delta.clamp(-step.epsilon, step.epsilon)
    base = x if step.base == "x" else reconstruction
    return (base + delta).clamp(0, 1)


def replace_tokens(indices: Tensor, images: Tensor, fraction: float, seed: int, codebook_size: int) -> Tensor:
    """Swaps `fraction` of each sample's tokens for random other ones (the row "Random" of Table 8).

    indices: int64 [N,h,w] of images fp32 [N,3,H,W]. The draw depends on `seed` and on the sample's own pixels, so
    a sample is changed in the same places on any replica and in any batch (with the same version of numpy).
    Exactly round(fraction·h·w) tokens change.
    """
    replaced = indices.clone()
    for image, tokens in zip(images, replaced, strict=True):
        pixels = np.ascontiguousarray(image.cpu().numpy())
        key = hashlib.sha256(f"{seed}/".encode() + pixels.tobytes()).digest()[:16]
        rng = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        positions, shifts = map(torch.from_numpy, swaps(rng, tokens.numel(), fraction, codebook_size))
        flat = tokens.view(-1)
        flat[positions] = (flat[positions] + shifts.to(flat.device)) % codebook_size
    return replaced


def swaps(rng: np.random.Generator, tokens: int, fraction: float, codebook_size: int) -> tuple[Array, Array]:
    """Draws which of `tokens` tokens to swap, and how far to move each round the codebook.

    The distances are 1 to K-1, so that no token is swapped for itself.
    """
    positions = rng.permutation(tokens)[: round(fraction * tokens)]
    return positions, rng.integers(1, codebook_size, positions.size)
