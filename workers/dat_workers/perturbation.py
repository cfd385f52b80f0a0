"""Algorithm 1's step on the image, x_adv = clip(base + δ, 0, 1), and the random replacement of tokens (Table 8).

Everything is fp32 (the L2 norm fp64) and per sample: what a sample becomes does not depend on what was sent
together with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from dat_workers.batching.device_copies import Array
from dat_workers.errors import InvalidInput

Base = Literal["x", "reconstruction"]
Normalize = Literal["none", "l2", "sign"]
TINY_NORM = 1e-10  # added to the L2 norm, as the authors' code does, so that a zero gradient gives δ = 0


@dataclass(frozen=True)
class Step:
    """How δ is made from a gradient.

    >>> Step.from_parameters({"preset": "easyrobust", "alpha": 0.2})
    Step(base='reconstruction', normalize='l2', alpha=0.2, epsilon=None)

    `base`: the step starts at `x`, or at Q(x) (`reconstruction`). `alpha` in units of pixel value (0..1) times
    gradient. `epsilon`: δ is clamped to ±epsilon (Table 12); None: unbounded.
    """

    base: Base = "x"
    normalize: Normalize = "none"
    alpha: float = 0.1
    epsilon: float | None = None

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Step:
        """A preset (by default `paper`), changed by whichever of base, normalize, alpha and epsilon are given.

        Raises InvalidInput with the parameter, its value and what it may be.
        """
        preset = parameters.get("preset", "paper")
        if not isinstance(preset, str) or preset not in PRESETS:
            raise InvalidInput("preset", repr(preset), f"one of {', '.join(PRESETS)}")
        step = PRESETS[preset]
        for name, choices in (("base", get_args(Base)), ("normalize", get_args(Normalize))):
            if name in parameters:
                if parameters[name] not in choices:
                    raise InvalidInput(name, repr(parameters[name]), f"one of {', '.join(choices)}")
                step = replace(step, **{name: parameters[name]})
        if "alpha" in parameters:
            step = replace(step, alpha=number(parameters, "alpha"))
        if parameters.get("epsilon") is not None:
            epsilon = number(parameters, "epsilon")
            if epsilon < 0:
                raise InvalidInput("epsilon", epsilon, "0 or more")
            step = replace(step, epsilon=epsilon)
        return step


PRESETS = {"paper": Step(), "easyrobust": Step(base="reconstruction", normalize="l2")}


def number(parameters: Mapping[str, Any], name: str) -> float:
    """A parameter that must be a finite number."""
    value = parameters[name]
    # 1e38: above it fp32 is infinity, and infinity times a zero of the gradient no number
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e38:
        raise InvalidInput(name, repr(value), "a finite number, at most 1e38")
    return float(value)


def direction(gradients: Tensor, normalize: Normalize) -> Tensor:
    """The gradient as it enters the step: fp32 [N,3,H,W] to the same shape.

    `none` leaves it (the per-sample gradient of a summed loss), `l2` divides each sample by its L2 norm + 1e-10,
    `sign` takes signs.
    """
    if normalize == "l2":
        # fp64: squares of fp32's largest do not overflow, and the sum does not depend on its order
        exact = gradients.double()
        norms = exact.flatten(1).norm(dim=1)[:, None, None, None]
        unit: Tensor = exact / (norms + TINY_NORM)
        return unit.float()
    return gradients.sign() if normalize == "sign" else gradients


def perturb(x: Tensor, reconstruction: Tensor, gradients: Tensor, step: Step) -> Tensor:
    """clip(base + δ, 0, 1) with δ = α·direction(g), clamped to ±ε (Algorithm 1, line 4); all fp32 [N,3,H,W]."""
    delta = step.alpha * direction(gradients, step.normalize)
    if step.epsilon is not None:
        delta = delta.clamp(-step.epsilon, step.epsilon)
    base = x if step.base == "x" else reconstruction
    return (base + delta).clamp(0, 1)


def replace_tokens(indices: Tensor, images: Tensor, fraction: float, seed: int, codebook_size: int) -> Tensor:
    """Swaps `fraction` of each sample's tokens for random other ones (the row "Random" of Table 8).

    indices: int64 [N,h,w] of images fp32 [N,3,H,W]. The draw depends on `seed` and on the sample's own pixels, so
    the same sample is changed in the same places on any replica and in any batch (with one version of numpy).
    round(fraction·h·w) tokens change, and each does change.
    """
    out = indices.clone()
    for image, changed in zip(images, out, strict=True):
        pixels = np.ascontiguousarray(image.cpu().numpy())
        key = hashlib.sha256(f"{seed}/".encode() + pixels.tobytes()).digest()[:16]
        rng = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        where, shift = map(torch.from_numpy, swaps(rng, changed.numel(), fraction, codebook_size))
        flat = changed.view(-1)
        flat[where] = (flat[where] + shift.to(flat.device)) % codebook_size
    return out


def swaps(rng: np.random.Generator, tokens: int, fraction: float, codebook_size: int) -> tuple[Array, Array]:
    """Which of so many tokens to swap, and how far round the codebook: 1 to K-1, so never for the same one."""
    where = rng.permutation(tokens)[: round(fraction * tokens)]
    return where, rng.integers(1, codebook_size, where.size)
