"""SDXL base 1.0, 50 guided steps: the teacher's row on COCO 2017.

    d2g evaluate --config=configs/evaluate/sdxl_teacher.py $COCO2017 --out=results/sdxl_teacher.json

Run it first: the others are compared with its images. Published: FID 25.56, CLIP 0.346, DreamDiv 0.338. Not run here:
no weights. $COCO2017: docs/evaluate.md.
"""

from ml_collections import ConfigDict

from d2g_jax.config.evaluation import SDXL, coco2017


def get_config() -> ConfigDict:
    return coco2017(
        "SDXL-Base-1.0, 50 steps",
        model=SDXL,
        steps=50,
        guidance_scale=8.0,  # as DMD2's pairs; the paper's is not stated
        solver="euler",
        spacing="trailing",
    )
