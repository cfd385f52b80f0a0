"""Which layer overflows: for `dat codecs verify`, when a half precision picture is no picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def first_non_finite(network: nn.Module, run: Callable[[], object]) -> str | None:
    """Name and kind of the first module of `network` whose output holds a NaN or infinity while `run()` runs it.

    >>> first_non_finite(network, lambda: network.pictures(z))  # doctest: +SKIP
    'decoder.up.0.block.1.conv2 (Convolution)'

    "First" is the order in which modules finish: a block is named only where all its layers were finite and their
    sum is not. None where everything is finite. Not for use under CUDA graphs: it waits for the GPU at each layer.
    """
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, object], None]:
        def hook(module: nn.Module, _: Any, output: object) -> None:
            if not found and isinstance(output, Tensor) and output.is_floating_point() and not finite(output):
                found.append(f"{name} ({type(module).__name__})")

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in network.named_modules() if name]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def finite(x: Tensor) -> bool:
    """Whether all of `x` is."""
    return bool(torch.isfinite(x).all())
