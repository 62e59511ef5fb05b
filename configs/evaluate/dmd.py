r"""DMD, one step, SD 1.5: its row on COCO 2014; DMD2's SD 1.5 in the same way.

    d2g evaluate --config=configs/evaluate/dmd.py --prompts=coco2014_30k.txt --reference=coco2014.npz \
        --weights-inception=inception-2015-12-05.pt --weights-clip-b32=clip-b32 --weights-clip-g14=clip-g14 \
        --out=results/dmd.json

Published: FID 11.49 (DMD2: 9.28 and 8.35), 0.09 s an image. Not run here: no weights. Every file named here, and what
has been tested: docs/evaluate.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every field is a flag of `d2g evaluate`, which overrides it."""
    c = ConfigDict()
    c.name = "DMD"
    c.protocol = "coco2014-30k"
    c.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    c.unet = "dmd_sd15_unet.safetensors"
    c.system = "dmd"
    c.dtype = "bfloat16"
    return c
