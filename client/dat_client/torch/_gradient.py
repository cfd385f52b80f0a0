"""∇L at x̂ (Algorithm 1, line 3), leaving the model and the random numbers as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidRequest, shown

# The loss is multiplied by a power of two before the backward pass and the gradient divided by it: exact in fp32,
# and what keeps the fp16 half of a mixed-precision model from rounding a small gradient to 0. 2^16 is where
# torch.amp.GradScaler begins; where it overflows, the next one is tried.
LOSS_SCALES = (2.0**16, 2.0**8, 1.0)


@contextmanager
def untouched(model: nn.Module | Iterable[nn.Module]) -> Iterator[None]:
    """Inside, `model` works on copies of its buffers (BatchNorm statistics, queues); after, it has its own again.

    The buffers are exchanged rather than written back: a graph that waits for its backward pass may hold them.
    DistributedDataParallel steps aside: it takes a forward pass for the beginning of a step, and with
    `static_graph` one without a backward pass leaves the ranks with different weights (seen with torch 2.15).
    """
    modules = [model] if isinstance(model, nn.Module) else list(model)
    owners = {id(owner): owner for module in modules for owner in module.modules()}
    originals = [(owner, dict(owner._buffers)) for owner in owners.values() if owner._buffers]
    parallel = [owner for owner in owners.values() if isinstance(owner, nn.parallel.DistributedDataParallel)]
    copies: dict[int, Tensor] = {}
    try:
        for wrapper in parallel:
            wrapper.__dict__["forward"] = wrapper.module.__call__
        for owner, buffers in originals:
            for name, buffer in buffers.items():
                if buffer is not None:
                    owner._buffers[name] = copies.setdefault(id(buffer), buffer.clone())
        yield
    finally:
        for wrapper in parallel:
            wrapper.__dict__.pop("forward", None)
        for owner, buffers in originals:
            owner._buffers.clear()
            owner._buffers.update(buffers)


def loss_gradient(
    loss_fn: Callable[[Tensor], Any], images: Tensor, model: nn.Module | Iterable[nn.Module], reduction: str
) -> tuple[Tensor, Tensor]:
    """The gradient of the batch's summed loss at `images` [N,3,H,W], fp32, and what `loss_fn` gave (a scalar).

    `reduction` says what a scalar loss is over the batch: the `mean`, whose gradient is taken N times, or the
    `sum`. A loss [N] is summed. Raises InvalidRequest where the loss is none or its gradient is not finite.
    """
    if reduction not in ("mean", "sum"):
        message = f"reduction: must be mean or sum, got {shown(reduction)}"
        raise InvalidRequest(message, field="reduction", value=reduction, limit="mean or sum")
    modules = [model] if isinstance(model, nn.Module) else list(model)
    bad: list[int] = []
    value = torch.tensor(0.0)
    for scale in LOSS_SCALES:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            _same_random_numbers(images, modules),
            untouched(modules),
        ):
            leaf = images.detach().clone().requires_grad_()
            loss = _checked_loss(loss_fn(leaf), len(leaf))
            # N · mean starts the backward pass at exactly what a summed loss starts it at
            total = loss.sum() if loss.ndim or reduction == "sum" else loss * len(leaf)
            (gradient,) = torch.autograd.grad(total * scale, leaf, allow_unused=True)
        if gradient is None:
            raise _refused("does not depend on the images that it was given")
        value = loss.detach().float().mean()
        gradient = gradient.float() / scale
        finite = gradient.isfinite().flatten(1).all(1)
        if bool(finite.all()):
            return gradient, value
        bad = [i for i, good in enumerate(finite.tolist()) if not good]
    raise _refused(f"is {value.item():g}, its gradient not finite for images {bad[:8]} of {len(images)}")


def _same_random_numbers(images: Tensor, modules: list[nn.Module]) -> AbstractContextManager[None]:
    """Afterwards the generators of the CPU and of each device in use stand where they stood (dropout draws)."""
    devices = {images.device, *(p.device for module in modules for p in module.parameters())}
    kind = next((d.type for d in devices if d.type != "cpu"), "cuda")
    indices = sorted({d.index or 0 for d in devices if d.type == kind})
    return torch.random.fork_rng(indices, device_type=kind)


def _checked_loss(loss: Any, batch: int) -> Tensor:
    if isinstance(loss, Mapping):
        raise _refused(f"is a {type(loss).__name__}; add its values up")
    if not isinstance(loss, Tensor) or not (loss.ndim == 0 or loss.shape == (batch,)):
        found = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise _refused(f"is {found}, must be a scalar or one value an image, [{batch}]")
    if not loss.requires_grad:
        raise _refused("does not depend on the images that it was given (no gradient)")
    return loss


def _refused(problem: str) -> InvalidRequest:
    return InvalidRequest(f"loss_fn: the loss {problem}", field="loss_fn")
