"""A student of the digits teacher: needs no file but the student.

    d2g evaluate --config=configs/evaluate/digits.py --model=runs/demo/students/full --out=results/digits_full.json

Measured: docs/evaluate.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every field is a flag of `d2g evaluate`, which overrides it."""
    c = ConfigDict()
    c.protocol = "digits"
    c.seed = 0
    c.draw_batch = 256
    return c
