from __future__ import annotations

import json
import math

import numpy as np
import pytest

from dat_client import wire
from dat_client.errors import WireError


@pytest.mark.parametrize("array", [np.arange(12, dtype=">f4").reshape(3, 4), np.arange(12.0).reshape(3, 4).T])
def test_big_endian_and_strided_arrays_are_sent_right(array):
    chunks, length = wire.encode_request({"x": array})
    decoded = wire.decode_request(b"".join(chunks), length).inputs["x"]
    assert decoded.tolist() == array.tolist()


def test_bytes_elements_are_length_prefixed():
    tensor = np.array([b"ab", b""], object)
    chunks, _ = wire.encode_request({"x": tensor})
    assert bytes(chunks[1]) == b"\x02\x00\x00\x00ab\x00\x00\x00\x00"


def test_nested_and_flat_json_data_are_the_same():
    entry = {"name": "x", "datatype": "INT32", "shape": [2, 2]}
    nested, flat = (
        wire.decode_request(json.dumps({"inputs": [{**entry, "data": data}]}).encode()).inputs["x"]
        for data in ([[1, 2], [3, 4]], [1, 2, 3, 4])
    )
    assert np.array_equal(nested, flat)
    assert nested.dtype == flat.dtype
    assert nested.tolist() == [[1, 2], [3, 4]]
    assert nested.dtype == np.int32


@pytest.mark.parametrize(
    "array", [np.zeros(2, np.complex64), np.array(["a"]), np.array([b"a"]), np.zeros(1, "M8[s]")]
)
def test_arrays_that_the_protocol_lacks_are_refused(array):
    with pytest.raises(WireError, match="OIP datatype"):
        wire.encode_request({"x": array})


def test_what_json_cannot_say_is_refused():
    with pytest.raises(WireError, match="NaN"):
        wire.encode_response("m", {"x": np.array([np.nan])}, binary=False)
    with pytest.raises(WireError, match="UTF-8"):
        wire.encode_response("m", {"x": np.array([b"\xff"], object)}, binary=False)
    with pytest.raises(WireError, match="not bytes"):
        wire.encode_response("m", {"x": np.array([7], object)})
    with pytest.raises(WireError, match="parameters"):
        wire.encode_request({}, parameters={"alpha": math.nan})
