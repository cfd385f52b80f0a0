"""Lines 3-5 of Algorithm 1: from a batch x to Q(x) and Q(x + δ)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from dat_client.aio import AsyncClient
from dat_client.client import Client
from dat_client.errors import InvalidRequest, shown

from ._gradient import check_reduction, checked_modules, loss_gradient
from ._pictures import check_reconstruction, checked, float_dtype, from_wire, to_wire

ALPHA = 0.1  # of both presets
EASYROBUST_START = 0.8  # how often the authors' code starts at a random point


@dataclass(frozen=True)
class Adversarial:
    """What `adversarial` made of a batch; pictures are float [N,3,H,W] in 0..1 on the device of x.

    Attributes:
        reconstruction: x̂ = Q(x).
        adversarial: Q(x + δ).
        loss: what `loss_fn` gave where the gradient was taken (the mean of one value an image), detached.
        tokens_changed: the share of the tokens that the step changed; None where the codec has no tokens.
    """

    reconstruction: Tensor
    adversarial: Tensor
    loss: Tensor
    tokens_changed: float | None


def adversarial(
    client: Client,
    x: Tensor,
    loss_fn: Callable[[Tensor], Any],
    *,
    model: nn.Module | Iterable[nn.Module],
    reconstruction: Tensor | None = None,
    reduction: str = "mean",
    random_start: float | None = None,
    generator: torch.Generator | None = None,
    gradient_dtype: str = "FP16",
    output_dtype: str = "UINT8",
    timeout_s: float | None = None,
    **parameters: Any,
) -> Adversarial:
    """Algorithm 1, lines 3-5: x̂ = Q(x), g = ∇L at x̂ (Eq. 7), Q(x + δ); minimising is left to the caller.

        q = adversarial(client, x, lambda x_hat: F.cross_entropy(model(x_hat), labels), model=model)
        loss = F.cross_entropy(model(q.adversarial), labels)

    The extra pass leaves `model` as it was: buffers (BatchNorm statistics), `.grad`, the random number generators
    of torch; its mode too, so BatchNorm normalises by the batch and dropout drops in `train()`. It runs under the
    caller's autocast; a GradScaler is not needed for it. Gradient checkpointing must be use_reentrant=False.

    Args:
        x: [N,3,H,W] in 0..1 before normalisation, or uint8, on any device.
        loss_fn: from x̂, float [N,3,H,W] in 0..1 on the device of x, to the loss: a scalar, or [N]. Normalise in it.
        model: the module, or modules, that `loss_fn` calls; [] protects nothing.
        reconstruction: Q(x) where it is known already, as x; saves one of the two requests.
        reduction: what a scalar loss is over the batch, `mean` or `sum`. `normalize="none"` steps along the
            gradient of the sum, so that a sample's δ does not depend on how many others there are.
        random_start: how often, 0..1, the gradient is taken at x̂ + r, r of random direction and of L2 length α,
            and δ is r + α·g/‖g‖₂ brought back to length α at most. None: 0.8 for preset `easyrobust`, as in the
            authors' code, else 0. Only with normalize="l2".
        generator: draws the random starts, on the device of x; None for one seeded by `torch.initial_seed()`.
        gradient_dtype, timeout_s: as in `Client.discretize`.
        output_dtype: how pictures travel back: UINT8 (a quarter of the bytes), FP16 or FP32.
        parameters: preset, base, alpha, normalize, epsilon, replace_fraction, seed, as in `Client.discretize`.

    Raises as `Client.discretize`, and InvalidRequest for a loss that is none.
    """
    check_client(client)
    check_reduction(reduction)
    modules = checked_modules(model)
    sent = to_wire(checked(x))
    start = RandomStart.from_parameters(random_start, parameters)
    if reconstruction is None:
        answer = client.discretize(sent, output_dtype=output_dtype, timeout_s=timeout_s)
        reconstruction = answer.reconstruction
    else:
        check_reconstruction(reconstruction, x)
    x_hat = from_wire(reconstruction, x.device, float_dtype(x))
    step = attack(x_hat, loss_fn, modules, reduction, start, generator, parameters)
    answer = client.discretize(
        sent,
        step.gradients,
        gradient_dtype=gradient_dtype,
        outputs=["adversarial"],
        output_dtype=output_dtype,
        timeout_s=timeout_s,
        **step.parameters,
    )
    made = from_wire(answer.adversarial, x.device, float_dtype(x))
    return Adversarial(x_hat, made, step.loss, answer.tokens_changed)


def check_client(client: Any) -> None:
    """Raises InvalidRequest for an address or an AsyncClient in the place of a Client."""
    if isinstance(client, (str, AsyncClient)):
        found = type(client).__name__
        raise InvalidRequest(f"client: must be a dat_client.Client, got {found}", field="client", value=found)


@dataclass(frozen=True)
class RandomStart:
    """The authors' random start: with `probability` the batch begins at L2 distance |α| from x̂."""

    probability: float = 0.0
    alpha: float = ALPHA

    @classmethod
    def from_parameters(cls, probability: float | None, parameters: Mapping[str, Any]) -> RandomStart:
        """Raises InvalidRequest for a probability outside 0..1, or beside a `normalize` that is not `l2`."""
        easyrobust = parameters.get("preset") == "easyrobust"
        normalize = parameters.get("normalize") or ("l2" if easyrobust else "none")
        if probability is None:
            probability = EASYROBUST_START if easyrobust and normalize == "l2" else 0.0
        if isinstance(probability, bool) or not isinstance(probability, (int, float)) or not 0 <= probability <= 1:
            message = f"random_start: must be a probability, 0..1, got {shown(probability)}"
            raise InvalidRequest(message, field="random_start", value=probability, limit="0..1")
        if probability and normalize != "l2":
            message = f"random_start: {probability:g} beside normalize={shown(normalize)}, needs normalize='l2'"
            raise InvalidRequest(message, field="random_start", value=probability, limit="normalize='l2'")
        alpha = parameters.get("alpha")
        if probability and alpha is not None and not (isinstance(alpha, Real) and math.isfinite(alpha)):
            message = f"alpha: must be a finite number, got {shown(alpha)}"
            raise InvalidRequest(message, field="alpha", value=alpha, limit="a finite number")
        return cls(probability, ALPHA if alpha is None or not probability else float(alpha))

    def draw(self, x_hat: Tensor, generator: torch.Generator | None) -> Tensor | None:
        """clip(x̂ + r, 0, 1), or None where the coin says no. One coin for the whole batch, as the authors do."""
        if not self.probability or not self.alpha:
            return None
        generator = generator or _own_generator(x_hat.device)
        if torch.rand((), generator=generator, device=x_hat.device).item() >= self.probability:
            return None
        noise = torch.randn(x_hat.shape, generator=generator, device=x_hat.device)
        return (x_hat.float() + abs(self.alpha) * _unit(noise)).clamp_(0, 1)

    def delta(self, moved: Tensor, gradients: Tensor) -> Tensor:
        """δ of a batch that started elsewhere: `moved` = start - x̂, plus the step, at most |α| long."""
        delta = moved + self.alpha * _unit(gradients)
        flat: Tensor = delta.flatten(1).renorm(2, 0, abs(self.alpha))
        return flat.view_as(delta)


