"""Open Inference Protocol v2 with the binary tensor data extension, as pure functions: both ends of the wire.

A message is a JSON header and, after it, the raw bytes of every tensor that is not in the JSON, in its
order. The HTTP header `Inference-Header-Content-Length` says where the JSON ends; without it all is JSON.

    >>> import numpy as np
    >>> images = np.zeros((2, 3, 8, 8), np.uint8)
    >>> chunks, header_length = encode_request({"images": images}, id="7")
    >>> request = decode_request(b"".join(chunks), header_length)
    >>> request.id, request.inputs["images"].shape
    ('7', (2, 3, 8, 8))

Encoding gives a list of buffers and never joins or copies a tensor that is C-contiguous and little endian;
decoding gives views of the body. Whatever the bytes are, decoding raises WireError or nothing.

Specification: https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol and its
binary tensor data extension.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from dat_client.errors import WireError, plain, shown
from dat_client.wire.headers import HEADER_LENGTH
from dat_client.wire.json import as_flag, as_list, get_name, get_object, get_text, parse
from dat_client.wire.tensors import (
    Array,
    datatype_of,
    dtype_of,
    from_buffer,
    from_json,
    malformed,
    parse_shape,
    refuse,
    to_buffer,
    to_json,
)

_ALIGN = 16  # the JSON is padded with spaces to this, so that float tensors start aligned

Buffer: TypeAlias = bytes | bytearray | memoryview
Encoded: TypeAlias = tuple[list[bytes | memoryview], int]


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """An output that a request names, and whether it wants it as binary data (else as JSON)."""

    name: str
    binary: bool = True


@dataclass(frozen=True, slots=True)
class Request:
    """A decoded inference request.

    `parameters` are the codec's own: `binary_data_output` is taken out of them. `inputs` are views of the
    body (read-only where the body is). `outputs` is empty when none was named; then `binary_default`, the
    request parameter `binary_data_output`, holds for all.
    """

    inputs: dict[str, Array]
    id: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    outputs: list[RequestedOutput] = field(default_factory=list)
    binary_default: bool = False

    def wants_binary(self, name: str) -> bool:
        """Whether output `name` goes back as binary data: what was said of it, else the request's default."""
        return next((o.binary for o in self.outputs if o.name == name), self.binary_default)


@dataclass(frozen=True, slots=True)
class Response:
    """A decoded inference response; `outputs` are views of the body."""

    model_name: str
    outputs: dict[str, Array]
    model_version: str | None = None
    id: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ErrorBody:
    """What an error answer says: OIP requires `error`; the others name what offended and its limit."""

    error: str
    field: str | None = None
    value: Any = None
    limit: Any = None


def encode_request(
    inputs: Mapping[str, Array],
    *,
    id: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    outputs: Sequence[RequestedOutput] = (),
    binary: bool | Mapping[str, bool] = True,
    binary_default: bool = True,
) -> Encoded:
    """The buffers of an inference request and the length of its JSON part.

    `binary` says which inputs travel as binary data (of a mapping, those that it says so of);
    `binary_default` is sent as `binary_data_output` when no `outputs` are named. Raises WireError for a
    dtype, or a parameter, that the protocol cannot carry.
    """
    header: dict[str, Any] = {} if id is None else {"id": id}
    sent = dict(parameters or {})
    if not outputs:
        sent["binary_data_output"] = binary_default
    if sent:
        header["parameters"] = sent
    header["inputs"], tail = _encode_tensors(inputs, binary)
    if outputs:
        header["outputs"] = [{"name": o.name, "parameters": {"binary_data": o.binary}} for o in outputs]
    return _encode(header, tail)


def encode_response(
    model_name: str,
    outputs: Mapping[str, Array],
    *,
    model_version: str | None = None,
    id: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    binary: bool | Mapping[str, bool] = True,
) -> Encoded:
    """The buffers of an inference response and the length of its JSON part.

        binary = {name: request.wants_binary(name) for name in outputs}
        chunks, header_length = encode_response(codec, outputs, id=request.id, binary=binary)

    Raises WireError for a dtype that the protocol lacks, and for NaN or non-text BYTES asked for as JSON.
    """
    header: dict[str, Any] = {"model_name": model_name}
    if model_version is not None:
        header["model_version"] = model_version
    if id is not None:
        header["id"] = id
    if parameters:
        header["parameters"] = dict(parameters)
    header["outputs"], tail = _encode_tensors(outputs, binary)
    return _encode(header, tail)


def decode_request(
    body: Buffer, header_length: int | str | None = None, *, max_strings: int | None = None
) -> Request:
    """An inference request from its body and `Inference-Header-Content-Length`, as text or number.

    None, or the length of the body, means that all is JSON. Raises WireError and nothing else: `malformed`
    for HTTP 400, otherwise 422.
    `max_strings` is the most elements of a BYTES tensor: each becomes an object of its own.
    """
    header, rest = _split(body, header_length)
    parameters = get_object(header, "parameters")
    binary_default = as_flag(parameters.pop("binary_data_output", False), "binary_data_output")
    for name, value in parameters.items():
        if isinstance(value, float) and not math.isfinite(value):  # 1e999 is legal JSON
            refuse("parameter is not finite", shown(name), value)
    outputs: list[RequestedOutput] = []
    for index, entry in enumerate(as_list(header.get("outputs", []), "outputs")):
        name = get_name(entry, f"outputs[{index}]")
        wants = get_object(entry, "parameters").get("binary_data", binary_default)
        outputs.append(RequestedOutput(name, as_flag(wants, f"outputs[{index}].binary_data")))
    if len({o.name for o in outputs}) != len(outputs):
        malformed("output named twice", "outputs", [o.name for o in outputs])
    inputs = _decode_tensors(header, "inputs", rest, max_strings)
    return Request(inputs, get_text(header, "id"), parameters, outputs, binary_default)


