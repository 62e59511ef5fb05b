r"""DMD2 of SDXL, one step at timestep 399; not in the paper's tables.

    d2g evaluate --config=configs/evaluate/dmd2_sdxl.py $COCO2017 \
        --teacher-images=results/sdxl_teacher-drawn/images --out=results/dmd2_sdxl.json

Its authors' own figure, by another protocol: FID 19.01. Not run here: no weights. $COCO2017: docs/evaluate.md.
"""

from ml_collections import ConfigDict

from d2g_jax.config.evaluation import SDXL, coco2017


def get_config() -> ConfigDict:
    return coco2017("DMD2, SDXL, 1 step", model=SDXL, unet="dmd2_sdxl_1step_unet.safetensors", system="dmd2-sdxl")
