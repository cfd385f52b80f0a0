"""Are the numbers right? Engines against a reference, the same pictures, token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dat_workers.engines.base import Engine, rows_at_once
from dat_workers.perturbation import PRESETS, perturb

LEAST_AGREEMENT = 0.9999  # of fp32 engines: kernels that add in another order flip a near-tie now and then
LEAST_HALF_AGREEMENT = 0.995  # of anything less precise (DESIGN.md, "Numerics")
LEAST_FIDELITY = 0.95  # of all: whoever sees too little of δ, or δ where there is none, trains on noise
LEAST_PSNR_DB = 80.0  # of pictures decoded from the same tokens: a fortieth of a grey level
LEAST_HALF_PSNR_DB = 40.0  # in half precision: about a grey level

STEP = PRESETS["easyrobust"]  # α = 0.1, l2, from Q(x): the smallest δ in use, 2.6e-4 a pixel at 224²
STAND_IN = "untrained convolutional classifier, seed 0 (a stand-in for a trained one)"
NO_TOKEN = -1  # where the encoder overflowed: equal to nothing


@dataclass(frozen=True)
class Agreement:
    """How an engine compares with the reference on the same pictures."""

    token_agreement: float  # share of equal indices
    psnr_db: float  # of the finite pictures decoded from the reference's tokens, peak 1
    largest_difference: float  # between those, of 1
    non_finite: int  # pictures with a NaN or infinity, on the way to tokens or back
    half: bool  # less precise than fp32
    fidelity: float | None = None  # see `changed`; both step from the reference's Q(x)
    own_fidelity: float | None = None  # the same, each stepping from its own Q(x)

    @property
    def shortfall(self) -> str:
        """What is not as it must be at this precision; empty where all is."""
        least = LEAST_HALF_AGREEMENT if self.half else LEAST_AGREEMENT
        least_psnr = LEAST_HALF_PSNR_DB if self.half else LEAST_PSNR_DB
        wrong = []
        if self.non_finite:
            wrong.append(f"{self.non_finite} pictures are not finite")
        if not self.token_agreement >= least:
            wrong.append(f"token agreement {self.token_agreement:.4%}, at least {least:.2%}")
        if self.fidelity is not None and not self.fidelity >= LEAST_FIDELITY:
            wrong.append(f"fidelity {self.fidelity:.2%}, at least {LEAST_FIDELITY:.0%}")
        if not self.psnr_db >= least_psnr:
            wrong.append(f"PSNR {self.psnr_db:.1f} dB, at least {least_psnr:g}")
        return "; ".join(wrong)

    @property
    def passed(self) -> bool:
        """Whether nothing falls short."""
        return not self.shortfall


@dataclass(frozen=True)
class Yardstick:
    """The reference's answers, to be computed once for many engines. All on the CPU.

    images fp32 [N,3,H,W] in 0..1; tokens int64 [N,h,w]; pictures fp32, decoded from them, not clipped; gradients
    fp32 [N,3,H,W] and changed bool [N,h,w], or None where fidelity is not asked for.
    """

    images: Tensor
    tokens: Tensor
    pictures: Tensor
    gradients: Tensor | None
    changed: Tensor | None

    @property
    def base(self) -> Tensor:
        """Q(x) as a trainer sees it: where the step starts and where the gradient is taken."""
        return self.pictures.clamp(0, 1)


def measure(
    reference: Engine,
    images: npt.NDArray[Any] | Tensor,
    gradients: Callable[[Tensor], Tensor] | None = None,
) -> Yardstick:
    """The yardstick for fp32 images [N,3,H,W] in 0..1, H and W multiples of f.

    `gradients` gives the loss's gradient at Q(x), from fp32 pictures to the same shape (`stand_in_gradients`).
    """
    x = torch.as_tensor(images)
    tokens = encode(reference, x)
    pictures = decode(reference, tokens)
    base = pictures.clamp(0, 1)
    if gradients is None:
        return Yardstick(x, tokens, pictures, None, None)
    g = gradients(base)
    return Yardstick(x, tokens, pictures, g, changed(reference, base, g))


def judge(engine: Engine, yardstick: Yardstick) -> Agreement:
    """An engine against the reference: token agreement of Q(x), fidelity, and pictures from the same tokens."""
    x, theirs = yardstick.images, yardstick.tokens
    tokens = encode(engine, x)
    pictures = decode(engine, theirs)
    finite = pictures.isfinite().flatten(1).all(1)
    difference = (pictures - yardstick.pictures)[finite]
    mse = float(difference.double().square().mean()) if len(difference) else float("nan")
    lost = (tokens == NO_TOKEN).flatten(1).any(1) | ~finite
    fidelity = own = None
    if yardstick.gradients is not None and yardstick.changed is not None:
        fidelity = jaccard(changed(engine, yardstick.base, yardstick.gradients), yardstick.changed)
        mine = decode(engine, tokens).nan_to_num().clamp(0, 1) if not lost.any() else yardstick.base
        own = jaccard(changed(engine, mine, yardstick.gradients), yardstick.changed)
    return Agreement(
        token_agreement=float((tokens == theirs).double().mean()),
        psnr_db=10 * float(np.log10(1 / max(mse, 1e-15))),
        largest_difference=float(difference.abs().max()) if len(difference) else float("nan"),
        non_finite=int(lost.sum()),
        half=engine.dtype != "fp32",
        fidelity=fidelity,
        own_fidelity=own,
    )


def compare(engine: Engine, reference: Engine, images: npt.NDArray[Any] | Tensor) -> Agreement:
    """Token agreement of Q(x), and PSNR of pictures decoded from the same tokens; no fidelity.

    images: fp32 [N,3,H,W] in 0..1, H and W multiples of f.
    """
    return judge(engine, measure(reference, images))


def changed(engine: Engine, base: Tensor, gradients: Tensor) -> Tensor:
    """Which tokens δ changes: bool [N,h,w], those of base + δ against those of base, both by this engine.

    The step is `easyrobust`'s, which starts at Q(x). Fidelity compares two engines from one base, the reference's
    Q(x): then all that differs is what their encoders see of δ. From its own Q(x) each engine starts elsewhere:
    a decoder in half precision moves pixels by more than δ does, other tokens lie near a tie there, and the
    overlap is small although every token may be right for the picture it belongs to (`own_fidelity`).
    """
    return encode(engine, base) != encode(engine, perturb(base, base, gradients, STEP))


def jaccard(ours: Tensor, theirs: Tensor) -> float:
    """|A ∩ B| / |A ∪ B| of two bool masks; 1 where both are empty."""
    union = int((ours | theirs).sum())
    return int((ours & theirs).sum()) / union if union else 1.0


def encode(engine: Engine, images: Tensor) -> Tensor:
    """Tokens int64 [N,h,w] on the CPU; NO_TOKEN throughout an image whose latents are not finite."""
    parts = torch.split(images, rows_at_once(engine, images.shape[2] * images.shape[3]))
    return torch.cat([engine.encode(part.to(engine.device)).cpu() for part in parts])


def decode(engine: Engine, indices: Tensor) -> Tensor:
    """Pictures fp32 on the CPU, not clipped."""
    parts = torch.split(indices, engine.batch)
    return torch.cat([engine.decode(part.to(engine.device)).float().cpu() for part in parts])


def stand_in_gradients(pictures: Tensor) -> Tensor:
    """∇L of a fixed, untrained convolutional classifier at fp32 pictures [N,3,H,W], its own answers as labels.

    What δ looks like depends on the classifier; one that is trained gives its own with `--gradients`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for wide, narrow, kernel in ((3, 32, 7), (32, 64, 3), (64, 128, 3)):
            layers += [nn.Conv2d(wide, narrow, kernel, stride=2, padding=kernel // 2), nn.ReLU()]
        classifier = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 1000))
    gradients: list[Tensor] = []
    for part in torch.split(pictures, 8):
        x = part.clone().requires_grad_()
        logits = classifier(x)
        loss = nn.functional.cross_entropy(logits, logits.argmax(1), reduction="sum")
        gradients += torch.autograd.grad(loss, x)
    return torch.cat(gradients)
