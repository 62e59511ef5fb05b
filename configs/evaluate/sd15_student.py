"""Our student of Stable Diffusion 1.5, one step: the row "Diffusion2GAN" on COCO 2014.

    d2g evaluate --config=configs/evaluate/sd15_student.py $COCO2014 --out=results/sd15_student.json

Published: FID 9.29, 0.09 s an image. Not run here: no weights. $COCO2014: docs/evaluate.md.
"""

from ml_collections import ConfigDict

from d2g_jax.config.evaluation import coco2014


def get_config() -> ConfigDict:
    return coco2014(
        "Diffusion2GAN, SD 1.5",
        model="runs/sd15",  # a training workdir or an export
    )
