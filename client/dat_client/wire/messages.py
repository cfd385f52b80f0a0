"""Encodes and decodes requests, responses and errors of the Open Inference Protocol v2, for client and server.

A message is a JSON header, followed by the raw bytes of the tensors whose data the JSON does not contain, in the
order in which the JSON lists these tensors (the binary tensor data extension). The HTTP header
`Inference-Header-Content-Length` gives the length of the JSON in bytes; without it the whole body is JSON.

    >>> import numpy as np
    >>> images = np.zeros((2, 3, 8, 8), np.uint8)
    >>> chunks, header_length = encode_request({"images": images}, id="7")
    >>> request = decode_request(b"".join(chunks), header_length)
    >>> request.id, request.inputs["images"].shape
    ('7', (2, 3, 8, 8))

Encoding returns a list of buffers and does not copy a tensor that is C-contiguous and little endian. Decoding
returns views of the body. For any bytes, decoding either succeeds or raises WireError.

Specification: https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol and its
binary tensor data extension.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from dat_client.errors import MAX_SENTENCE, WireError, plain, shown
from dat_client.wire.headers import HEADER_LENGTH
from dat_client.wire.json import get_name, get_parameters, optional, parse, typed
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

_ALIGN = 16  # bytes; the JSON is padded with spaces to a multiple, so that float tensors start aligned

Buffer: TypeAlias = bytes | bytearray | memoryview
Encoded: TypeAlias = tuple[list[bytes | memoryview], int]


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """An output that a request names; `binary` is True for binary data, False for JSON."""

    name: str
    binary: bool = True


@dataclass(frozen=True, slots=True)
class Request:
    """A decoded inference request.

    `inputs` are views of the body, read-only if the body is. `parameters` are the codec's parameters, without the
    protocol's own `binary_data_output`, whose value is in `binary_default`. `outputs` is empty if the request named
    no outputs; `binary_default` then applies to all of them.
    """

    inputs: dict[str, Array]
    id: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    outputs: list[RequestedOutput] = field(default_factory=list)
    binary_default: bool = False

    def wants_binary(self, name: str) -> bool:
        """Returns True if output `name` is to be sent as binary data, False for JSON.

        `binary_default` decides for an output that the request does not name.
        """
        return next((output.binary for output in self.outputs if output.name == name), self.binary_default)


@dataclass(frozen=True, slots=True)
class Response:
    """A decoded inference response. `outputs` are views of the body."""

    model_name: str
    outputs: dict[str, Array]
    model_version: str | None = None
    id: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ErrorBody:
    """The body of an error answer. OIP requires `error`; the field, its value and its limit are our additions."""

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
    """Returns the buffers of an inference request and the length of its JSON part.

    `binary` says which inputs are sent as binary data: all, none, or by name. `binary_default` is sent as the
    parameter `binary_data_output` if `outputs` is empty. Raises WireError for a dtype or a parameter that the
    protocol cannot express.
    """
    defaults = {} if outputs else {"binary_data_output": binary_default}
    entries, tail = _encode_tensors(inputs, binary)
    header = {
        "id": id,
        "parameters": {**(parameters or {}), **defaults} or None,
        "inputs": entries,
        "outputs": [{"name": o.name, "parameters": {"binary_data": o.binary}} for o in outputs] or None,
    }
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
    """Returns the buffers of an inference response and the length of its JSON part.

        binary = {name: request.wants_binary(name) for name in outputs}
        chunks, header_length = encode_response(codec, outputs, id=request.id, binary=binary)

    `binary` says which outputs are sent as binary data: all, none, or by name. Raises WireError for a dtype that
    the protocol lacks, and for an output that JSON cannot express: NaN, infinity, or BYTES that are not UTF-8 text.
    """
    entries, tail = _encode_tensors(outputs, binary)
    header = {
        "model_name": model_name,
        "model_version": model_version,
        "id": id,
        "parameters": dict(parameters or {}) or None,
        "outputs": entries,
    }
    return _encode(header, tail)


def decode_request(
    body: Buffer, header_length: int | str | None = None, *, max_strings: int | None = None
) -> Request:
    """Decodes the body of an inference request.

    `header_length` is the length of the JSON part in bytes: the value of the HTTP header, as text or as a number.
    If it is None, the whole body is JSON. `max_strings` is the largest number of elements that a BYTES tensor may
    have, because each becomes a Python object; None sets no limit. Raises WireError and no other exception; its
    `malformed` is True for HTTP status 400 and False for 422.
    """
    header, rest = _split(body, header_length)
    parameters = get_parameters(header)
    binary_default = typed(parameters.pop("binary_data_output", False), bool, "binary_data_output")
    for name, value in parameters.items():
        if isinstance(value, float) and not math.isfinite(value):  # 1e999 is legal JSON and becomes infinity
            refuse("the parameter is not finite", shown(name), value)
    outputs: list[RequestedOutput] = []
    for index, entry in enumerate(typed(header.get("outputs", []), list, "outputs")):
        name = get_name(entry, f"outputs[{index}]")
        binary = get_parameters(entry).get("binary_data", binary_default)
        outputs.append(RequestedOutput(name, typed(binary, bool, f"outputs[{index}].binary_data")))
    if len({output.name for output in outputs}) != len(outputs):
        malformed("an output is named twice", "outputs", [output.name for output in outputs])
    inputs = _decode_tensors(header, "inputs", rest, max_strings)
    return Request(inputs, optional(header, "id", str), parameters, outputs, binary_default)


def decode_response(
    body: Buffer,
    header_length: int | str | None = None,
    *,
    max_json_bytes: int | None = None,
    max_strings: int | None = None,
) -> Response:
    """Decodes the body of an inference response, as `decode_request` does that of a request; raises WireError.

    `max_json_bytes` is the largest size that the JSON part may have, because parsed JSON takes many times the
    memory of its text; None sets no limit.
    """
    header, rest = _split(body, header_length, max_json_bytes)
    model_name = optional(header, "model_name", str)
    if model_name is None:
        malformed("the key is missing", "model_name")
    return Response(
        model_name,
        _decode_tensors(header, "outputs", rest, max_strings),
        optional(header, "model_version", str),
        optional(header, "id", str),
        get_parameters(header),
    )


def encode_error(message: str, field: str | None = None, value: Any = None, limit: Any = None) -> bytes:
    """Returns the JSON body of an error answer; `value` is null if a field is named that has no value.

    A `value` or `limit` that is a text may be a sentence that says what to do, and is not cut below 1000
    characters.
    Other long values are replaced by a text of 80 characters.

    >>> encode_error("images: 5 axes", "images", 5, 4)
    b'{"error": "images: 5 axes", "field": "images", "value": 5, "limit": 4}'
    """
    value, limit = (
        item if item is None or (isinstance(item, str) and len(item) <= MAX_SENTENCE) else plain(item)
        for item in (value, limit)
    )
    body = {"error": message, "field": field, "value": value, "limit": limit}
    is_null = field is not None and value is None
    return json.dumps(_without_none(body) | ({"value": None} if is_null else {})).encode()


def decode_error(body: Buffer) -> ErrorBody | None:
    """Decodes the body of an error answer; returns None if it is not OIP's `{"error": ...}`. Never raises.

    Other members than `error` and this service's `field`, `value` and `limit` show that it is not: web frameworks
    write `{"status": 404, "error": "Not Found", ...}`.
    """
    try:
        parsed = parse(memoryview(body).cast("B"))
    except WireError:
        return None
    if not isinstance(parsed.get("error"), str) or not parsed.keys() <= {"error", "field", "value", "limit"}:
        return None
    field = parsed.get("field")
    field = field if isinstance(field, str) else None
    return ErrorBody(parsed["error"], field, parsed.get("value"), parsed.get("limit"))


def _without_none(members: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in members.items() if value is not None}


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
        text = json.dumps(_without_none(header), allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        refuse(f"JSON cannot express them ({error})", "parameters", header.get("parameters"))
    if tail:
        text = text.ljust(-len(text) % _ALIGN + len(text))
    return [text, *tail], len(text)


def _split(
    body: Buffer, header_length: int | str | None, max_json_bytes: int | None = None
) -> tuple[dict[str, Any], memoryview]:
    view = memoryview(body).cast("B")
    length = len(view) if header_length is None else _header_length(header_length)
    if length > len(view):
        malformed("the JSON part is longer than the body", HEADER_LENGTH, length, len(view))
    if max_json_bytes is not None and length > max_json_bytes:
        malformed("the JSON part is too long; tensors were to be sent as binary data", None, length, max_json_bytes)
    return parse(view[:length]), view[length:]


def _header_length(value: int | str) -> int:
    if isinstance(value, str):
        text = value.strip()
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            malformed("must be a number of bytes", HEADER_LENGTH, value)
        value = int(text)
    if value < 0:
        malformed("must not be negative", HEADER_LENGTH, value)
    return value


def _decode_tensors(
    header: dict[str, Any], key: str, rest: memoryview, max_strings: int | None = None
) -> dict[str, Array]:
    if key not in header:
        malformed("the key is missing", key)
    tensors: dict[str, Array] = {}
    offset = 0
    for index, entry in enumerate(typed(header[key], list, key)):
        name = get_name(entry, f"{key}[{index}]")
        label = name if len(name) <= 80 else shown(name)
        if name in tensors:
            malformed("a tensor is named twice", label)
        for member in ("datatype", "shape"):
            if member not in entry:
                malformed(f"{member} is missing", label)
        size = get_parameters(entry).get("binary_data_size")
        if (size is None) == ("data" not in entry):
            malformed("the tensor must have either data or binary_data_size", label)
        if size is not None and (type(size) is not int or not 0 <= size <= len(rest) - offset):
            malformed("binary_data_size does not fit the body", label, size, len(rest) - offset)
        dtype = dtype_of(entry["datatype"], label)
        shape = parse_shape(entry["shape"], dtype, label)
        if max_strings is not None and dtype.hasobject and math.prod(shape) > max_strings:
            refuse("the BYTES tensor has too many elements", label, math.prod(shape), max_strings)
        if size is None:
            tensors[name] = from_json(entry["data"], dtype, shape, label)
        else:
            tensors[name] = from_buffer(rest[offset : offset + size], dtype, shape, label)
            offset += size
    if offset != len(rest):
        malformed("the body has bytes after its last tensor", key, len(rest) - offset)
    return tensors
