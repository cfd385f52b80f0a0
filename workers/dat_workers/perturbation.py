"""Computes Algorithm 1's step, x_adv = clip(base + δ, 0, 1), and replaces tokens at random (Table 8).

Everything is computed in fp32 (the L2 norm in fp64) and per sample, so that the result of a sample does not depend
on the other samples of its batch.
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

    base: the image to which δ is added, `x` or Q(x) (`reconstruction`). normalize: see `direction`. alpha: the step
    size, in units of pixel value (0..1) per unit of gradient. epsilon: δ is clamped to ±epsilon (Table 12); None
    means that δ is not clamped.
    """

    base: Base = "x"
    normalize: Normalize = "none"
    alpha: float = 0.1
    epsilon: float | None = None


PRESETS = {name: Step(**values) for name, values in vocabulary.PRESETS.items()}
DEFAULT_STEP = PRESETS[vocabulary.DEFAULTS["preset"]]
NO_STEP = Step()  # of every request that sends no gradients, so that such requests share batches


def direction(gradients: Tensor, normalize: Normalize) -> Tensor:
    """Returns the direction of the step, fp32 [N,3,H,W]: the normalised gradient.

    `none` returns the gradient unchanged (the per-sample gradient of a summed loss), `l2` divides each sample's
    gradient by its L2 norm + 1e-10, and `sign` returns the signs.
    """
    if normalize == "l2":
        # In fp64 the squares of the largest fp32 numbers do not overflow, and the order of the additions does not
        # change the norm in fp32.
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
    """Replaces `fraction` of each sample's tokens by different tokens, drawn at random ("Random" in Table 8).

    indices: int64 [N,h,w] of images fp32 [N,3,H,W]. The draw depends only on `seed` and on the sample's own pixels,
    so that every replica replaces the same tokens of a sample, in any batch (with the same version of numpy).
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
    """Draws the positions of the tokens to replace, and the number to add to each of these tokens modulo K.

    These numbers are 1 to K-1, so that no token is replaced by itself.
    """
    positions = rng.permutation(tokens)[: round(fraction * tokens)]
    return positions, rng.integers(1, codebook_size, positions.size)
