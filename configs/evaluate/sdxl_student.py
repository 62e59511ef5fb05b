r"""Our student of SDXL, one step: the row "SDXL-Diffusion2GAN" on COCO 2017.

    d2g evaluate --config=configs/evaluate/sdxl_student.py $COCO2017 \
        --teacher-images=results/sdxl_teacher-drawn/images --out=results/sdxl_student.json

Published: FID 25.49, CLIP 0.347, DreamDiv 0.268, DreamSim 0.284. Not run here: no weights. $COCO2017: docs/evaluate.md.
"""

from ml_collections import ConfigDict

from d2g_jax.config.evaluation import coco2017


def get_config() -> ConfigDict:
    return coco2017(
        "SDXL-Diffusion2GAN",
        model="runs/sdxl",  # a training workdir or an export
    )
