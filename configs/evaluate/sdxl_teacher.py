r"""SDXL base 1.0, 50 guided steps: the teacher's row on COCO 2017.

    d2g evaluate --config=configs/evaluate/sdxl_teacher.py --prompts=coco2017_5k.txt --reference=coco2017.npz \
        --weights-inception=inception-2015-12-05.pt \
        --weights-clip-g14=clip-g14 --weights-dreamsim=dreamsim \
        --out=results/sdxl_teacher.json

Run it first: the others are compared with its images. Published: FID 25.56, CLIP 0.346, DreamDiv 0.338. Not run here:
no weights. Every file named here, and what has been tested: docs/evaluate.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every field is a flag of `d2g evaluate`, which overrides it."""
    c = ConfigDict()
    c.name = "SDXL-Base-1.0, 50 steps"
    c.protocol = "coco2017-5k"
    c.model = "stabilityai/stable-diffusion-xl-base-1.0"
    c.steps = 50
    c.guidance_scale = 8.0  # as DMD2's pairs; the paper's is not stated
    c.solver = "euler"
    c.spacing = "trailing"
    c.dtype = "bfloat16"
    return c
