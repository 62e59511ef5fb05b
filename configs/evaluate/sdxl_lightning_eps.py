r"""A one-step UNet of the SDXL-Lightning kind that predicts epsilon.

    d2g evaluate --config=configs/evaluate/sdxl_lightning_eps.py --prompts=coco2017_5k.txt --reference=coco2017.npz \
        --teacher-images=results/sdxl_teacher-drawn/images --weights-inception=inception-2015-12-05.pt \
        --weights-clip-g14=clip-g14 --weights-dreamsim=dreamsim \
        --out=results/sdxl_lightning_eps.json

Not run here: no weights. Every file named here, and what has been tested: docs/evaluate.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every field is a flag of `d2g evaluate`, which overrides it."""
    c = ConfigDict()
    c.name = "SDXL-Lightning, epsilon"
    c.protocol = "coco2017-5k"
    c.model = "stabilityai/stable-diffusion-xl-base-1.0"
    c.unet = "unet.safetensors"
    c.system = "sdxl-lightning-epsilon"
    c.dtype = "bfloat16"
    return c
