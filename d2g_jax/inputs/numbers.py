"""Numbers of other people: what range each may be in."""

from __future__ import annotations

import dataclasses
import math
from numbers import Integral, Real

from d2g_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`, both included unless `above`, which leaves `least` out; NaN is in none."""

    least: float = -math.inf
    most: float = math.inf
    whole: bool = False
    above: bool = False

    def __contains__(self, value: object) -> bool:
        kind = Integral if self.whole else Real
        if not isinstance(value, kind) or isinstance(value, bool) or (not self.whole and not _is_finite(value)):
            return False
        return self.least <= value <= self.most and not (self.above and value == self.least)

    def __str__(self) -> str:
        """Such as "a whole number from 1": what a message tells to give."""
        bounds = [f"{'above' if self.above else 'from'} {_text(self.least)}"] if self.least > -math.inf else []
        bounds += [f"to {_text(self.most)}"] if self.most < math.inf else []
        return " ".join(["a whole number" if self.whole else "a number", *bounds])

    def check(self, name: str, value: object) -> None:
        """Raises `UserError` that calls it `name` for a value out of range."""
        if value not in self:
            shown = value if isinstance(value, Real) else repr(value)
            raise UserError(f"{name}={shown}; give {self}")


def _is_finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that is larger than all floats
        return False


def _text(bound: float) -> str:
    return f"{bound:.0f}" if float(bound).is_integer() else f"{bound:g}"


COUNT = Range(1, 2**31 - 1, whole=True)
LAYERS = Range(1, 256, whole=True)
"""Of a network's level: more are a slip, and building them would take hours."""
AMOUNT = Range(0, 2**31 - 1, whole=True)
"""Compiled programs count in 32 bits."""
SEED = Range(0, 2**32 - 1, whole=True)
"""What threefry and numpy are seeded with: 32 bits."""
RECORD_SEED = Range(0, 2**31 - 1, whole=True)
"""Of pairs, which keep theirs beside record ids as signed 32 bits."""
GUIDANCE = Range(0, 100)
WEIGHT = Range(0)
RATE = Range(0, above=True)
SHARE = Range(0, 1)
