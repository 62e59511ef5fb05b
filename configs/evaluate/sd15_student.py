r"""Our student of Stable Diffusion 1.5, one step: the row "Diffusion2GAN" on COCO 2014.

    d2g evaluate --config=configs/evaluate/sd15_student.py --prompts=coco2014_30k.txt --reference=coco2014.npz \
        --weights-inception=inception-2015-12-05.pt --weights-clip-b32=clip-b32 --weights-clip-g14=clip-g14 \
        --out=results/sd15_student.json

Published: FID 9.29, 0.09 s an image. Not run here: no weights. Every file named here, and what has been tested:
docs/evaluate.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every field is a flag of `d2g evaluate`, which overrides it."""
    c = ConfigDict()
    c.name = "Diffusion2GAN, SD 1.5"
    c.protocol = "coco2014-30k"
    c.model = "runs/sd15"  # a training workdir or an export
    c.dtype = "bfloat16"
    return c
