"""LCM Dreamshaper v7, one step; not in the paper's tables.

    d2g evaluate --config=configs/evaluate/lcm.py $COCO2014 --out=results/lcm.json

Not run here: no weights. $COCO2014: docs/evaluate.md.
"""

from ml_collections import ConfigDict

from d2g_jax.config.evaluation import coco2014


def get_config() -> ConfigDict:
    return coco2014("LCM, 1 step", model="SimianLuo/LCM_Dreamshaper_v7", system="lcm")
