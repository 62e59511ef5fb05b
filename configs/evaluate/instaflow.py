"""InstaFlow-0.9B, one step: its row on COCO 2014.

    d2g evaluate --config=configs/evaluate/instaflow.py $COCO2014 --out=results/instaflow.json

Published: FID 13.10, 0.09 s an image. Not run here: no weights. $COCO2014: docs/evaluate.md.
"""

from ml_collections import ConfigDict

from d2g_jax.config.evaluation import coco2014


def get_config() -> ConfigDict:
    return coco2014("InstaFlow-0.9B", model="XCLiu/instaflow_0_9B_from_sd_1_5", system="instaflow")
