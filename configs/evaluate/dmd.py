"""DMD, one step, SD 1.5: its row on COCO 2014; DMD2's SD 1.5 in the same way.

    d2g evaluate --config=configs/evaluate/dmd.py $COCO2014 --out=results/dmd.json

Published: FID 11.49 (DMD2: 9.28 and 8.35), 0.09 s an image. Not run here: no weights. $COCO2014: docs/evaluate.md.
"""

from ml_collections import ConfigDict

from d2g_jax.config.evaluation import SD15, coco2014


def get_config() -> ConfigDict:
    return coco2014("DMD", model=SD15, unet="dmd_sd15_unet.safetensors", system="dmd")
