"""The embedded digits teacher on two CPU cores.

    d2g demo --workdir=runs/demo                                         everything, six to seven minutes
    d2g pairs --config=configs/digits.py --workdir=runs/digits           1,024 pairs
    d2g train --config=configs/digits.py --workdir=runs/digits           the full student

Every field and its meaning: d2g_jax/config/base_config.py. Measured figures: README.md, docs/digits.md.
"""

from d2g_jax.digits.config import get_config

__all__ = ["get_config"]
