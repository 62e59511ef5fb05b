"""SDXL-Turbo, one step: its row on COCO 2017.

    d2g evaluate --config=configs/evaluate/sdxl_turbo.py $COCO2017 --out=results/sdxl_turbo.json

It draws 512 pixels, the teacher 1024, so there is no common noise; --teacher-images=results/sdxl_teacher-drawn/images
goes with --height=1024 --width=1024, for which it was not trained. Published: FID 28.10, CLIP 0.342, DreamDiv 0.232,
DreamSim 0.368. Not run here: no weights. $COCO2017: docs/evaluate.md.
"""

from ml_collections import ConfigDict

from d2g_jax.config.evaluation import coco2017


def get_config() -> ConfigDict:
    return coco2017(
        "SDXL-Turbo",
        model="stabilityai/sdxl-turbo",  # draws 512x512
        system="sdxl-turbo",
    )
