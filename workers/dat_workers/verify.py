"""Are the numbers right? Two engines, the same pictures, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dat_workers.engines import Engine

LEAST_AGREEMENT = 0.9999  # of fp32 engines: kernels that add in another order flip a near-tie now and then
LEAST_HALF_AGREEMENT = 0.995  # of half precision (DESIGN.md, "Numerics")
LEAST_PSNR_DB = 80.0  # of pictures decoded from the same tokens: a fortieth of a grey level
LEAST_HALF_PSNR_DB = 40.0  # in half precision: about a grey level


@dataclass(frozen=True)
class Agreement:
    """How an engine compares with the reference on the same pictures."""

    token_agreement: float  # share of equal indices
    psnr_db: float  # of the two pictures decoded from the reference's tokens, peak 1
    largest_difference: float  # between those, of 1
    non_finite: int  # pictures with a NaN or infinity
    half: bool

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
        if not self.psnr_db >= least_psnr:
            wrong.append(f"PSNR {self.psnr_db:.1f} dB, at least {least_psnr:g}")
        return "; ".join(wrong)

    @property
    def passed(self) -> bool:
        """Whether nothing falls short."""
        return not self.shortfall


def compare(engine: Engine, reference: Engine, images: npt.NDArray[Any] | torch.Tensor) -> Agreement:
    """Token agreement of Q(x), and PSNR of pictures decoded from the same tokens.

    images: fp32 [N,3,H,W] in 0..1, H and W multiples of f.
    """
    x = torch.as_tensor(images)
    equal = total = non_finite = 0
    squared, largest = 0.0, 0.0
    for batch in torch.split(x, reference.batch):
        ours = engine.encode(batch.to(engine.device)).cpu()
        tokens = reference.encode(batch.to(reference.device))
        theirs = tokens.cpu()
        equal += int((ours == theirs).sum())
        total += theirs.numel()
        a, b = engine.decode(theirs.to(engine.device)).cpu(), reference.decode(tokens).cpu()
        non_finite += int((~a.isfinite().flatten(1).all(1)).sum())
        squared += float((a - b).double().square().sum())
        largest = max(largest, float((a - b).abs().max()))
    psnr = 10 * float(np.log10(1 / max(squared / x.numel(), 1e-15)))
    return Agreement(equal / total, psnr, largest, non_finite, engine.dtype in ("fp16", "bf16"))