@dataclass(frozen=True)
class Step:
    """What a gradient pass leaves for the service to do."""

    gradients: Tensor
    parameters: Mapping[str, Any]
    loss: Tensor


def attack(
    x_hat: Tensor,
    loss_fn: Callable[[Tensor], Any],
    modules: list[nn.Module],
    reduction: str,
    start: RandomStart,
    generator: torch.Generator | None,
    parameters: Mapping[str, Any],
) -> Step:
    """Line 3 of Algorithm 1 at x̂, or at a random start beside it, and the parameters of the request for line 4."""
    begun = start.draw(x_hat, generator)
    gradients, loss = loss_gradient(loss_fn, x_hat if begun is None else begun.to(x_hat.dtype), modules, reduction)
    if begun is None:
        return Step(gradients, parameters, loss)
    # The service takes one step from x̂; from elsewhere, the way there is part of δ.
    delta = start.delta(begun - x_hat.float(), gradients)
    return Step(delta, {**parameters, "normalize": "none", "alpha": 1.0}, loss)


def _unit(batch: Tensor) -> Tensor:
    """Each sample divided by its L2 norm (+ 1e-10, as in the authors' code)."""
    norms = torch.linalg.vector_norm(batch, dim=(1, 2, 3), keepdim=True)
    unit: Tensor = batch / (norms + 1e-10)
    return unit


_generators: dict[torch.device, tuple[int, torch.Generator]] = {}


def _own_generator(device: torch.device) -> torch.Generator:
    """A generator beside the global one, which the attack must leave alone; a new one when that has a new seed."""
    seed = torch.initial_seed()
    if device not in _generators or _generators[device][0] != seed:
        _generators[device] = (seed, torch.Generator(device).manual_seed(seed))
    return _generators[device][1]
