r"""LCM Dreamshaper v7, one step; not in the paper's tables.

    d2g evaluate --config=configs/evaluate/lcm.py --prompts=coco2014_30k.txt --reference=coco2014.npz \
        --weights-inception=inception-2015-12-05.pt --weights-clip-b32=clip-b32 --weights-clip-g14=clip-g14 \
        --out=results/lcm.json

Not run here: no weights. Every file named here, and what has been tested: docs/evaluate.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every field is a flag of `d2g evaluate`, which overrides it."""
    c = ConfigDict()
    c.name = "LCM, 1 step"
    c.protocol = "coco2014-30k"
    c.model = "SimianLuo/LCM_Dreamshaper_v7"
    c.system = "lcm"
    c.dtype = "bfloat16"
    return c
