from __future__ import annotations

import pickle

import pytest

from dat_client import errors
from dat_client.wire.tensors import refuse

from .test_public_names import EXCEPTIONS

SAMPLES = [
    errors.DatError("m"),
    errors.InvalidRequest("m", field="f", value=1, limit=2, status=422),
    errors.UnknownCodec("m", field="codec", status=404),
    errors.TooLarge("m", limit=5, status=413),
    errors.WireError("m", "f", 1, 2, malformed=True),
    errors.Unauthorized("m", status=403),
    errors.Unavailable("m", attempts=3, cause="reset"),
    errors.Overloaded("m", attempts=3, cause="503", retry_after_s=1.5),
    errors.ProtocolError("m"),
    errors.InvalidDataset("m"),
]


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
def test_every_error_survives_pickling(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == "m"
    assert copy.__dict__ == error.__dict__


def test_the_tree_is_the_one_drawn_and_every_leaf_is_sampled():
    tree = {cls.__name__: cls.__base__.__name__ for cls in map(type, SAMPLES)}
    assert tree == {
        "DatError": "Exception",
        "InvalidRequest": "DatError",
        "UnknownCodec": "InvalidRequest",
        "TooLarge": "InvalidRequest",
        "WireError": "InvalidRequest",
        "Unauthorized": "DatError",
        "Unavailable": "DatError",
        "Overloaded": "Unavailable",
        "ProtocolError": "DatError",
        "InvalidDataset": "DatError",
    }
    assert tree.keys() | {"CodecChanged"} == EXCEPTIONS
    assert all(name in (errors.__doc__ or "") for name in tree)
    assert issubclass(errors.InvalidRequest, ValueError)
    assert not issubclass(errors.Unauthorized, ValueError)


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, [[[[[[1]]]]]] * 50, 10**5000, {"a": "b" * 500}, b"\xff" * 1000],
    ids=["str", "list", "int", "dict", "bytes"],
)
def test_shown_is_short(value):
    assert 0 < len(errors.shown(value)) <= 80


def test_a_refused_argument_names_field_value_limit_and_hint_also_after_pickling():
    error = errors.invalid("images", "uint8 [N,3,H,W]", found="shape [3, 8, 8]", hint="pass images[None]")
    for copy in (error, pickle.loads(pickle.dumps(error))):
        assert str(copy) == "images: got shape [3, 8, 8], must be uint8 [N,3,H,W]; pass images[None]"
        assert (copy.field, copy.value, copy.limit) == ("images", "shape [3, 8, 8]", "uint8 [N,3,H,W]")
    assert errors.invalid("seed", "an integer", value="x").value == "x"
    with pytest.raises(errors.WireError, match=r"^shape: too many axes, got 33, limit 32$") as caught:
        refuse("too many axes", "shape", 33, 32)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.field, copy.value, copy.limit) == (str(caught.value), "shape", 33, 32)
