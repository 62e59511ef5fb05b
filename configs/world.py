"""The world of textures, on two CPU cores; the demo is still on the digits.

    d2g teacher --config=configs/world.py --workdir=runs/world           hours, most of them of the denoiser
    d2g pairs --config=configs/world.py --workdir=runs/pairs             1,024 pairs
    d2g train --config=configs/world.py --workdir=runs/pairs             a student, with R in every line

Every field and its meaning: d2g_jax/config/base_config.py. What it is for: docs/when.md.
"""

from d2g_jax.digits.world.config import get_config

__all__ = ["get_config"]
