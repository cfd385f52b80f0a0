from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dat_client.wire.scan import largest_magnitudes, range_outside_0_1

FLOATS = st.sampled_from([np.dtype(np.float16), np.dtype(np.float32)])
SHAPES = hnp.array_shapes(min_dims=4, max_dims=4, max_side=4)


@given(FLOATS.flatmap(lambda dtype: hnp.arrays(dtype, SHAPES)))
def test_range_is_that_of_numpy(images):
    inside = bool(((images >= 0) & (images <= 1)).all())
    outside = range_outside_0_1(images)
    assert (outside is None) == inside
    if outside is not None:
        np.testing.assert_array_equal(outside, (float(images.min()), float(images.max())))


@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<f4", ">f4"])
def test_borders_and_negative_zero_lie_inside_in_either_byte_order(dtype):
    images = np.array([0.0, -0.0, 1.0], dtype).reshape(1, 3, 1, 1)
    assert range_outside_0_1(images) is None
    images[0, 1] = np.nextafter(np.float16(1), np.float16(2))
    assert range_outside_0_1(images) == (0.0, float(images.max()))
    assert range_outside_0_1(images[:, ::2]) is None


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("value", [np.nan, -np.nan])
def test_nan_is_outside(dtype, value):
    outside = range_outside_0_1(np.array([0.5, value], dtype))
    assert outside is not None
    assert np.isnan(outside).all()


@given(st.sampled_from([np.float16, np.float32, np.int8]).flatmap(lambda dtype: hnp.arrays(dtype, SHAPES)))
def test_magnitudes_are_those_of_numpy(gradients):
    expected = np.abs(gradients.astype(np.float64)).reshape(len(gradients), -1).max(1)
    np.testing.assert_array_equal(largest_magnitudes(gradients), expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("values", [[-2, -1], [1, 2], [-2, 1], [0, -0.0], [-np.inf, 1], [np.inf, -1]])
def test_magnitudes_of_either_sign(dtype, values):
    gradients = np.array([values, [1, -3]], dtype).reshape(2, 2, 1, 1)
    assert largest_magnitudes(gradients).tolist() == [max(map(abs, values)), 3]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("value", [np.nan, -np.nan])
def test_nan_reaches_the_magnitude_of_its_sample_alone(dtype, value):
    gradients = np.array([[1, value], [1, 2]], dtype).reshape(2, 2, 1, 1)
    assert np.isnan(largest_magnitudes(gradients)).tolist() == [True, False]
