"""Items made one ahead of their use."""

import pytest

from d2g_jax.runtime.ahead import one_ahead


def test_one_ahead_is_in_order_passes_errors_on_and_runs_no_further():
    seen = []

    def items():
        for i in range(10):
            seen.append(i)
            yield i
        raise OSError("last")

    with one_ahead(items()) as ahead:
        assert [next(ahead), next(ahead)] == [0, 1]
    assert len(seen) <= 3
    with one_ahead(items()) as ahead, pytest.raises(OSError, match="last"):
        list(ahead)
    assert seen[-10:] == list(range(10))
