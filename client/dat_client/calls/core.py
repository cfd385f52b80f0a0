"""Turns the arguments of a call into a request, and the response to it into arrays.

These functions open no socket, so every transport can use them.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dat_client import wire
from dat_client.calls.arrays import Kind, images_tensor, indices_tensor
from dat_client.calls.checks import choice
from dat_client.calls.gradients import gradient_tensors
from dat_client.errors import invalid
from dat_client.wire.vocabulary import (
    ATTACK_IS_MISSING,
    OUTPUT_DTYPES,
    OUTPUTS,
    PARAMETERS,
    step_without_attack,
    violated_limit,
)

NAMED_PARAMETERS = ("preset", "base", "normalize")  # their values are names

#: torch.Tensor if the caller passed tensors, else numpy.ndarray.
Array: TypeAlias = Any


@dataclass(frozen=True, repr=False)
class Discretized:
    """The codec's answer for a batch; outputs that were not requested are None.

    Attributes:
        reconstruction: Q(x), [N,3,H,W], in the dtype of the images (or `output_dtype`).
        indices: the tokens of Q(x), [N,h,w]. numpy arrays are uint16 or int32, as the server sent them; torch
            tensors are int64 instead of uint16.
        adversarial: Q(x + δ), in the shape and dtype of `reconstruction`.
        adversarial_indices: the tokens of Q(x + δ), in the shape and dtype of `indices`.
        codec: the name of the codec that answered.
        fingerprint: identifies the weights of that codec; None if the server sent no fingerprint.
        tokens_changed: the share, 0..1, of the tokens in which Q(x + δ) differs from Q(x); None without an
            adversarial output.
    """

    reconstruction: Array | None = None
    indices: Array | None = None
    adversarial: Array | None = None
    adversarial_indices: Array | None = None
    codec: str = ""
    fingerprint: str | None = None
    tokens_changed: float | None = None

    def __repr__(self) -> str:
        parts = [
            f"{name}={str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
            for name in OUTPUTS
            if (value := getattr(self, name)) is not None
        ]
        parts += [f"codec={self.codec!r}", f"fingerprint={self.fingerprint!r}"]
        if self.tokens_changed is not None:
            parts.append(f"tokens_changed={self.tokens_changed:.3g}")
        return f"Discretized({', '.join(parts)})"


@dataclass(frozen=True)
class Exchange:
    """An answered inference request, and the times and sizes from which a profile is computed.

    Attributes:
        timing: the seconds that the server spent in each stage (body, queue, codec, total); empty if the server
            reports no times.
        begun_s: time.perf_counter() at the beginning of the attempt that was answered.
        seconds: the time from `begun_s` until the whole answer had arrived.
        sent, received: the size in bytes of the request's body and of the answer's body.
    """

    response: wire.Response
    timing: Mapping[str, float]
    begun_s: float
    seconds: float
    sent: int
    received: int


def new_id() -> str:
    """Returns a random request id (UUID 4), unique among all processes."""
    return uuid.uuid4().hex


@dataclass(frozen=True)
class Call:
    """An inference request whose arguments have been checked. Its answer is returned as arrays of `kind`.

    `image_shape` is the shape [N,3,H,W] of the images; None for encoded pictures and for tokens. `prepared_s` is
    the number of seconds that checking and converting the arguments took.
    """

    inputs: dict[str, npt.NDArray[Any]]
    parameters: dict[str, Any]
    outputs: tuple[str, ...]
    kind: Kind
    image_shape: tuple[int, ...] | None
    prepared_s: float
    id: str = field(default_factory=new_id)

    @property
    def batch(self) -> int:
        """The number N of images, pictures or token maps in the batch."""
        return len(next(iter(self.inputs.values())))

    def encode(self) -> wire.Encoded:
        """Returns the buffers of the request and the length of its JSON part."""
        requested = [wire.RequestedOutput(name) for name in self.outputs]
        return wire.encode_request(self.inputs, id=self.id, parameters=self.parameters, outputs=requested)


def discretize_call(
    images: Any,
    gradients: Any,
    gradient_dtype: str,
    outputs: Sequence[str] | None,
    output_dtype: str | None,
    parameters: Mapping[str, Any],
) -> Call:
    """Checks the arguments of `Client.discretize` and returns the request; raises InvalidRequest for wrong ones."""
    begun_s = time.perf_counter()
    tensor, kind = images_tensor(images)
    shape = tensor.shape if tensor.ndim == 4 else None
    inputs = {"images": tensor}
    if gradients is not None:
        inputs |= gradient_tensors(gradients, shape, gradient_dtype)
    checked = _checked_parameters(parameters, output_dtype)
    if idle := step_without_attack(checked, gradients is not None):
        raise invalid(
            ", ".join(idle), "absent", found="a value without an attack", hint=f"pass {ATTACK_IS_MISSING}"
        )
    return Call(inputs, checked, _checked_outputs(outputs), kind, shape, time.perf_counter() - begun_s)


def decode_call(indices: Any, output_dtype: str | None, parameters: Mapping[str, Any]) -> Call:
    """Checks the arguments of `Client.decode` and returns the request; raises InvalidRequest for wrong ones."""
    begun_s = time.perf_counter()
    tensor, kind = indices_tensor(indices)
    checked = _checked_parameters(parameters, output_dtype)
    return Call({"indices": tensor}, checked, ("reconstruction",), kind, None, time.perf_counter() - begun_s)


def _checked_outputs(outputs: Sequence[str] | None) -> tuple[str, ...]:
    if outputs is None:
        return ()
    names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    if not names or any(name not in OUTPUTS for name in names) or len(set(names)) != len(names):
        raise invalid("outputs", f"some of {', '.join(OUTPUTS)}, each once", value=list(names))
    return names


def _checked_parameters(parameters: Mapping[str, Any], output_dtype: str | None) -> dict[str, Any]:
    """Returns the parameters that are not None.

    Raises InvalidRequest for values that JSON cannot express, and for numbers outside the limits. Names, and the
    choices of a parameter that is a name, are checked by the server alone: it may be newer and know more of them.
    """
    checked: dict[str, Any] = {}
    for name, value in parameters.items():
        if isinstance(value, np.generic):
            value = value.item()
        if value is None:
            continue
        is_scalar = isinstance(value, bool | int | float | str)
        if not is_scalar or (isinstance(value, float) and not math.isfinite(value)):
            raise invalid(name, "a finite number, a string, True or False", value=value)
        wrong_name = isinstance(value, str) and name in NAMED_PARAMETERS
        if name in PARAMETERS and not wrong_name and (limit := violated_limit(name, value)):
            raise invalid(name, limit, value=value)
        checked[name] = value
    if output_dtype is not None:
        checked["output_dtype"] = choice("output_dtype", output_dtype, OUTPUT_DTYPES)
    return checked


def discretized(call: Call, response: wire.Response) -> Discretized:
    """Returns the contents of a response that `answers.read_response` has checked, as arrays of the call's kind."""
    return Discretized(
        codec=response.model_name,
        fingerprint=fingerprint_of(response),
        tokens_changed=tokens_changed_of(response),
        **{name: call.kind.restore(array) for name, array in response.outputs.items()},
    )


def fingerprint_of(response: wire.Response) -> str | None:
    """Returns the fingerprint of the weights that answered.

    If the server sends no fingerprint, returns the model's version, or None without a version.
    """
    fingerprint = response.parameters.get("fingerprint")
    return fingerprint if isinstance(fingerprint, str) else response.model_version


def tokens_changed_of(response: wire.Response) -> float | None:
    """Returns the share, 0..1, of the tokens in which Q(x + δ) differs from Q(x); None if the server sends none."""
    value: Any = response.parameters.get("tokens_changed")
    return None if value is None else float(value)
