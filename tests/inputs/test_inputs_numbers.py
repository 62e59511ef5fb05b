"""Numbers of other people: NaN, signs, and what is longer than 32 bits."""

import math

import numpy as np
import pytest

from d2g_jax.inputs.numbers import COUNT, RATE, SEED, SHARE, WEIGHT, Range
from d2g_jax.runtime.errors import UserError


@pytest.mark.parametrize(
    ("allowed", "good", "bad"),
    [
        (SEED, [0, 2**32 - 1, np.int64(7)], [-1, 2**32, 2**64 - 1, 1.0, True, "7", None]),
        (COUNT, [1, 2**31 - 1], [0, 1e3, 10**20]),
        (RATE, [1e-9, 3], [0, -1, math.nan, math.inf]),
        (WEIGHT, [0, 0.5], [-0.1, math.nan, math.inf]),
        (SHARE, [0, 1, 0.5], [1.1, -0.1, math.nan]),
        (Range(), [-1, 0.5], [math.nan, math.inf, -math.inf, "a", 10**400]),
    ],
)
def test_ranges(allowed, good, bad):
    for value in good:
        allowed.check("x", value)
    for value in bad:
        with pytest.raises(UserError, match=f"^x=.*; give {allowed}$"):
            allowed.check("x", value)


def test_ranges_in_words():
    assert str(SEED) == "a whole number from 0 to 4294967295"
    assert (str(RATE), str(SHARE), str(Range())) == ("a number above 0", "a number from 0 to 1", "a number")
