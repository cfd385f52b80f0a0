from __future__ import annotations

import json
import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dat_client import wire
from dat_client.errors import WireError
from dat_client.wire import RequestedOutput

NUMERIC = [name for name in wire.DATATYPES if name != "BYTES"]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
BINARY = st.binary(max_size=20)


def numeric_arrays(finite: bool = False) -> st.SearchStrategy[np.ndarray]:
    elements = {"allow_nan": False, "allow_infinity": False} if finite else {}
    return st.sampled_from(NUMERIC).flatmap(
        lambda name: hnp.arrays(
            wire.DATATYPES[name], SHAPES, elements=elements if wire.DATATYPES[name].kind == "f" else None
        )
    )


@st.composite
def bytes_arrays(draw: st.DrawFn, element: st.SearchStrategy[bytes] = BINARY) -> np.ndarray:
    shape = draw(SHAPES)
    count = math.prod(shape)
    elements = draw(st.lists(element, min_size=count, max_size=count))
    array = np.empty(count, object)
    array[:] = elements
    return array.reshape(shape)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.tolist() == b.tolist() if a.dtype == object else a.tobytes() == b.tobytes()


def dictionaries(arrays: st.SearchStrategy[np.ndarray]) -> st.SearchStrategy[dict[str, np.ndarray]]:
    return st.dictionaries(st.text(max_size=8), arrays, max_size=3)


@settings(deadline=None)
@given(
    dictionaries(numeric_arrays() | bytes_arrays()),
    st.none() | st.text(),
    st.dictionaries(st.text(max_size=5), st.integers() | st.text() | st.booleans(), max_size=2),
    st.lists(
        st.builds(RequestedOutput, st.text(max_size=4), st.booleans()), unique_by=lambda o: o.name, max_size=3
    ),
    st.booleans(),
)
def test_request_round_trip_binary(inputs, id, parameters, outputs, default):
    parameters.pop("binary_data_output", None)
    chunks, length = wire.encode_request(
        inputs, id=id, parameters=parameters, outputs=outputs, binary_default=default
    )
    request = wire.decode_request(b"".join(chunks), str(length))
    assert request.inputs.keys() == inputs.keys()
    assert all(same(request.inputs[name], inputs[name]) for name in inputs)
    assert (request.id, request.parameters, request.outputs) == (id, parameters, outputs)
    assert request.binary_default == (default and not outputs)
    assert all(request.wants_binary(o.name) == o.binary for o in outputs)


@settings(deadline=None)
@given(dictionaries(numeric_arrays(finite=True) | bytes_arrays(st.text(max_size=5).map(str.encode))))
def test_request_round_trip_json(inputs):
    chunks, length = wire.encode_request(inputs, binary=False)
    assert [len(chunk) for chunk in chunks] == [length]
    for header_length in (None, length):
        request = wire.decode_request(chunks[0], header_length)
        assert all(same(request.inputs[name], inputs[name]) for name in inputs)


@settings(deadline=None)
@given(dictionaries(numeric_arrays() | bytes_arrays()), st.none() | st.text(), st.none() | st.text(), st.text())
def test_response_round_trip(outputs, id, version, model):
    parameters = {"fingerprint": "abc"}
    chunks, length = wire.encode_response(model, outputs, model_version=version, id=id, parameters=parameters)
    response = wire.decode_response(bytearray(b"".join(chunks)), length)
    assert (response.model_name, response.model_version, response.id) == (model, version, id)
    assert response.parameters == parameters
    assert response.outputs.keys() == outputs.keys()
    assert all(same(response.outputs[name], outputs[name]) for name in outputs)


def test_response_mixes_json_and_binary_per_output():
    outputs = {"a": np.arange(6, dtype=np.int32).reshape(2, 3), "b": np.ones(2, np.float16)}
    chunks, length = wire.encode_response("m", outputs, binary={"b": True})
    header = json.loads(chunks[0])
    assert header["outputs"][0] == {
        "name": "a",
        "datatype": "INT32",
        "shape": [2, 3],
        "data": [0, 1, 2, 3, 4, 5],
    }
    assert header["outputs"][1]["parameters"] == {"binary_data_size": 4}
    response = wire.decode_response(b"".join(chunks), length)
    assert all(same(response.outputs[name], outputs[name]) for name in outputs)


