"""Finds the layer at which half precision overflows: the first one that turns finite numbers into infinity."""

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
    """A layer whose output is not finite, although the outputs of all layers before it are."""

    layer: str
    largest_input: float  # the largest absolute value among its finite inputs

    def __str__(self) -> str:
        return f"{self.layer}, whose inputs reach {self.largest_input:.3g}"


def find_overflow(
    model: VQGAN, images: Tensor, indices: Tensor, *, device: str = "auto", dtype: str = "fp16"
) -> Overflow | None:
    """Returns the first layer that overflows on images fp32 [N,3,H,W] or on their indices [N,h,w], or None.

    The torch engine computes one image at a time, without any of its tricks: a fused kernel has no layers to watch.
    """
    engine: Any = create(EngineConfig("torch", device, dtype, "none"), copy.deepcopy(model))
    overflows: list[Overflow] = []
    for name, module in engine.model.named_modules():
        module.register_forward_hook(_record_overflow(name, overflows))
    for image, tokens in zip(torch.split(images, 1), torch.split(indices, 1), strict=True):
        engine.encode(image.to(engine.device))
        engine.decode(tokens.to(engine.device))
        if overflows:
            return overflows[0]
    return None


def _record_overflow(
    name: str, overflows: list[Overflow]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if overflows or bool(output.isfinite().all()):
            return
        x = inputs[0].float()
        finite = x.isfinite()
        layer = name
        if not finite.all():  # no layer returned infinity: it arose between two layers, in a sum of their parent
            layer = f"{name.rpartition('.')[0] or 'the network'}, before its {name.rpartition('.')[2]}"
        overflows.append(Overflow(layer, float(x[finite].abs().max()) if finite.any() else float("inf")))

    return hook
