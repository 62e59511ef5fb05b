"""Stable Diffusion 1.5, 50 guided steps: the teacher's row on COCO 2014.

    d2g evaluate --config=configs/evaluate/sd15_teacher.py $COCO2014 --out=results/sd15_teacher.json

Published: FID 8.74, 2.59 s an image. Not run here: no weights. $COCO2014: docs/evaluate.md.
"""

from ml_collections import ConfigDict

from d2g_jax.config.evaluation import SD15, coco2014


def get_config() -> ConfigDict:
    return coco2014(
        "Stable Diffusion 1.5, 50 steps",
        model=SD15,
        steps=50,
        guidance_scale=3.0,  # the paper's teacher in its ablation, "SD-CFG-3"; that of the table is not stated
        solver="ddim",
    )
