r"""InstaFlow-0.9B, one step: its row on COCO 2014.

    d2g evaluate --config=configs/evaluate/instaflow.py --prompts=coco2014_30k.txt --reference=coco2014.npz \
        --weights-inception=inception-2015-12-05.pt --weights-clip-b32=clip-b32 --weights-clip-g14=clip-g14 \
        --out=results/instaflow.json

Published: FID 13.10, 0.09 s an image. Not run here: no weights. Every file named here, and what has been tested:
docs/evaluate.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every field is a flag of `d2g evaluate`, which overrides it."""
    c = ConfigDict()
    c.name = "InstaFlow-0.9B"
    c.protocol = "coco2014-30k"
    c.model = "XCLiu/instaflow_0_9B_from_sd_1_5"
    c.system = "instaflow"
    c.dtype = "bfloat16"
    return c
