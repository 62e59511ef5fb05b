r"""A one-step UNet of the SDXL-Lightning kind that predicts epsilon.

    d2g evaluate --config=configs/evaluate/sdxl_lightning_eps.py $COCO2017 \
        --teacher-images=results/sdxl_teacher-drawn/images --out=results/sdxl_lightning_eps.json

Not run here: no weights. $COCO2017: docs/evaluate.md.
"""

from ml_collections import ConfigDict

from d2g_jax.config.evaluation import SDXL, coco2017


def get_config() -> ConfigDict:
    return coco2017("SDXL-Lightning, epsilon", model=SDXL, unet="unet.safetensors", system="sdxl-lightning-epsilon")
