"""Compares an engine with a reference engine on the same images, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.engines.base import Engine, rows_at_once
from dat_workers.engines.config import EngineConfig
from dat_workers.engines.factory import create
from dat_workers.errors import InvalidInput
from dat_workers.perturbation import PRESETS, perturb

MIN_AGREEMENT = 0.9999  # in fp32, where a different order of additions sometimes decides a near-tie differently
MIN_HALF_AGREEMENT = 0.995  # in any precision below fp32
MIN_FIDELITY = 0.95  # in every precision: an encoder that misses δ, or sees one that is not there, trains on noise
MIN_PSNR_DB = 80.0  # in fp32, of images decoded from the same tokens: an error of a fortieth of a grey level
MIN_HALF_PSNR_DB = 40.0  # in any precision below fp32: an error of about one grey level

STEP = PRESETS["easyrobust"]  # α = 0.1, l2, from Q(x): the smallest δ in use, 2.6e-4 a pixel at 224²
STAND_IN_CLASSIFIER = "untrained convolutional classifier, seed 0 (a stand-in for a trained one)"
MIN_CHANCE = 0.01  # a result of few tokens that is less probable than this, for an engine at its limit, misses it
NO_TOKEN = -1  # stands for each token of an image whose encoding overflowed, and never equals a token


@dataclass(frozen=True)
class Agreement:
    """The result of comparing an engine with the reference on the same images."""

    token_agreement: float  # share of equal indices
    psnr_db: float  # of the finite images decoded from the reference's tokens; the peak is 1
    largest_difference: float  # between pixels of those images, whose range is 1
    non_finite: int  # images with a NaN or infinity in their latent vectors or after decoding
    half: bool  # whether the engine is less precise than fp32
    fidelity: float | None = None  # see `changed_tokens`; both engines step from the reference's Q(x)
    own_fidelity: float | None = None  # the same, but each engine steps from its own Q(x)
    tokens: int | None = None  # how many tokens were compared
    changed: int | None = None  # how many tokens δ changes in either engine, of which fidelity is a share

    @property
    def shortfall(self) -> str:
        """The values that miss the limits of this precision, each with its limit; empty if none does."""
        return "; ".join([*self._misses, *self._unjudged])

    @property
    def undecided(self) -> bool:
        """Whether nothing surely misses its limit, but too few tokens were compared to say that it is kept."""
        return bool(self._unjudged) and not self._misses

    @property
    def pictures_factor(self) -> float:
        """Returns how many times as many pictures would let every limit be judged; 1 if all were judged."""
        return max([1.0, *(needed / count for _, _, count, needed in self._shares if count and count < needed)])

    @property
    def _shares(self) -> list[tuple[str, float, int | None, int]]:
        """The text of each share that misses its limit, the chance of it, its tokens, and how many it takes."""
        limits = [("token agreement", self.token_agreement, self.min_agreement, self.tokens)]
        if self.fidelity is not None:
            limits.append(("fidelity", self.fidelity, MIN_FIDELITY, self.changed))
        return [
            (f"{name} {share:.4%}, must be at least {limit:.2%}", _chance(share, limit, count), count,
             round(1 / (1 - limit)))
            for name, share, limit, count in limits
            if not share >= limit
        ]  # fmt: skip

    @property
    def min_agreement(self) -> float:
        """The limit of the token agreement in this precision."""
        return MIN_HALF_AGREEMENT if self.half else MIN_AGREEMENT

    @property
    def _misses(self) -> list[str]:
        min_psnr_db = MIN_HALF_PSNR_DB if self.half else MIN_PSNR_DB
        misses = [f"{self.non_finite} images are not finite"] if self.non_finite else []
        misses += [text for text, chance, _, _ in self._shares if chance <= MIN_CHANCE]
        if not self.psnr_db >= min_psnr_db:
            misses.append(f"PSNR {self.psnr_db:.1f} dB, must be at least {min_psnr_db:g}")
        return misses

    @property
    def _unjudged(self) -> list[str]:
        return [
            f"{text}: {count} tokens are too few to judge it, which takes {needed}"
            for text, chance, count, needed in self._shares
            if chance > MIN_CHANCE
        ]


def _chance(share: float, limit: float, count: int | None) -> float:
    """Returns how probable at most this share of `count` equal tokens is if each is equal with probability `limit`.

    It is 0 where the share decides by itself: if `count` is unknown, or if the limit allows a token to differ.
    """
    if count is None or not math.isfinite(share) or count >= round(1 / (1 - limit)):
        return 0.0
    differing = round((1 - share) * count)
    fewer = (math.comb(count, k) * (1 - limit) ** k * limit ** (count - k) for k in range(min(differing, 50)))
    return max(0.0, 1 - sum(fewer))


@dataclass(frozen=True)
class ReferenceOutputs:
    """The reference's outputs for some images, computed once and compared with many engines; all are on the CPU.

    images fp32 [N,3,H,W] in 0..1; indices int64 [N,h,w]; reconstructions fp32 [N,3,H,W], decoded from them and not
    clipped; gradients fp32 [N,3,H,W] and changed bool [N,h,w], or None if fidelity is not measured.
    """

    images: Tensor
    indices: Tensor
    reconstructions: Tensor
    gradients: Tensor | None = None
    changed: Tensor | None = None

    @property
    def base(self) -> Tensor:
        """Q(x) clipped to 0..1, as a trainer receives it: δ is added to it, and gradients are taken at it."""
        return self.reconstructions.clamp(0, 1)


def reference_engine(model: VQGAN) -> Engine:
    """Returns the published modules in fp32 on the CPU, with which all engines are compared.

    On a GPU, cuDNN may compute their convolutions by transforms (Winograd, FFT) whose rounding errors are larger
    than those of the engines to be judged. Raises RuntimeError if taming-transformers is not installed.
    """
    return create(EngineConfig("reference", "cpu"), model)


def reference_outputs(
    reference: Engine,
    images: npt.NDArray[Any] | Tensor,
    gradients: Callable[[Tensor], Tensor] | None = None,
) -> ReferenceOutputs:
    """Computes the reference's outputs for fp32 images [N,3,H,W] in 0..1, H and W multiples of f.

    `gradients` returns the loss's gradient at Q(x): fp32 [N,3,H,W] to the same shape (`stand_in_gradients`).
    Without it fidelity is not measured. Raises InvalidInput if there are no images.
    """
    x = torch.as_tensor(images)
    if not len(x):
        raise InvalidInput("images", "0 images", "at least 1, since nothing follows from none")
    indices = encode(reference, x)
    outputs = ReferenceOutputs(x, indices, decode(reference, indices, x[0, 0].numel()))
    if gradients is None:
        return outputs
    g = gradients(outputs.base)
    return replace(outputs, gradients=g, changed=changed_tokens(reference, outputs.base, g))


def compare_outputs(engine: Engine, expected: ReferenceOutputs) -> Agreement:
    """Compares an engine's tokens of Q(x), its decoding of the reference's tokens, and its fidelity."""
    indices = encode(engine, expected.images)
    pixels = expected.images[0, 0].numel()
    decoded = decode(engine, expected.indices, pixels)
    finite = decoded.isfinite().flatten(1).all(1)
    difference = (decoded - expected.reconstructions)[finite]
    mse = float(difference.double().square().mean()) if len(difference) else float("nan")
    lost = (indices == NO_TOKEN).flatten(1).any(1) | ~finite
    fidelity = own_fidelity = changed = None
    if expected.gradients is not None and expected.changed is not None:
        by_engine = changed_tokens(engine, expected.base, expected.gradients)
        changed = int((by_engine | expected.changed).sum())
        fidelity = jaccard(by_engine, expected.changed) if changed else None
        own_base = expected.base if lost.any() else decode(engine, indices, pixels).nan_to_num().clamp(0, 1)
        own_fidelity = jaccard(changed_tokens(engine, own_base, expected.gradients), expected.changed)
    return Agreement(
        token_agreement=float((indices == expected.indices).double().mean()),
        psnr_db=10 * float(np.log10(1 / max(mse, 1e-15))),
        largest_difference=float(difference.abs().max()) if len(difference) else float("nan"),
        non_finite=int(lost.sum()),
        half=engine.dtype != "fp32",
        fidelity=fidelity,
        own_fidelity=own_fidelity if changed else None,
        tokens=indices.numel(),
        changed=changed,
    )


def compare(engine: Engine, reference: Engine, images: npt.NDArray[Any] | Tensor) -> Agreement:
    """Compares two engines on fp32 images [N,3,H,W] in 0..1, H and W multiples of f; does not measure fidelity."""
    return compare_outputs(engine, reference_outputs(reference, images))


def changed_tokens(engine: Engine, base: Tensor, gradients: Tensor) -> Tensor:
    """Returns the tokens that δ changes: bool [N,h,w], comparing this engine's tokens of base + δ and of base.

    The step is `easyrobust`'s, which starts at Q(x). Fidelity compares two engines from one base, the reference's
    Q(x), so that they differ only in what their encoders make of δ. From its own Q(x) each engine starts at
    different pixels: a decoder in half precision moves pixels by more than δ does, other tokens lie near a tie
    there, and the overlap is small although every token may be right for the image it belongs to (`own_fidelity`).
    """
    return encode(engine, base) != encode(engine, perturb(base, base, gradients, STEP))


def jaccard(a: Tensor, b: Tensor) -> float:
    """Returns |A ∩ B| / |A ∪ B| of two bool masks; 1 if both are empty."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def encode(engine: Engine, images: Tensor) -> Tensor:
    """Returns indices int64 [N,h,w] on the CPU; an image whose latent vectors are not finite has NO_TOKEN only."""
    parts = torch.split(images, rows_at_once(engine, images.shape[2] * images.shape[3]))
    return torch.cat([engine.encode(part.to(engine.device)).cpu() for part in parts])


def decode(engine: Engine, indices: Tensor, pixels: int) -> Tensor:
    """Returns the images of indices, fp32 [N,3,H,W] of H·W = `pixels` on the CPU, not clipped."""
    parts = torch.split(indices, rows_at_once(engine, pixels))
    return torch.cat([engine.decode(part.to(engine.device)).float().cpu() for part in parts])


def stand_in_gradients(images: Tensor) -> Tensor:
    """Returns ∇L of a fixed, untrained convolutional classifier at fp32 images [N,3,H,W].

    The labels are the classifier's own predictions. δ depends on the classifier; use `--gradients` to measure with
    the gradients of a trained classifier.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for inputs, outputs, kernel in ((3, 32, 7), (32, 64, 3), (64, 128, 3)):
            layers += [nn.Conv2d(inputs, outputs, kernel, stride=2, padding=kernel // 2), nn.ReLU()]
        classifier = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 1000))
    gradients: list[Tensor] = []
    for part in torch.split(images, 8):
        x = part.clone().requires_grad_()
        logits = classifier(x)
        loss = nn.functional.cross_entropy(logits, logits.argmax(1), reduction="sum")
        gradients += torch.autograd.grad(loss, x)
    return torch.cat(gradients)
