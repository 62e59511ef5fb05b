r"""DMD2 of SDXL, one step at timestep 399; not in the paper's tables.

    d2g evaluate --config=configs/evaluate/dmd2_sdxl.py --prompts=coco2017_5k.txt --reference=coco2017.npz \
        --teacher-images=results/sdxl_teacher-drawn/images --weights-inception=inception-2015-12-05.pt \
        --weights-clip-g14=clip-g14 --weights-dreamsim=dreamsim \
        --out=results/dmd2_sdxl.json

Its authors' own figure, by another protocol: FID 19.01. Not run here: no weights. Every file named here, and what has
been tested: docs/evaluate.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every field is a flag of `d2g evaluate`, which overrides it."""
    c = ConfigDict()
    c.name = "DMD2, SDXL, 1 step"
    c.protocol = "coco2017-5k"
    c.model = "stabilityai/stable-diffusion-xl-base-1.0"
    c.unet = "dmd2_sdxl_1step_unet.safetensors"
    c.system = "dmd2-sdxl"
    c.dtype = "bfloat16"
    return c
