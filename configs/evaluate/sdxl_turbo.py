r"""SDXL-Turbo, one step: its row on COCO 2017.

    d2g evaluate --config=configs/evaluate/sdxl_turbo.py --prompts=coco2017_5k.txt --reference=coco2017.npz \
        --weights-inception=inception-2015-12-05.pt \
        --weights-clip-g14=clip-g14 --weights-dreamsim=dreamsim \
        --out=results/sdxl_turbo.json

It draws 512 pixels, the teacher 1024, so there is no common noise; --teacher-images=results/sdxl_teacher-drawn/images
goes with --height=1024 --width=1024, for which it was not trained. Published: FID 28.10, CLIP 0.342, DreamDiv 0.232,
DreamSim 0.368. Not run here: no weights. Every file named here, and what has been tested: docs/evaluate.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every field is a flag of `d2g evaluate`, which overrides it."""
    c = ConfigDict()
    c.name = "SDXL-Turbo"
    c.protocol = "coco2017-5k"
    c.model = "stabilityai/sdxl-turbo"  # draws 512x512
    c.system = "sdxl-turbo"
    c.dtype = "bfloat16"
    return c
