from __future__ import annotations

import math

import pytest

from dat_client import InvalidRequest
from dat_client.calls import checks


def test_seconds_are_cut_to_what_poll_can_wait():
    assert [checks.positive_seconds("s", value) for value in (1e-9, 2, 10**400)] == [1e-9, 2.0, 1e6]
    assert checks.LONGEST_S * 1000 < 2**31


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "1", None, True])
def test_seconds_that_are_refused(value):
    with pytest.raises(InvalidRequest, match=r"^s: got .*, must be a finite number of seconds above 0$") as caught:
        checks.positive_seconds("s", value)
    assert (caught.value.field, caught.value.limit) == ("s", "a finite number of seconds above 0")
    assert caught.value.value is value


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "0", None, False])
def test_seconds_may_be_0_but_not_less(value):
    assert [checks.seconds("s", good) for good in (0, 0.0, 1, 10**400)] == [0.0, 0.0, 1.0, 1e6]
    with pytest.raises(InvalidRequest, match=r"^s: got .*, must be a finite number of seconds 0 or above$"):
        checks.seconds("s", value)


@pytest.mark.parametrize("value", ["c", None, 1, ["a"], {}])
def test_names_that_are_refused(value):
    assert checks.choice("name", "b", {"a": 1, "b": 2}) == "b"
    with pytest.raises(InvalidRequest, match=r"^name: got .*, must be one of a, b$") as caught:
        checks.choice("name", value, {"a": 1, "b": 2})
    assert caught.value.field == "name"


@pytest.mark.parametrize("value", [1, 2.0, "2", None, True])
def test_integers_that_are_refused(value):
    assert checks.integer("n", 2, 2) == 2
    with pytest.raises(InvalidRequest, match=r"^n: got .*, must be an integer of at least 2$"):
        checks.integer("n", value, 2)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, "0", None, True])
def test_shares_that_are_refused(value):
    assert [checks.share("p", good) for good in (0, 0.5, 1)] == [0, 0.5, 1]
    with pytest.raises(InvalidRequest, match=r"^p: got .*, must be a number in 0\.\.1$"):
        checks.share("p", value)
