"""Converts one tensor between numpy and the Open Inference Protocol v2: datatypes, shapes, bytes and JSON lists.

No function allocates memory by a size that the peer merely claims. Every array is a view of received bytes or a
copy of received list elements.
"""

from __future__ import annotations

import math
import struct
from itertools import chain
from typing import Any, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from dat_client.errors import WireError, shown

Array: TypeAlias = npt.NDArray[Any]

MAX_AXES = 32  # the limit of numpy 1
_MAX_BYTES = 2**63 - 1

#: OIP datatype -> numpy dtype, little endian; BYTES is an object array of `bytes`.
DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}
_NAMES = {(dtype.kind, dtype.itemsize): name for name, dtype in DATATYPES.items()}


def refuse(
    problem: str, field: str | None = None, value: Any = None, limit: Any = None, *, malformed: bool = False
) -> NoReturn:
    """Raises WireError with a message made of field, problem, value and limit; `malformed` as in WireError."""
    message = problem if field is None else f"{field}: {problem}"
    if value is not None:
        message += f", got {shown(value)}"
    if limit is not None:
        message += f", limit {limit if isinstance(limit, str) else shown(limit)}"  # it is never cut
    raise WireError(message, field, value, limit, malformed=malformed)


def malformed(problem: str, field: str | None = None, value: Any = None, limit: Any = None) -> NoReturn:
    """Raises WireError as `refuse` does, but for a message that cannot be read (HTTP status 400)."""
    refuse(problem, field, value, limit, malformed=True)


def datatype_of(array: Array, field: str = "tensor") -> str:
    """Returns the OIP name of an array's dtype; raises WireError for a dtype that the protocol lacks.

    >>> datatype_of(np.zeros(3, np.float16))
    'FP16'
    """
    name = _NAMES.get((array.dtype.kind, array.dtype.itemsize))
    if name is None:
        hint = "; use an object array of bytes to send BYTES" if array.dtype.kind in "SU" else ""
        refuse(f"the dtype has no OIP datatype{hint}", field, str(array.dtype), ", ".join(DATATYPES))
    return name


def dtype_of(datatype: Any, field: str = "tensor") -> np.dtype[Any]:
    """Returns the numpy dtype of an OIP datatype; raises WireError for an unknown name.

    >>> dtype_of("UINT16").itemsize
    2
    """
    if not isinstance(datatype, str):
        malformed("the datatype is not a string", field, datatype)
    dtype = DATATYPES.get(datatype)
    if dtype is None:
        refuse("unknown datatype", field, datatype, ", ".join(DATATYPES))
    return dtype


def parse_shape(shape: Any, dtype: np.dtype[Any], field: str) -> tuple[int, ...]:
    """Returns the shape in a message as a tuple; raises WireError if it is not one that numpy can hold."""
    if not isinstance(shape, list) or any(type(dim) is not int for dim in shape):
        malformed("the shape is not a list of integers", field, shape)
    if len(shape) > MAX_AXES:
        refuse("too many axes", field, len(shape), MAX_AXES)
    if any(not 0 <= dim <= _MAX_BYTES for dim in shape):
        refuse("a dimension of the shape is out of range", field, shape, [0, _MAX_BYTES])
    # numpy multiplies the non-zero dimensions of an empty array too. Python ints cannot overflow.
    if math.prod(dim or 1 for dim in shape) * dtype.itemsize > _MAX_BYTES:
        refuse("the shape needs more bytes than can be addressed", field, shape, _MAX_BYTES)
    return tuple(shape)


def from_buffer(buffer: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], field: str) -> Array:
    """Returns a view of `buffer` (format B) as a tensor; only BYTES elements are copied. Raises WireError."""
    count = math.prod(shape)
    if dtype.kind == "O":
        return _bytes_from_buffer(buffer, shape, count, field)
    if count * dtype.itemsize != len(buffer):
        refuse(f"shape {shown(list(shape))} needs {count * dtype.itemsize} bytes", field, len(buffer))
    if count == 0:
        return np.empty(shape, dtype)
    array: Array = np.frombuffer(buffer, np.uint8)
    if dtype.kind == "b" and array.max() > 1:
        refuse("a BOOL byte is neither 0 nor 1", field, int(array.max()), 1)
    return array.view(dtype).reshape(shape)


