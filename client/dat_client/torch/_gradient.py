"""∇L at x̂ (Algorithm 1, line 3), leaving the model and the random numbers as they were."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dat_client.errors import InvalidRequest, shown

# The summed loss is multiplied by this before the backward pass and the gradient divided by it: exact in fp32, and
# what keeps the fp16 half of a mixed-precision model from rounding small gradients to 0. torch.amp.GradScaler's
# 2^16 is for a mean over the batch; for a sum it overflowed every other step of a ResNet-18 with 8 images.
LOSS_SCALE = 2.0**8


@contextmanager
def untouched(modules: list[nn.Module]) -> Iterator[None]:
    """Inside, the modules work on copies of their buffers (BatchNorm statistics, queues); after, on their own.

    The buffers are exchanged rather than written back: a graph that waits for its backward pass may hold them.
    DistributedDataParallel steps aside: it takes a forward pass for the beginning of a step, and with
    `static_graph` one without a backward pass leaves the ranks with different weights (seen with torch 2.15).
    Raises InvalidRequest where a parameter was changed inside: that cannot be taken back.
    """
    owners = list({id(owner): owner for module in modules for owner in module.modules()}.values())
    parameters = [p for module in modules for p in module.parameters() if not p.is_inference()]
    versions = [p._version for p in parameters]
    originals = [(owner, dict(owner._buffers)) for owner in owners if owner._buffers]
    wrappers = [owner for owner in owners if isinstance(owner, nn.parallel.DistributedDataParallel)]
    patched = [wrapper.__dict__.get("forward") for wrapper in wrappers]
    copies: dict[int, Tensor] = {}
    try:
        for wrapper in wrappers:
            wrapper.__dict__["forward"] = wrapper.module.__call__
        for owner, buffers in originals:
            for name, buffer in buffers.items():
                if buffer is not None:
                    owner._buffers[name] = copies.setdefault(id(buffer), buffer.clone())
        yield
    finally:
        for wrapper, forward in zip(wrappers, patched, strict=True):
            wrapper.__dict__.pop("forward", None)
            if forward is not None:
                wrapper.__dict__["forward"] = forward
        for owner, buffers in originals:
            owner._buffers.clear()
            owner._buffers.update(buffers)
    if [p._version for p in parameters] != versions:
        raise _refused("changed the model's parameters; update a momentum encoder after the step, not in loss_fn")


def checked_modules(model: Any) -> list[nn.Module]:
    """The modules that an argument `model` names; raises InvalidRequest where it names something else."""
    modules = [model] if isinstance(model, nn.Module) or not isinstance(model, Iterable) else list(model)
    for module in modules:
        if not isinstance(module, nn.Module) or isinstance(module, torch.jit.ScriptModule):
            found, limit = type(module).__name__, "a torch.nn.Module or several, none of them a ScriptModule"
            raise InvalidRequest(f"model: must be {limit}, got {found}", field="model", value=found, limit=limit)
    return modules


def check_reduction(reduction: str) -> None:
    """Raises InvalidRequest unless it is `mean` or `sum`."""
    if reduction not in ("mean", "sum"):
        message = f"reduction: must be mean or sum, got {shown(reduction)}"
        raise InvalidRequest(message, field="reduction", value=reduction, limit="mean or sum")


def loss_gradient(
    loss_fn: Callable[[Tensor], Any], images: Tensor, modules: list[nn.Module], reduction: str
) -> tuple[Tensor, Tensor]:
    """The gradient of the batch's summed loss at `images` [N,3,H,W], fp32, and what `loss_fn` gave (a scalar).

    `reduction` says what a scalar loss is over the batch: the `mean`, whose gradient is taken N times, or the
    `sum`. A loss [N] is summed. Raises InvalidRequest where the loss is none, or not finite; where it is finite and
    its gradient is not (fp16 overflows now and then, and a run must live on), those images get the gradient 0 and
    a warning is given. One forward and one backward pass in any case: ranks with collectives inside stay in step.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        _same_random_numbers(images, modules),
        untouched(modules),
    ):
        leaf = images.detach().clone().requires_grad_()
        loss = _checked_loss(loss_fn(leaf), len(leaf))
        # N · mean starts the backward pass at exactly what a summed loss starts it at
        total = loss.float().sum() if loss.ndim or reduction == "sum" else loss.float() * len(leaf)
        scale = 1.0 if loss.dtype == torch.float16 else LOSS_SCALE
        (gradient,) = torch.autograd.grad(total * scale, leaf, allow_unused=True)
    if gradient is None:
        raise _refused("does not depend on the images that it was given")
    value = loss.detach().float().mean()
    gradient = gradient.float() / scale
    finite = gradient.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        bad = [i for i, good in enumerate(finite.tolist()) if not good]
        if not bool(value.isfinite()):
            raise _refused(f"is {value.item():g}")
        message = f"the attack's gradient is not finite for images {bad[:8]} of {len(images)}: no δ for them"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        gradient = gradient.where(finite[:, None, None, None], 0.0)
    return gradient, value


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
