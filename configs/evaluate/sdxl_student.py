r"""Our student of SDXL, one step: the row "SDXL-Diffusion2GAN" on COCO 2017.

    d2g evaluate --config=configs/evaluate/sdxl_student.py --prompts=coco2017_5k.txt --reference=coco2017.npz \
        --teacher-images=results/sdxl_teacher-drawn/images --weights-inception=inception-2015-12-05.pt \
        --weights-clip-g14=clip-g14 --weights-dreamsim=dreamsim \
        --out=results/sdxl_student.json

Published: FID 25.49, CLIP 0.347, DreamDiv 0.268, DreamSim 0.284. Not run here: no weights. Every file named here, and
what has been tested: docs/evaluate.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every field is a flag of `d2g evaluate`, which overrides it."""
    c = ConfigDict()
    c.name = "SDXL-Diffusion2GAN"
    c.protocol = "coco2017-5k"
    c.model = "runs/sdxl"  # a training workdir or an export
    c.dtype = "bfloat16"
    return c
