r"""SDXL-Lightning, one step, x0 prediction: its row on COCO 2017.

    d2g evaluate --config=configs/evaluate/sdxl_lightning.py --prompts=coco2017_5k.txt --reference=coco2017.npz \
        --teacher-images=results/sdxl_teacher-drawn/images --weights-inception=inception-2015-12-05.pt \
        --weights-clip-g14=clip-g14 --weights-dreamsim=dreamsim \
        --out=results/sdxl_lightning.json

Published: FID 30.14, CLIP 0.324, DreamDiv 0.315, DreamSim 0.345. Not run here: no weights. Every file named here, and
what has been tested: docs/evaluate.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every field is a flag of `d2g evaluate`, which overrides it."""
    c = ConfigDict()
    c.name = "SDXL-Lightning"
    c.protocol = "coco2017-5k"
    c.model = "stabilityai/stable-diffusion-xl-base-1.0"
    c.unet = "sdxl_lightning_1step_unet_x0.safetensors"  # of ByteDance/SDXL-Lightning
    c.system = "sdxl-lightning"
    c.dtype = "bfloat16"
    return c
