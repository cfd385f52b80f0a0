"""Computes Q(x) and Q(x + δ) of a batch x (Algorithm 1, lines 3-5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from dat_client.aio import AsyncClient
from dat_client.calls.checks import choice, seconds, share
from dat_client.client import Client
from dat_client.errors import invalid, shown
from dat_client.torch._gradient import checked_modules, loss_gradient
from dat_client.torch._images import (
    checked_images,
    checked_reconstruction,
    float_dtype,
    from_wire,
    is_empty,
    normal_tensors,
    to_wire,
)
from dat_client.torch._outage import OUTAGE_S, Outages
from dat_client.wire.vocabulary import DEFAULTS, PRESETS

EASYROBUST_START = 0.8  # the probability with which the authors' code starts at a random point


@dataclass(frozen=True)
class Adversarial:
    """The result of `adversarial` for a batch; images are float [N,3,H,W] in 0..1 on the device of x.

    Attributes:
        reconstruction: x̂ = Q(x).
        adversarial: Q(x + δ).
        loss: the loss at the point where the gradient was taken, detached; the mean if loss_fn returned [N]; 0 for
            a batch of 0 images, for which loss_fn is not called and nothing is requested.
        tokens_changed: the share, 0..1, of the tokens in which Q(x + δ) differs from Q(x); None if the codec has no
            tokens.
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
    outage_s: float = OUTAGE_S,
    **parameters: Any,
) -> Adversarial:
    """Computes x̂ = Q(x), the gradient g = ∇L at x̂ (Eq. 7), and Q(x + δ) (Algorithm 1, lines 3-5).

        q = adversarial(client, x, lambda x_hat: F.cross_entropy(model(x_hat), labels), model=model)
        loss = F.cross_entropy(model(q.adversarial), labels)

    Computing g takes one forward and one backward pass of `model`. They change neither its buffers (BatchNorm
    statistics) nor `.grad` nor torch's random number generators. They keep the model's mode, so in `train()` mode
    BatchNorm normalises by the batch and dropout is active. They run under the caller's autocast and need no
    GradScaler. If the model uses gradient checkpointing, it must use use_reentrant=False.

    Args:
        x: [N,3,H,W] in 0..1 before normalisation, or uint8, on any device.
        loss_fn: called with x̂, float [N,3,H,W] in 0..1 on the device of x; returns the loss, a scalar or [N]. If
            the model expects normalised images, normalise inside loss_fn.
        model: the module or modules that `loss_fn` calls, whose buffers are restored after the backward pass. With
            [] no buffers are restored.
        reconstruction: Q(x), uint8 or float in 0..1 in the shape of x, if you already have it. This saves one of
            the two requests.
        reduction: how loss_fn reduces a scalar loss over the batch: `mean` or `sum`. The gradient that is sent is
            always that of the sum, so that a sample's δ does not depend on the batch size.
        random_start: the probability, 0..1, with which the gradient is taken at x̂ + r, where r has a random
            direction and the L2 length α; δ is then r + α·g/‖g‖₂, shortened to length α. None stands for 0.8 with
            preset `easyrobust` (the default), as in the authors' code, and for 0 otherwise. Above 0 it needs
            normalize="l2".
        generator: draws the random starts; it must be on the device of x. None stands for a generator that is
            seeded with `torch.initial_seed()`.
        gradient_dtype, timeout_s: as in `Client.discretize`; the timeout holds for each request.
        output_dtype: the datatype in which the server sends images: UINT8 (a quarter of FP32's bytes), FP16 or
            FP32.
        outage_s: how long in seconds to wait for a service that has answered before and is away now, instead of
            raising Unavailable after one `timeout_s`. While it waits, the logger `dat_client` warns once a minute.
        parameters: preset, base, alpha, normalize, epsilon, replace_fraction, seed, as in `Client.discretize`.

    Raises the errors of `Client.discretize`, and InvalidRequest for a loss that cannot be used.
    """
    answer_options: dict[str, Any] = {"output_dtype": output_dtype, "timeout_s": timeout_s}
    attack = Attack(
        client, model, reduction, random_start, generator, gradient_dtype, answer_options, parameters, outage_s
    )
    with normal_tensors():
        sent = to_wire(checked_images(x))
        if is_empty(sent):
            nothing = from_wire(sent, x.device, float_dtype(x))
            return Adversarial(nothing, nothing.clone(), torch.zeros((), device=x.device), None)
        if reconstruction is None:
            plain = attack.outages.outlast(lambda: client.discretize(sent, **answer_options))
            reconstruction = plain.reconstruction
        else:
            checked_reconstruction(reconstruction, x)
        x_hat = from_wire(reconstruction, x.device, float_dtype(x))
        request, loss = attack.request(x_hat, loss_fn)
        answer = attack.outages.outlast(lambda: client.discretize(sent, **request))
        adversarial_images = from_wire(answer.adversarial, x.device, float_dtype(x))
        return Adversarial(x_hat, adversarial_images, loss, answer.tokens_changed)


