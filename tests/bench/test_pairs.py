"""`d2g bench pairs`: that both sides solve the same, and that a side which does not is found out."""

import numpy as np
import pytest

from d2g_jax.bench import pairs
from d2g_jax.bench.pairs import PairsRequest, run_pairs
from d2g_jax.digits.config import WEIGHTS
from d2g_jax.errors import UserError

SMALL = PairsRequest(str(WEIGHTS / "pipeline"), batch=4, steps=2, repeats=1)


def test_both_sides_solve_the_same():
    pytest.importorskip("torch")
    report = run_pairs(SMALL)
    _, ours, theirs = report["rows"]
    assert ours["value"] == pytest.approx(4 / ours["seconds"])
    assert report["bars"][0]["measured"] == pytest.approx(ours["value"] / theirs["value"])
    assert 0 < ours["share_of_peak"] < 1


def test_other_latents_are_refused():
    a = np.ones((2, 4, 8, 8), np.float32)
    with pytest.raises(UserError, match="different latents"):
        pairs.check_same(a, 1.1 * a)
    with pytest.raises(UserError, match="different latents"):
        pairs.check_same(a * np.nan, a)


@pytest.mark.parametrize(
    ("change", "flag"), [({"steps": 0}, "--steps"), ({"batch": 3}, "--batch"), ({"dtype": "f8"}, "--dtype")]
)
def test_bad_requests(change, flag):
    with pytest.raises(UserError, match=flag):
        run_pairs(PairsRequest(**{"model": "nowhere", **change}))
