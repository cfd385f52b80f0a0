"""What every way to the service shares: arguments to call, reply to answer or exception.

Pure functions: no socket is opened here.
"""

from __future__ import annotations

import itertools
import math
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dat_client import wire
from dat_client.calls.arrays import Kind, gradient_tensors, images_tensor, indices_tensor
from dat_client.errors import (
    DatError,
    InvalidRequest,
    Overloaded,
    ProtocolError,
    TooLarge,
    Unauthorized,
    Unavailable,
    UnknownCodec,
    WireError,
    shown,
)
from dat_client.wire import headers
from dat_client.wire.vocabulary import OUTPUT_DTYPES, OUTPUTS

#: numpy.ndarray, or torch.Tensor when tensors went in.
Array: TypeAlias = Any


@dataclass(frozen=True, repr=False)
class Discretized:
    """What a codec made of a batch; outputs that were not asked for are None.

    Attributes:
        reconstruction: Q(x), [N,3,H,W], in the dtype of the images (or `output_dtype`).
        indices: the tokens of Q(x), [N,h,w]: as the server sent them (uint16 or int32) in numpy, int64
            in torch where unsigned.
        adversarial: Q(x + δ), as `reconstruction`.
        adversarial_indices: the tokens of Q(x + δ).
        codec: the name of the codec that answered.
        fingerprint: which weights it ran, None if the server did not say.
        tokens_changed: the share of the tokens that the step changed, with anything adversarial.
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
class Reply:
    """One HTTP answer: `headers` have lower-case names."""

    status: int
    headers: Mapping[str, str]
    body: bytearray | memoryview

    def header(self, name: str) -> str | None:
        """The value of a header, whose name may be in any case."""
        return self.headers.get(name.lower())


@dataclass(frozen=True)
class Exchange:
    """One answered inference request, and what it took.

    Attributes:
        timing: seconds that the server spent, by name (body, queue, codec, total); empty where it does not say.
        begun_s: time.perf_counter() at the beginning of the attempt that was answered.
        seconds: from there until the whole answer had arrived.
        sent, received: bytes of the bodies.
    """

    response: wire.Response
    timing: Mapping[str, float]
    begun_s: float
    seconds: float
    sent: int
    received: int


_ids = itertools.count()
_process = (0, "")


def next_id() -> str:
    """A request id that no other process has."""
    global _process
    if _process[0] != os.getpid():  # a forked worker must not go on with its parent's ids
        _process = (os.getpid(), uuid.uuid4().hex[:12])
    return f"{_process[1]}-{next(_ids)}"


@dataclass(frozen=True)
class Call:
    """One inference, checked and ready to be encoded; `kind` is what its answer is turned back into."""

    inputs: dict[str, npt.NDArray[Any]]
    parameters: dict[str, Any]
    outputs: tuple[str, ...]
    kind: Kind
    image_shape: tuple[int, ...] | None
    id: str = field(default_factory=next_id)

    @property
    def batch(self) -> int:
        return len(next(iter(self.inputs.values())))

    def encode(self) -> wire.Encoded:
        """The buffers of the request and the length of its JSON part."""
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
    """The request of `Client.discretize`; raises InvalidRequest for what the server would refuse anyway."""
    tensor, kind = images_tensor(images)
    shape = tensor.shape if tensor.ndim == 4 else None
    inputs = {"images": tensor}
    if gradients is not None:
        inputs |= gradient_tensors(gradients, shape, gradient_dtype)
    return Call(inputs, _parameters(parameters, output_dtype), _outputs(outputs), kind, image_shape=shape)


def decode_call(indices: Any, output_dtype: str | None, parameters: Mapping[str, Any]) -> Call:
    """The request of `Client.decode`: tokens in, `reconstruction` out."""
    tensor, kind = indices_tensor(indices)
    sent = _parameters(parameters, output_dtype)
    return Call({"indices": tensor}, sent, ("reconstruction",), kind, image_shape=None)


def _outputs(outputs: Sequence[str] | None) -> tuple[str, ...]:
    if outputs is None:
        return ()
    names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    unknown = [name for name in names if name not in OUTPUTS]
    if unknown or len(set(names)) != len(names) or not names:
        limit = ", ".join(OUTPUTS)
        raise InvalidRequest(
            f"outputs: {shown(list(names))}, must be some of {limit}, each once",
            field="outputs",
            value=list(names),
            limit=limit,
        )
    return names


def _parameters(parameters: Mapping[str, Any], output_dtype: str | None) -> dict[str, Any]:
    sent: dict[str, Any] = {}
    for name, value in parameters.items():
        if isinstance(value, np.generic):
            value = value.item()
        if value is None:  # the server's own default
            continue
        if not isinstance(value, (bool, int, float, str)) or (
            isinstance(value, float) and not math.isfinite(value)
        ):
            limit = "a finite number, a string, True or False"
            message = f"{name}: must be {limit}, got {shown(value)}"
            raise InvalidRequest(message, field=name, value=value, limit=limit)
        sent[name] = value
    if output_dtype is not None:
        if output_dtype not in OUTPUT_DTYPES:
            limit = ", ".join(OUTPUT_DTYPES)
            message = f"output_dtype: must be one of {limit}, got {shown(output_dtype)}"
            raise InvalidRequest(message, field="output_dtype", value=output_dtype, limit=limit)
        sent["output_dtype"] = output_dtype
    return sent


def read_response(call: Call, reply: Reply) -> wire.Response:
    """The answer to a call; raises ProtocolError where it answers something else."""
    try:
        response = wire.decode_response(reply.body, reply.header(headers.HEADER_LENGTH))
    except WireError as error:
        raise ProtocolError(f"the answer is not an inference response: {error}") from error
    check_response(call, response)
    return response


def check_response(call: Call, response: wire.Response) -> None:
    """Raises ProtocolError unless these are the outputs that the call asked for, of the shapes it implies."""
    if response.id != call.id:
        raise ProtocolError(f"the answer belongs to request {shown(response.id)}, not to {call.id}")
    default = ("reconstruction", "adversarial") if "gradients" in call.inputs else ("reconstruction",)
    missing = set(call.outputs or default) - set(response.outputs)
    if missing:
        raise ProtocolError(f"the answer lacks {', '.join(sorted(missing))}")
    for name, array in response.outputs.items():
        if name not in OUTPUTS:
            continue
        axes = 3 if name.endswith("indices") else 4
        expected = call.image_shape if axes == 4 else None
        if array.ndim != axes or len(array) != call.batch or (expected and array.shape != expected):
            asked = shown(list(expected)) if expected else f"{axes} axes, {call.batch} first"
            raise ProtocolError(f"{name}: the answer has shape {list(array.shape)}, expected {asked}")


def discretized(call: Call, response: wire.Response) -> Discretized:
    """A checked answer as arrays of the call's kind."""
    changed = response.parameters.get("tokens_changed")
    return Discretized(
        codec=response.model_name,
        fingerprint=fingerprint_of(response),
        tokens_changed=float(changed) if isinstance(changed, (int, float)) else None,
        **{name: call.kind.restore(array) for name, array in response.outputs.items() if name in OUTPUTS},
    )