@dataclass
class Attack:
    """Computes lines 3 and 4 of Algorithm 1 for many batches with the same options.

    The fields are the arguments of `adversarial`; `answer_options` holds the output_dtype and timeout_s of each
    request. The constructor raises InvalidRequest for wrong arguments.
    """

    client: Client
    model: nn.Module | Iterable[nn.Module]
    reduction: str
    random_start: float | None
    generator: torch.Generator | None
    gradient_dtype: str
    answer_options: Mapping[str, Any]
    parameters: Mapping[str, Any]
    outage_s: float

    def __post_init__(self) -> None:
        if isinstance(self.client, str | AsyncClient):
            raise invalid("client", "a dat_client.Client", found=type(self.client).__name__)
        choice("reduction", self.reduction, ("mean", "sum"))
        self.outages = Outages(self.client, seconds("outage_s", self.outage_s))
        self.modules = checked_modules(self.model)
        self._start = RandomStart.from_parameters(self.random_start, self.parameters)

    def request(self, x_hat: Tensor, loss_fn: Callable[[Tensor], Any]) -> tuple[dict[str, Any], Tensor]:
        """Takes the gradient at x̂ or at a random start near it (line 3).

        Returns the arguments that `Client.discretize` needs besides the images to answer Q(x + δ) (line 4), and the
        loss.
        """
        start = self._start.draw(x_hat, self.generator)
        point = x_hat if start is None else start.to(x_hat.dtype)
        gradients, loss = loss_gradient(loss_fn, point, self.modules, self.reduction)
        parameters = self.parameters
        if start is not None:
            # The service takes one step from x̂, so δ must include the displacement of the start from x̂.
            gradients = self._start.delta(start - x_hat.float(), gradients)
            parameters = {**parameters, "normalize": "none", "alpha": 1.0}
        request = dict(
            gradients=gradients,
            gradient_dtype=self.gradient_dtype,
            outputs=["adversarial"],
            **self.answer_options,
            **parameters,
        )
        return request, loss


@dataclass(frozen=True)
class RandomStart:
    """The authors' random start: with `probability`, the attack begins at the L2 distance α from x̂."""

    probability: float
    alpha: float

    @classmethod
    def from_parameters(cls, probability: float | None, parameters: Mapping[str, Any]) -> RandomStart:
        """Takes alpha from the parameters or their preset; None for `probability` stands for the preset's.

        Raises InvalidRequest for a probability outside 0..1, or for one above 0 without normalize="l2".
        """
        not_none = {name: value for name, value in parameters.items() if value is not None}
        preset = str(not_none.get("preset", DEFAULTS["preset"]))
        step = {**PRESETS.get(preset, PRESETS[DEFAULTS["preset"]]), **not_none}  # the service refuses other presets
        normalize, alpha = step.get("normalize"), step.get("alpha")
        if probability is None:
            probability = EASYROBUST_START if preset == "easyrobust" and normalize == "l2" else 0.0
        if not share("random_start", probability):
            return cls(0.0, 0.0)
        if normalize != "l2":
            found = f"{probability:g} with normalize={shown(normalize)}"
            raise invalid("random_start", "0 unless normalize is 'l2'", found=found)
        if not isinstance(alpha, Real) or not 0 <= float(alpha) < math.inf:
            raise invalid("alpha", "a finite number, 0 or more", value=alpha)
        return cls(probability, float(alpha))

    def draw(self, x_hat: Tensor, generator: torch.Generator | None) -> Tensor | None:
        """Returns clip(x̂ + r, 0, 1), or None if the attack begins at x̂.

        As in the authors' code, one random number decides for the whole batch.
        """
        if not self.probability or not self.alpha:
            return None
        generator = generator or _own_generator(x_hat.device)
        if torch.rand((), generator=generator, device=x_hat.device).item() >= self.probability:
            return None
        noise = torch.randn(x_hat.shape, generator=generator, device=x_hat.device)
        return (x_hat.float() + self.alpha * _unit(noise)).clamp_(0, 1)

    def delta(self, displacement: Tensor, gradients: Tensor) -> Tensor:
        """Returns δ: `displacement` (start - x̂) plus the step from the start, shortened to L2 length α."""
        delta = displacement + self.alpha * _unit(gradients)
        flat: Tensor = delta.flatten(1).renorm(2, 0, self.alpha)
        return flat.view_as(delta)


def _unit(batch: Tensor) -> Tensor:
    """Returns each sample divided by its L2 norm (+ 1e-10, as in the authors' code)."""
    norms = torch.linalg.vector_norm(batch, dim=(1, 2, 3), keepdim=True)
    unit: Tensor = batch / (norms + 1e-10)
    return unit


_generators: dict[torch.device, tuple[int, torch.Generator]] = {}


def _own_generator(device: torch.device) -> torch.Generator:
    """Returns a generator with the seed of torch's global generator, which the attack must not advance."""
    seed = torch.initial_seed()
    if device not in _generators or _generators[device][0] != seed:
        _generators[device] = (seed, torch.Generator(device).manual_seed(seed))
    return _generators[device][1]