def test_encoding_neither_joins_nor_copies():
    images = np.arange(2 * 3 * 8 * 8, dtype=np.float32).reshape(2, 3, 8, 8)
    more = np.arange(5, dtype=np.uint8)
    chunks, length = wire.encode_request({"images": images, "more": more})
    assert len(chunks) == 3
    assert len(chunks[0]) == length
    assert np.shares_memory(np.frombuffer(chunks[1], np.float32), images)
    assert np.shares_memory(np.frombuffer(chunks[2], np.uint8), more)


def test_decoding_gives_views_of_the_body_that_are_aligned():
    images = np.arange(12, dtype=np.float32).reshape(1, 3, 2, 2)
    chunks, length = wire.encode_request({"images": images})
    body = bytearray(b"".join(chunks))
    decoded = wire.decode_request(memoryview(body), length).inputs["images"]
    assert np.shares_memory(decoded, np.frombuffer(body, np.uint8))
    assert decoded.flags.aligned
    assert decoded.flags.writeable
    lengths = {wire.encode_request({"images": images}, id="7" * n)[1] for n in range(20)}
    assert len(lengths) > 1
    assert all(n % 16 == 0 for n in lengths)


def test_response_without_a_model_name_is_malformed():
    with pytest.raises(WireError, match="model_name") as caught:
        wire.decode_response(b'{"outputs": []}')
    assert caught.value.malformed


def test_error_body_round_trip():
    body = wire.encode_error("images: 5 axes", "images", [1, 2], 4)
    assert wire.decode_error(body) == wire.ErrorBody("images: 5 axes", "images", [1, 2], 4)
    assert json.loads(wire.encode_error("m")) == {"error": "m"}


@pytest.mark.parametrize(
    "value",
    ["x" * 10_000, math.nan, math.inf, b"\xff" * 300, {"a": object()}, [[1]], 10**5000],
    ids="abcdefg",
)
def test_error_body_shows_any_value_shortly(value):
    body = wire.encode_error("m", "f", value, value)
    assert len(body) < 400
    assert wire.decode_error(body) is not None


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b'{"detail": "Not Found"}', b'{"error": 1}', b"[" * 200_000]
)
def test_other_bodies_are_no_error_bodies(body):
    assert wire.decode_error(body) is None


def test_tritonclient_style_request_is_understood():
    pixels = struct.pack("<4e", 0, 0.25, 0.5, 1)
    header = (
        b'{"id":"","parameters":{"binary_data_output":true},"inputs":[{"name":"images","shape":[1,1,2,2],'
        b'"datatype":"FP16","parameters":{"binary_data_size":8}}]}'
    )
    request = wire.decode_request(header + pixels, len(header))
    assert request.id == ""
    assert request.binary_default
    assert request.parameters == {}
    assert request.inputs["images"].tolist() == [[[[0, 0.25], [0.5, 1]]]]


def test_each_tensor_can_be_binary_or_json() -> None:
    tensors = {"a": np.arange(3, dtype=np.int32), "b": np.arange(3, dtype=np.int32), "c": np.zeros(1, np.uint8)}
    binary = {"a": True, "b": False}  # a tensor that is missing here is sent as JSON
    chunks, _ = wire.encode_request(tensors, binary=binary)
    assert chunks[1:] == [tensors["a"].tobytes()]
    assert wire.encode_response("m", tensors, binary=binary)[0][1:] == chunks[1:]


def test_none_and_long_limits_are_shown_as_they_are():
    with pytest.raises(WireError, match=r"limit BOOL, UINT8, UINT16, .*, FP64, BYTES$"):
        wire.dtype_of("UINT9")
    error = WireError("m", "alpha", [None, 1], "a number")
    assert error.value == [None, 1]
    assert wire.decode_error(wire.encode_error("m", "alpha", [None], "x")).value == [None]
