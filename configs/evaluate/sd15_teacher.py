r"""Stable Diffusion 1.5, 50 guided steps: the teacher's row on COCO 2014.

    d2g evaluate --config=configs/evaluate/sd15_teacher.py --prompts=coco2014_30k.txt --reference=coco2014.npz \
        --weights-inception=inception-2015-12-05.pt --weights-clip-b32=clip-b32 --weights-clip-g14=clip-g14 \
        --out=results/sd15_teacher.json

Published: FID 8.74, 2.59 s an image. Not run here: no weights. Every file named here, and what has been tested:
docs/evaluate.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every field is a flag of `d2g evaluate`, which overrides it."""
    c = ConfigDict()
    c.name = "Stable Diffusion 1.5, 50 steps"
    c.protocol = "coco2014-30k"
    c.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    c.steps = 50
    c.guidance_scale = 3.0  # the paper's teacher in its ablation, "SD-CFG-3"; that of the table is not stated
    c.solver = "ddim"
    c.dtype = "bfloat16"
    return c
