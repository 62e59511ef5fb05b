r"""SDXL-Lightning, one step, x0 prediction: its row on COCO 2017.

    d2g evaluate --config=configs/evaluate/sdxl_lightning.py $COCO2017 \
        --teacher-images=results/sdxl_teacher-drawn/images --out=results/sdxl_lightning.json

Published: FID 30.14, CLIP 0.324, DreamDiv 0.315, DreamSim 0.345. Not run here: no weights. $COCO2017: docs/evaluate.md.
"""

from ml_collections import ConfigDict

from d2g_jax.config.evaluation import SDXL, coco2017


def get_config() -> ConfigDict:
    return coco2017(
        "SDXL-Lightning",
        model=SDXL,
        unet="sdxl_lightning_1step_unet_x0.safetensors",  # of ByteDance/SDXL-Lightning
        system="sdxl-lightning",
    )
