"""Where half precision overflows: the first layer that turns finite numbers into infinity."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.engines.config import EngineConfig
from dat_workers.engines.factory import create


@dataclass(frozen=True)
class Overflow:
    """A layer whose output is not finite, though all before it is."""

    layer: str
    largest: float  # finite number that went in, in absolute value

    def __str__(self) -> str:
        return f"{self.layer}, into which numbers up to {self.largest:.3g} go"


def find_overflow(
    model: VQGAN, images: Tensor, indices: Tensor, *, device: str = "auto", dtype: str = "fp16"
) -> Overflow | None:
    """The first layer of the torch engine that overflows on images fp32 [N,3,H,W] or their indices [N,h,w].

    The engine runs one image at a time and with none of its tricks, as a fused kernel has no layers to ask; None
    where nothing overflows so.
    """
    engine: Any = create(EngineConfig("torch", device, dtype, "none"), copy.deepcopy(model))
    found: list[Overflow] = []
    for name, module in engine.model.named_modules():
        module.register_forward_hook(_watch(name, found))
    for image, tokens in zip(torch.split(images, 1), torch.split(indices, 1), strict=True):
        engine.encode(image.to(engine.device))
        engine.decode(tokens.to(engine.device))
        if found:
            return found[0]
    return None


def _watch(name: str, found: list[Overflow]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if found or bool(output.isfinite().all()):
            return
        x = inputs[0].float()
        finite = x.isfinite()
        layer = name
        if not finite.all():  # nothing before gave infinity: it arose between two layers, in their parent's sums
            layer = f"{name.rpartition('.')[0] or 'the network'}, before its {name.rpartition('.')[2]}"
        found.append(Overflow(layer, float(x[finite].abs().max()) if finite.any() else float("inf")))

    return hook