def _bytes_from_buffer(buffer: memoryview, shape: tuple[int, ...], count: int, field: str) -> Array:
    if count * 4 > len(buffer):
        refuse(f"shape {shown(list(shape))} needs at least {shown(count * 4)} bytes", field, len(buffer))
    elements: list[bytes] = []
    offset = 0
    for index in range(count):
        start = offset + 4
        if start > len(buffer):
            refuse(f"the BYTES data ends before element {index} of {count}", field, len(buffer))
        (length,) = struct.unpack_from("<I", buffer, offset)
        offset = start + length
        if offset > len(buffer):
            refuse(f"BYTES element {index} is longer than the rest of the data", field, length, len(buffer) - start)
        elements.append(bytes(buffer[start:offset]))
    if offset != len(buffer):
        refuse(f"the BYTES data continues after its {count} elements", field, len(buffer), offset)
    return _objects(elements, shape)


def _objects(elements: list[bytes], shape: tuple[int, ...]) -> Array:
    array = np.empty(len(elements), object)
    array[:] = elements
    return array.reshape(shape)


def to_buffer(array: Array, field: str) -> bytes | memoryview:
    """Returns the bytes of a tensor, without copying if it is C-contiguous and little endian.

    BYTES elements are joined, each after its length (uint32, little endian). Raises WireError for an object array
    with elements that are not bytes.
    """
    if array.dtype.kind == "O":
        parts: list[bytes] = []
        for element in array.reshape(-1):
            if not isinstance(element, (bytes, bytearray, memoryview)):
                refuse("the object array has an element that is not bytes", field, type(element).__name__)
            data = bytes(element)
            parts += (struct.pack("<I", len(data)), data)
        return b"".join(parts)
    if array.size == 0:
        return b""
    flat = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1)
    return flat.view(np.uint8).data


_JSON_TYPES: dict[str, set[type]] = {
    "b": {bool},
    "u": {int},
    "i": {int},
    "f": {int, float},
    "O": {str},
}


def from_json(data: Any, dtype: np.dtype[Any], shape: tuple[int, ...], field: str) -> Array:
    """Returns JSON `data`, a list that is flat or nested like `shape` (OIP v2, "Tensor Data"), as a tensor.

    Raises WireError if the number or the type of the elements is wrong, or if a value does not fit the datatype.
    """
    flat = _flatten(data, shape, field)
    wrong = set(map(type, flat)) - _JSON_TYPES[dtype.kind]
    if wrong:
        names = ", ".join(sorted(t.__name__ for t in wrong))
        refuse(f"the data have the wrong type for {_NAMES[dtype.kind, dtype.itemsize]}", field, names)
    if dtype.kind == "O":
        try:
            return _objects([text.encode() for text in flat], shape)
        except UnicodeEncodeError:  # "\ud800" is legal JSON but not a character
            refuse("a BYTES string is not valid Unicode", field)
    if dtype.kind in "ui" and flat:
        limits = np.iinfo(dtype)
        low, high = min(flat), max(flat)
        if low < limits.min or high > limits.max:
            refuse("a number is out of range", field, low if low < limits.min else high, [limits.min, limits.max])
    if dtype.kind != "f":
        return np.array(flat, dtype).reshape(shape)
    try:
        wide: npt.NDArray[np.float64] = np.array(flat, np.float64)
    except OverflowError:
        refuse("a number is out of range", field)
    with np.errstate(over="ignore"):
        array: Array = wide.astype(dtype)
    if not np.isfinite(array).all():
        refuse("a number is out of range", field, float(np.abs(wide).max()), float(np.finfo(dtype).max))
    return array.reshape(shape)


def _flatten(data: Any, shape: tuple[int, ...], field: str) -> list[Any]:
    if not isinstance(data, list):
        malformed("the data are not a list", field, data)
    if data and isinstance(data[0], list):
        level: list[Any] = [data]
        for axis, dim in enumerate(shape):
            for item in level:
                if not isinstance(item, list) or len(item) != dim:
                    found = len(item) if isinstance(item, list) else type(item).__name__
                    refuse(f"the nested data do not have shape {shown(list(shape))} at axis {axis}", field, found)
            level = list(chain.from_iterable(level))
        return level
    count = math.prod(shape)
    if len(data) != count:
        refuse(f"shape {shown(list(shape))} needs {shown(count)} elements", field, len(data))
    return data


def to_json(array: Array, field: str) -> list[Any]:
    """Returns the elements of a tensor as a flat list; raises WireError if JSON cannot express one of them."""
    if array.dtype.kind == "O":
        try:
            return [bytes(element).decode() for element in array.reshape(-1)]
        except (UnicodeDecodeError, TypeError):
            refuse("BYTES that are not UTF-8 text must be sent as binary data", field)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        refuse("NaN and infinity must be sent as binary data", field)
    flat: list[Any] = array.reshape(-1).tolist()
    return flat
