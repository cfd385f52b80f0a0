from __future__ import annotations

import numpy as np
import pytest

from dat_client import Discretized
from dat_client.errors import InvalidRequest
from tests.client.calls.discretize_call import call


@pytest.mark.parametrize(
    "outputs", [["colour"], [], ["indices", "indices"], "colour", [["indices"]], ["indices", {}]]
)
def test_bad_outputs_are_refused(images, outputs):
    with pytest.raises(InvalidRequest, match="outputs") as caught:
        call(images, outputs=outputs)
    assert caught.value.field == "outputs"


def test_parameters_are_plain_numbers_and_none_is_left_out(images):
    share = np.float32(0.5)
    checked = call(images, replace_fraction=share, seed=None, preset="paper", output_dtype="FP16")
    assert checked.parameters == {"replace_fraction": 0.5, "preset": "paper", "output_dtype": "FP16"}
    assert call(images).parameters == {}


@pytest.mark.parametrize(
    "bad",
    [
        {"alpha": -0.1},
        {"alpha": True},
        {"epsilon": -1},
        {"seed": 1.5},
        {"replace_fraction": 1.5},
        {"alpha": "0.1"},
        {"alpha": float("nan")},
        {"seed": [1]},
        {"output_dtype": "INT8"},
        {"output_dtype": ["FP16"]},
    ],
)
def test_bad_parameters_are_refused_by_name(images, bad):
    with pytest.raises(InvalidRequest) as caught:
        call(images, **bad)
    assert caught.value.field == next(iter(bad))


@pytest.mark.parametrize("name", ["alpha", "epsilon", "normalize", "base"])
def test_step_without_an_attack_is_refused(images, name):
    value = {"normalize": "l2", "base": "x"}.get(name, 0.1)
    with pytest.raises(InvalidRequest, match=f"^{name}: .*pass gradients, or a replace_fraction above 0") as caught:
        call(images, **{name: value})
    assert caught.value.field == name
    assert call(images, **{name: value}, replace_fraction=0.5).parameters[name] == value
    assert call(images, preset="paper").parameters == {"preset": "paper"}


def test_ids_are_never_given_twice(images):
    assert len({call(images).id for _ in range(100)}) == 100


def test_repr_shows_shapes_rather_than_data():
    q = Discretized(np.zeros((2, 3, 8, 8), np.uint8), np.zeros((2, 1, 1), np.uint16), codec="c", fingerprint="f")
    assert (
        repr(q) == "Discretized(reconstruction=uint8[2, 3, 8, 8], indices=uint16[2, 1, 1], "
        "codec='c', fingerprint='f')"
    )
