"""Bytes from strangers: whatever they are, WireError or nothing."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dat_client import wire
from dat_client.errors import WireError
from dat_client.wire import RequestedOutput


def request_json(**changes: Any) -> bytes:
    entry = {"name": "x", "datatype": "INT32", "shape": [2, 2], "data": [[1, 2], [3, 4]]}
    entry.update(changes)
    return json.dumps({"inputs": [{k: v for k, v in entry.items() if v is not ...}]}).encode()


def binary_request(size: Any, shape: list[Any], datatype: str, payload: bytes) -> tuple[bytes, int]:
    entry = {"name": "x", "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}}
    header = json.dumps({"inputs": [entry]}).encode()
    return header + payload, len(header)


DEEP = b'{"inputs":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
TWO = {"name": "x", "datatype": "INT8", "shape": [1], "data": [1]}

MALFORMED = {
    "empty": (b"", None),
    "not json": (b"{", None),
    "not utf-8": (b'{"inputs": "\xff"}', None),
    "not an object": (b"[]", None),
    "deep": (DEEP, None),
    "key twice": (b'{"inputs": [], "inputs": []}', None),
    "key twice inside": (b'{"inputs": [], "parameters": {"alpha": 0.1, "alpha": 0.2}}', None),
    "NaN": (b'{"inputs": [], "parameters": {"alpha": NaN}}', None),
    "-Infinity": (b'{"inputs": [], "parameters": {"alpha": -Infinity}}', None),
    "5000 digits": (b'{"inputs": ' + b"1" * 5000 + b"}", None),
    "inputs missing": (b"{}", None),
    "inputs no list": (b'{"inputs": {}}', None),
    "input no object": (b'{"inputs": [1]}', None),
    "id no string": (b'{"inputs": [], "id": 7}', None),
    "parameters no object": (b'{"inputs": [], "parameters": []}', None),
    "outputs no list": (b'{"inputs": [], "outputs": 1}', None),
    "output without a name": (b'{"inputs": [], "outputs": [{}]}', None),
    "output twice": (b'{"inputs": [], "outputs": [{"name": "a"}, {"name": "a"}]}', None),
    "binary_data no flag": (
        b'{"inputs": [], "outputs": [{"name": "a", "parameters": {"binary_data": 1}}]}',
        None,
    ),
    "tensor twice": (json.dumps({"inputs": [TWO, TWO]}).encode(), None),
    "name missing": (request_json(name=...), None),
    "datatype missing": (request_json(datatype=...), None),
    "datatype no string": (request_json(datatype=3), None),
    "shape missing": (request_json(shape=...), None),
    "shape of floats": (request_json(shape=[2.0, 2]), None),
    "shape of booleans": (request_json(shape=[True, 4]), None),
    "data missing": (request_json(data=...), None),
    "data no list": (request_json(data=5), None),
    "both": (request_json(parameters={"binary_data_size": 0}), None),
    "length negative": (b'{"inputs": []}', -1),
    "length no number": (b'{"inputs": []}', "0x0e"),
    "length not ascii": (b'{"inputs": []}', "١٤"),
    "length too large": (b'{"inputs": []}', 15),
    "length huge": (b'{"inputs": []}', "9" * 5000),
    "bytes left over": (b'{"inputs": []}xyz', 14),
    "size too large": binary_request(5, [4], "UINT8", b"1234"),
    "size too small": binary_request(3, [3], "UINT8", b"1234"),
    "size negative": binary_request(-1, [4], "UINT8", b"1234"),
    "size huge": binary_request(10**30, [4], "UINT8", b"1234"),
    "size a boolean": binary_request(True, [1], "UINT8", b"1"),
    "size a float": binary_request(4.0, [4], "UINT8", b"1234"),
}

IMPOSSIBLE = {
    "unknown datatype": (request_json(datatype="BF16"), None),
    "shape too small": (request_json(shape=[2, 1]), None),
    "flat shape too large": (request_json(data=[1, 2, 3]), None),
    "ragged": (request_json(data=[[1, 2], [3]]), None),
    "half nested": (request_json(data=[[1, 2], 3]), None),
    "negative dim": (request_json(shape=[-2, -2]), None),
    "negative dims with a good product": (request_json(shape=[-2, -2], data=[1, 2, 3, 4]), None),
    "overflowing": (request_json(shape=[2**32, 2**32], data=[]), None),
    "overflowing but empty": (request_json(shape=[0, 2**40, 2**40], data=[]), None),
    "dimension beyond int64": (request_json(shape=[0, 10**400], data=[]), None),
    "many axes": (request_json(shape=[1] * 33, data=[1]), None),
    "string for a number": (request_json(data=["1", 2, 3, 4]), None),
    "boolean for a number": (request_json(data=[True, 2, 3, 4]), None),
    "null": (request_json(data=[None, 2, 3, 4]), None),
    "float for an integer": (request_json(data=[1.5, 2, 3, 4]), None),
    "integer out of range": (request_json(data=[2**31, 2, 3, 4]), None),
    "integer below zero": (request_json(datatype="UINT8", data=[-1, 2, 3, 4]), None),
    "float out of range": (request_json(datatype="FP16", data=[70000, 2, 3, 4]), None),
    "float beyond float64": (request_json(datatype="FP64", data=[10**400, 2, 3, 4]), None),
    "1e999": (request_json(datatype="FP64").replace(b"[[1,", b"[[1e999,"), None),
    "parameter 1e999": (b'{"inputs": [], "parameters": {"alpha": 1e999}}', None),
    "lone surrogate": (b'{"inputs":[{"name":"x","datatype":"BYTES","shape":[1],"data":["\\ud800"]}]}', None),
    "too few bytes for the shape": binary_request(4, [5], "UINT8", b"1234"),
    "too many bytes for the shape": binary_request(4, [1], "UINT8", b"1234"),
    "a claim of exabytes": binary_request(4, [2**59], "UINT8", b"1234"),
    "BOOL of 2": binary_request(2, [2], "BOOL", b"\x01\x02"),
    "BYTES without lengths": binary_request(3, [1], "BYTES", b"abc"),
    "BYTES past the end": binary_request(5, [1], "BYTES", b"\x02\x00\x00\x00a"),
    "BYTES of 4 GB": binary_request(4, [1], "BYTES", b"\xff\xff\xff\xff"),
    "BYTES with a rest": binary_request(6, [1], "BYTES", b"\x01\x00\x00\x00ab"),
    "BYTES ending early": binary_request(8, [2], "BYTES", b"\x04\x00\x00\x00abcd"),
    "BYTES claiming exabytes": binary_request(4, [2**59], "BYTES", b"\x00\x00\x00\x00"),
}


@pytest.mark.parametrize(
    ("body", "length", "malformed"),
    [pytest.param(*case, True, id=name) for name, case in MALFORMED.items()]
    + [pytest.param(*case, False, id=name) for name, case in IMPOSSIBLE.items()],
)
def test_bad_requests_are_refused_with_the_right_status(body, length, malformed):
    with pytest.raises(WireError) as caught:
        wire.decode_request(body, length)
    assert caught.value.malformed is malformed
    assert caught.value.status == (400 if malformed else 422)
    assert len(str(caught.value)) < 400


def test_message_names_field_value_and_limit():
    with pytest.raises(WireError, match=r"^x: unknown datatype, got 'BF16', limit BOOL, ") as caught:
        wire.decode_request(request_json(datatype="BF16"))
    assert (caught.value.field, caught.value.value) == ("x", "BF16")


def valid_body() -> tuple[bytes, int]:
    pictures = np.array([b"ab", b"cde"], object)
    inputs = {
        "images": np.arange(24, dtype=np.float16).reshape(2, 3, 2, 2),
        "pictures": pictures,
        "b": np.ones(3, bool),
    }
    chunks, length = wire.encode_request(inputs, id="1", parameters={"alpha": 0.1}, outputs=[RequestedOutput("r")])
    return b"".join(chunks), length


BODY, LENGTH = valid_body()
JSON_BODY = bytes(wire.encode_request({"x": np.arange(6).reshape(2, 3)}, binary=False)[0][0])


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_mutated_bodies_raise_nothing_but_wire_error(data):
    original, length = data.draw(st.sampled_from([(BODY, LENGTH), (JSON_BODY, None)]))
    body = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, max(0, len(body) - 1)))
        mutation = data.draw(st.sampled_from(["set", "cut", "insert", "digit"]))
        if mutation == "cut":
            del body[where : where + data.draw(st.integers(1, 40))]
        elif mutation == "insert":
            body[where:where] = data.draw(
                st.binary(max_size=8) | st.sampled_from([b"-", b"null", b"[", b"{}", b"9" * 20])
            )
        elif body:
            body[where] = data.draw(
                st.sampled_from(b"0123456789-e") if mutation == "digit" else st.integers(0, 255)
            )
    header_length = data.draw(
        st.sampled_from([length, None]) | st.integers(-2, len(body) + 2) | st.text(max_size=4)
    )
    for decode in (wire.decode_request, wire.decode_response):
        with contextlib.suppress(WireError):
            decode(body, header_length)
    wire.decode_error(body)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_headers_with_any_values_raise_nothing_but_wire_error(data):
    header = json.loads(BODY[:LENGTH])
    spots = [(header, key) for key in header] + [(entry, key) for entry in header["inputs"] for key in entry]
    for _ in range(data.draw(st.integers(1, 3))):
        parent, key = data.draw(st.sampled_from(spots))
        parent[key] = data.draw(JSON_VALUES)
    text = json.dumps(header).encode()
    with contextlib.suppress(WireError):
        wire.decode_request(text + BODY[LENGTH:], len(text))


def test_the_json_part_of_a_response_may_be_limited():
    chunks, length = wire.encode_response("c", {"q": np.zeros(3, np.uint8)})
    body = b"".join(chunks)
    assert wire.decode_response(body, length, max_json_bytes=length).model_name == "c"
    with pytest.raises(WireError, match=f"JSON part is too long.*got {length}, limit {length - 1}"):
        wire.decode_response(body, length, max_json_bytes=length - 1)
    chunks, length = wire.encode_response("c", {"b": np.array([b"1", b"2"], object)})
    with pytest.raises(WireError, match="too many elements, got 2, limit 1"):
        wire.decode_response(b"".join(chunks), length, max_strings=1)


def test_a_key_that_occurs_twice_is_found_in_time_linear_in_the_keys() -> None:
    members = [f'"{i}":0' for i in range(100_000)]
    body = ("{" + ",".join([*members, '"last":1', '"last":2']) + "}").encode()
    begun = time.process_time()
    with pytest.raises(WireError, match="occurs twice in one object, got 'last'"):
        wire.decode_request(body)
    assert time.process_time() - begun < 5  # it took minutes when each key was searched in all others
