"""Computes ∇L at x̂ (Algorithm 1, line 3) without changing the model or the random number generators."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dat_client.errors import InvalidRequest, invalid

# The summed loss is multiplied by this factor before the backward pass, and the gradient is divided by it after.
# A power of two is exact in fp32. The factor keeps the fp16 part of a mixed-precision model from rounding small
# gradients to 0. torch.amp.GradScaler uses 2^16 for the mean over a batch; with the sum over a batch, 2^16
# overflowed in every second step of a ResNet-18 with 8 images.
LOSS_SCALE = 2.0**8


@contextmanager
def untouched(modules: list[nn.Module]) -> Iterator[None]:
    """Replaces the modules' buffers (BatchNorm statistics, queues) by copies inside the `with` block.

    After the block the modules get their original buffer objects back, and the parameters their `.grad`. The values
    are not copied back instead, because a graph that waits for its backward pass may hold the original objects.
    DistributedDataParallel is bypassed: it takes each forward pass for the beginning of a training step, and with
    `static_graph` a forward pass without a backward pass leaves the ranks with different weights (observed with
    torch 2.15). Raises InvalidRequest if the block changed a parameter, because that cannot be undone.
    """
    owners = list({id(owner): owner for module in modules for owner in module.modules()}.values())
    parameters = [p for module in modules for p in module.parameters() if not p.is_inference()]
    versions = [p._version for p in parameters]
    grads = [(p, p.grad) for p in parameters]
    originals = [(owner, dict(owner._buffers)) for owner in owners if owner._buffers]
    wrappers = [owner for owner in owners if isinstance(owner, nn.parallel.DistributedDataParallel)]
    patched = [wrapper.__dict__.get("forward") for wrapper in wrappers]
    copies: dict[int, Tensor] = {}
    try:
        for parameter in parameters:
            parameter.grad = None
        for wrapper in wrappers:
            wrapper.__dict__["forward"] = wrapper.module.__call__
        for owner, buffers in originals:
            for name, buffer in buffers.items():
                if buffer is not None:
                    owner._buffers[name] = copies.setdefault(id(buffer), buffer.clone())
        yield
    finally:
        for parameter, grad in grads:
            parameter.grad = grad
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
    """Returns `model` as a list of modules; raises InvalidRequest unless all are modules, and no ScriptModule."""
    modules = [model] if isinstance(model, nn.Module) or not isinstance(model, Iterable) else list(model)
    for module in modules:
        if not isinstance(module, nn.Module) or isinstance(module, torch.jit.ScriptModule):
            limit = "a torch.nn.Module or several of them, none a ScriptModule"
            raise invalid("model", limit, found=type(module).__name__)
        if any(parameter.is_inference() for parameter in module.parameters()):
            limit, hint = "parameters that can have gradients", "make the model outside torch.inference_mode()"
            raise invalid("model", limit, found="parameters made in torch.inference_mode()", hint=hint)
    return modules


def loss_gradient(
    loss_fn: Callable[[Tensor], Any], images: Tensor, modules: list[nn.Module], reduction: str
) -> tuple[Tensor, Tensor]:
    """Returns the gradient of the batch's summed loss at `images` [N,3,H,W], in fp32, and the mean loss (a scalar).

    `reduction` says how loss_fn reduced a scalar loss over the batch: `mean`, whose gradient is then multiplied by
    N, or `sum`. A loss [N] is summed. Raises InvalidRequest if the loss has a wrong type or shape, does not depend
    on the images, or is not finite. If the loss is finite but the gradient of some images is not, these images get
    the gradient 0 and a RuntimeWarning names them: an fp16 overflow is rare, and must not end a training run. There
    is always exactly one forward and one backward pass, so that all ranks of a model with collectives call them
    equally often.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        _restored_generators(images, modules),
        untouched(modules),
    ):
        leaf = images.detach().clone().requires_grad_()
        loss = _loss_at(leaf, loss_fn, modules)
        # The backward pass of N · mean begins with the same value as the backward pass of a summed loss.
        total = loss.float().sum() if loss.ndim or reduction == "sum" else loss.float() * len(leaf)
        scale = 1.0 if loss.dtype == torch.float16 else LOSS_SCALE
        (gradient,) = torch.autograd.grad(total * scale, leaf, allow_unused=True)
    if gradient is None:
        raise _refused("does not depend on the images")
    value = loss.detach().float().mean()
    gradient = gradient.float() / scale
    finite = gradient.isfinite().flatten(1).all(1)
    if not bool(finite.all() & value.isfinite()):
        if not bool(value.isfinite()):
            raise _refused(f"is {value.item():g}, must be finite")
        overflowed = [i for i, is_finite in enumerate(finite.tolist()) if not is_finite]
        where = f"images {overflowed[:8]} of {len(images)}"
        message = f"the attack's gradient is not finite for {where}: it counts as 0 there"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        gradient = gradient.where(finite[:, None, None, None], 0.0)
    return gradient, value


def _restored_generators(images: Tensor, modules: list[nn.Module]) -> AbstractContextManager[None]:
    """Returns a context that restores the random number generators (used by dropout) when it is left.

    These are the generators of the CPU and of the devices of the images and parameters.
    """
    devices = {images.device, *(p.device for module in modules for p in module.parameters())}
    device_type = next((d.type for d in devices if d.type != "cpu"), "cuda")
    indices = sorted({d.index or 0 for d in devices if d.type == device_type})
    return torch.random.fork_rng(indices, device_type=device_type)


def _loss_at(leaf: Tensor, loss_fn: Callable[[Tensor], Any], modules: list[nn.Module]) -> Tensor:
    """Returns the loss at `leaf` [N,3,H,W]. Raises InvalidRequest for one that cannot be used."""
    try:
        loss = loss_fn(leaf)
    except RuntimeError as error:
        dtypes = {p.dtype for module in modules for p in module.parameters() if p.dtype.is_floating_point}
        if dtypes and leaf.dtype not in dtypes:
            named = " and ".join(sorted(map(str, dtypes)))
            hint = "convert the images before (.float(), .to(...)), or x̂ inside loss_fn"
            error.add_note(f"x̂ has the dtype of the images, {leaf.dtype}, and the model has {named}: {hint}")
        raise
    if leaf.grad is not None:
        raise InvalidRequest(
            "loss_fn: it calls backward(), must only compute the loss and return it: remove backward(), "
            "optimizer.step() and zero_grad() from it; the gradient at the images is taken for you",
            field="loss_fn",
        )
    return _checked_loss(loss, len(leaf))


def _checked_loss(loss: Any, batch: int) -> Tensor:
    if isinstance(loss, Mapping):
        raise _refused(f"is a {type(loss).__name__}; return one loss, for example the sum of its values")
    if not isinstance(loss, Tensor) or not (loss.ndim == 0 or loss.shape == (batch,)):
        found = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise _refused(f"is {found}, must be a tensor: a scalar, or one value for each image, [{batch}]")
    if not loss.requires_grad:
        cure = "compute it from the images that loss_fn gets, without torch.no_grad(), .detach() and .item()"
        raise _refused(f"does not depend on the images (it has no gradient): {cure}")
    if loss.is_complex():
        raise _refused(f"is {loss.dtype}, must be real: return its .abs() or .real")
    return loss


def _refused(problem: str) -> InvalidRequest:
    return InvalidRequest(f"loss_fn: the loss {problem}", field="loss_fn")