def fingerprint_of(response: wire.Response) -> str | None:
    """Which weights answered; the model's version where the server has no fingerprints."""
    fingerprint = response.parameters.get("fingerprint")
    return fingerprint if isinstance(fingerprint, str) else response.model_version


def error_of(reply: Reply, url: str) -> DatError | None:
    """The exception that an HTTP answer means, None for a 2xx: 4xx is wrong; 408, 429 and 5xx may be repeated."""
    status = reply.status
    if 200 <= status < 300:
        return None
    said = wire.decode_error(reply.body)
    if 300 <= status < 400:
        location = reply.headers.get("location", "elsewhere")
        return ProtocolError(f"{url}: {status}: redirects to {shown(location)}; use that address")
    if said is None:
        text = shown(bytes(reply.body[:200]).decode("utf-8", "replace"))
        if status == 404:
            return ProtocolError(f"{url}: {status}: {text}: no inference service at this address")
    else:
        text = said.error
    after_s = headers.retry_after_s(reply.header(headers.RETRY_AFTER), time.time())
    return error_from(status, f"{url}: {status}: {text}", said, after_s)


def error_from(status: int, message: str, said: wire.ErrorBody | None, after_s: float | None) -> DatError:
    """The exception that a status of 400 or more means, with what the service said of it (None: a proxy spoke)."""
    own = None if said is None else status
    if status == 429 or (status == 503 and after_s is not None):
        return Overloaded(message, cause=message, status=own, retry_after_s=after_s)
    if status == 408 or status >= 500:
        return Unavailable(message, cause=message, status=own)
    if status in (401, 403):
        return Unauthorized(f"{message} (api_key)", status=status)
    kinds: dict[int, type[InvalidRequest]] = {404: UnknownCodec, 413: TooLarge}
    kind = kinds.get(status, InvalidRequest)
    if said is None:
        return kind(message, status=status)
    return kind(message, field=said.field, value=said.value, limit=said.limit, status=status)
