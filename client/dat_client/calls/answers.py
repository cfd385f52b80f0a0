"""Bounds and checks what a server answers to a call, as strictly as the service checks a request."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dat_client import wire
from dat_client.calls.checks import is_number
from dat_client.calls.core import Call
from dat_client.calls.picture_size import picture_pixels
from dat_client.errors import ProtocolError, WireError, shown
from dat_client.wire.messages import Buffer
from dat_client.wire.scan import range_outside_0_1
from dat_client.wire.vocabulary import INDEX_DTYPES, OUTPUT_DTYPES, OUTPUTS, default_outputs

MOST_JSON_BYTES = 1 << 20  # of the JSON part of an answer; ours has less than 1 kB
LARGEST_FACTOR = 32  # the largest f of a codec: one token stands for f x f pixels
MOST_PIXELS = 64 << 20  # in a batch of encoded pictures with unreadable headers; the service's default limit


def requested_outputs(call: Call) -> tuple[str, ...]:
    """Returns the names of the outputs that the answer must have."""
    has_attack = "gradients" in call.inputs or bool(call.parameters.get("replace_fraction"))
    return call.outputs or default_outputs(has_attack)


def most_reply_bytes(call: Call) -> int:
    """Returns the size in bytes that the body of the answer can have at most.

    Images give the size of each picture exactly, and encoded pictures by their headers. For tokens f is unknown, so
    it is taken as LARGEST_FACTOR when they are sent, and as 1 when they are requested.
    """
    if "indices" in call.inputs:
        pixels = call.inputs["indices"].size * LARGEST_FACTOR**2
    elif call.image_shape is not None:
        pixels = call.batch * call.image_shape[2] * call.image_shape[3]
    else:
        sizes = [picture_pixels(picture) for picture in call.inputs["images"]]
        pixels = sum(size or 0 for size in sizes) if all(sizes) else MOST_PIXELS
    picture_bytes = 3 * OUTPUT_DTYPES[_picture_datatype(call)].itemsize * pixels
    token_bytes = 4 * pixels
    names = requested_outputs(call)
    return MOST_JSON_BYTES + sum(token_bytes if name.endswith("indices") else picture_bytes for name in names)


def read_response(call: Call, body: Buffer, header_length: str | None) -> wire.Response:
    """Decodes the response in a body and checks that it answers `call`.

    Raises ProtocolError if the body is not a response, if its id is not that of the call, or if its outputs are not
    exactly those that were requested: each once, of the right datatype and shape, images finite and in 0..1, and
    tokens not negative. (The number of tokens K is not in an answer, so the largest token is not checked.)
    """
    try:
        response = wire.decode_response(body, header_length, max_json_bytes=MOST_JSON_BYTES, max_strings=0)
    except WireError as error:
        raise ProtocolError(f"the answer is not an inference response: {error}") from error
    if response.id != call.id:
        raise ProtocolError(f"the answer belongs to request {shown(response.id)}, not to {call.id}")
    requested = requested_outputs(call)
    if missing := set(requested) - set(response.outputs):
        raise ProtocolError(f"the answer lacks {', '.join(sorted(missing))}")
    if others := set(response.outputs) - set(requested):
        raise ProtocolError(f"the answer has outputs that were not requested: {shown(sorted(others))}")
    for name, array in response.outputs.items():
        if (
            problem := _problem_of_tokens(call, array)
            if name.endswith("indices")
            else _problem_of_pictures(call, array)
        ):
            raise ProtocolError(f"{name}: the answer has {problem}")
    for name, array in response.outputs.items():
        twin = response.outputs.get(OUTPUTS[OUTPUTS.index(name) ^ 1])
        if twin is not None and (twin.shape, twin.dtype) != (array.shape, array.dtype):
            raise ProtocolError(f"{name}: the answer has shape {list(array.shape)}, its twin {list(twin.shape)}")
    changed: Any = response.parameters.get("tokens_changed")
    if changed is not None and not (is_number(changed) and 0 <= changed <= 1):
        raise ProtocolError(f"tokens_changed: the answer has {shown(changed)}, must be a number in 0..1")
    return response


def _picture_datatype(call: Call) -> str:
    """Returns the OIP datatype of the images in the answer."""
    images = call.inputs.get("images")
    default = "UINT8" if images is None or images.dtype.kind == "O" else wire.datatype_of(images)
    name: str = call.parameters.get("output_dtype", default)
    return name


def _problem_of_pictures(call: Call, array: npt.NDArray[Any]) -> str | None:
    """Returns what is wrong with an output of images, or None."""
    expected = _picture_datatype(call)
    if wire.datatype_of(array) != expected:
        return f"datatype {wire.datatype_of(array)}, must be {expected}"
    batch, shape = call.batch, array.shape
    if call.image_shape is not None:
        if shape != call.image_shape:
            return f"shape {list(shape)}, must be {list(call.image_shape)}"
    elif len(shape) != 4 or shape[:2] != (batch, 3) or 0 in shape:
        return f"shape {list(shape)}, must be [{batch},3,H,W]"
    elif "indices" in call.inputs:
        grid = call.inputs["indices"].shape[1:]
        if not any((grid[0] * f, grid[1] * f) == shape[2:] for f in range(1, LARGEST_FACTOR + 1)):
            return f"shape {list(shape)}, must be a multiple of the tokens' {list(grid)}"
    elif (pixels := picture_pixels(call.inputs["images"][0])) is not None and shape[2] * shape[3] != pixels:
        return f"shape {list(shape)}, must have the {pixels} pixels of the pictures"  # a picture may be turned
    if array.dtype.kind == "f" and (outside := range_outside_0_1(array)):
        return f"values from {outside[0]:g} to {outside[1]:g}, must be finite and in 0..1"
    return None


def _problem_of_tokens(call: Call, array: npt.NDArray[Any]) -> str | None:
    """Returns what is wrong with an output of tokens, or None."""
    if wire.datatype_of(array) not in INDEX_DTYPES:
        return f"datatype {wire.datatype_of(array)}, must be {' or '.join(INDEX_DTYPES)}"
    if array.ndim != 3 or len(array) != call.batch or array.size == 0:
        return f"shape {list(array.shape)}, must be [{call.batch},h,w]"
    if call.image_shape is not None:
        height, width = call.image_shape[2:]
        if not any((-(-height // f), -(-width // f)) == array.shape[1:] for f in range(1, LARGEST_FACTOR + 1)):
            return f"shape {list(array.shape)}, which no codec has for images of {height}x{width}"
    if array.dtype.kind == "i" and (least := int(np.min(array))) < 0:
        return f"token {least}, must be 0 or more"
    return None