def decode_response(body: Buffer, header_length: int | str | None = None) -> Response:
    """An inference response from its body and `Inference-Header-Content-Length`; raises WireError."""
    header, rest = _split(body, header_length)
    model_name = get_text(header, "model_name")
    if model_name is None:
        malformed("key missing", "model_name")
    return Response(
        model_name,
        _decode_tensors(header, "outputs", rest),
        get_text(header, "model_version"),
        get_text(header, "id"),
        get_object(header, "parameters"),
    )


def encode_error(message: str, field: str | None = None, value: Any = None, limit: Any = None) -> bytes:
    """The JSON body of an error answer; a value that is not short JSON is shown as text of 80 characters.

    >>> encode_error("images: 5 axes", "images", 5, 4)
    b'{"error": "images: 5 axes", "field": "images", "value": 5, "limit": 4}'
    """
    body: dict[str, Any] = {"error": message}
    if field is not None:
        body["field"] = field
    if value is not None:
        body["value"] = plain(value)
    if limit is not None:
        body["limit"] = plain(limit)
    return json.dumps(body).encode()


def decode_error(body: Buffer) -> ErrorBody | None:
    """What an error answer says, or None when the body is not OIP's `{"error": ...}`. Never raises."""
    try:
        parsed = parse(memoryview(body).cast("B"))
    except WireError:
        return None
    if not isinstance(parsed.get("error"), str):
        return None
    named = parsed.get("field")
    named = named if isinstance(named, str) else None
    return ErrorBody(parsed["error"], named, parsed.get("value"), parsed.get("limit"))


def _encode_tensors(
    tensors: Mapping[str, Array], binary: bool | Mapping[str, bool]
) -> tuple[list[dict[str, Any]], list[bytes | memoryview]]:
    entries: list[dict[str, Any]] = []
    tail: list[bytes | memoryview] = []
    for name, array in tensors.items():
        datatype = datatype_of(array, name)
        entry: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
        if binary if isinstance(binary, bool) else binary.get(name, False):
            buffer = to_buffer(array, name)
            entry["parameters"] = {"binary_data_size": len(buffer)}
            tail.append(buffer)
        else:
            entry["data"] = to_json(array, name)
        entries.append(entry)
    return entries, tail


def _encode(header: dict[str, Any], tail: list[bytes | memoryview]) -> Encoded:
    try:
        text = json.dumps(header, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise WireError(f"parameters: not JSON: {error}", "parameters", header.get("parameters")) from None
    if tail:
        text = text.ljust(-len(text) % _ALIGN + len(text))
    return [text, *tail], len(text)


def _split(body: Buffer, header_length: int | str | None) -> tuple[dict[str, Any], memoryview]:
    view = memoryview(body).cast("B")
    length = len(view) if header_length is None else _header_length(header_length)
    if length > len(view):
        malformed("larger than the body", HEADER_LENGTH, length, len(view))
    return parse(view[:length]), view[length:]


def _header_length(value: int | str) -> int:
    if isinstance(value, str):
        text = value.strip()
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            malformed("not a number of bytes", HEADER_LENGTH, value)
        value = int(text)
    if value < 0:
        malformed("negative", HEADER_LENGTH, value)
    return value


def _decode_tensors(
    header: dict[str, Any], key: str, rest: memoryview, max_strings: int | None = None
) -> dict[str, Array]:
    if key not in header:
        malformed("key missing", key)
    tensors: dict[str, Array] = {}
    offset = 0
    for index, entry in enumerate(as_list(header[key], key)):
        name = get_name(entry, f"{key}[{index}]")
        label = name if len(name) <= 80 else shown(name)
        if name in tensors:
            malformed("tensor named twice", label)
        for needed in ("datatype", "shape"):
            if needed not in entry:
                malformed(f"{needed} missing", label)
        size = get_object(entry, "parameters").get("binary_data_size")
        if (size is None) == ("data" not in entry):
            malformed("needs either data or binary_data_size", label)
        if size is not None and (type(size) is not int or not 0 <= size <= len(rest) - offset):
            malformed("binary_data_size does not fit the body", label, size, len(rest) - offset)
        dtype = dtype_of(entry["datatype"], label)
        shape = parse_shape(entry["shape"], dtype, label)
        if max_strings is not None and dtype.hasobject and math.prod(shape) > max_strings:
            refuse("too many BYTES elements", label, math.prod(shape), max_strings)
        if size is None:
            tensors[name] = from_json(entry["data"], dtype, shape, label)
        else:
            tensors[name] = from_buffer(rest[offset : offset + size], dtype, shape, label)
            offset += size
    if offset != len(rest):
        malformed("bytes after the JSON that belong to no tensor", key, len(rest) - offset)
    return tensors
