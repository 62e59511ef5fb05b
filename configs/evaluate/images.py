"""Systems without weights in diffusers' layout: a folder of their images, one for each caption in order.

    CONFIG=configs/evaluate/images.py
    d2g evaluate --config=$CONFIG --images=gigagan --name="GigaGAN" $COCO2014 --out=results/gigagan.json
    d2g evaluate --config=$CONFIG --images=stylegan_t --name="StyleGAN-T" $COCO2014 --out=results/stylegan_t.json
    d2g evaluate --config=$CONFIG --images=ufogen --name="UFOGen" $COCO2014 --out=results/ufogen.json
    d2g evaluate --config=$CONFIG --images=md_ufogen --name="MD-UFOGen" $COCO2014 --out=results/md_ufogen.json
    d2g evaluate --config=$CONFIG --images=dalle2 --name="DALL-E 2" $COCO2014 --out=results/dalle2.json
    d2g evaluate --config=$CONFIG --images=imagen --name="Imagen" $COCO2014 --out=results/imagen.json
    d2g evaluate --config=$CONFIG --images=pixart --name="PixArt-α" $COCO2014 --out=results/pixart.json

Published FID: GigaGAN 9.09, StyleGAN-T 13.90, UFOGen 12.78, MD-UFOGen 11.67, DALL-E 2 10.39, Imagen 7.27, PixArt-α
10.65.
GigaGAN's authors give their images away: they check this whole path (9.06 to 9.09, CLIP ViT-B/32 0.33).
Not run here: no images, no weights. How to get every file named here: docs/evaluate.md.
"""

from ml_collections import ConfigDict

from d2g_jax.config.evaluation import coco2014


def get_config() -> ConfigDict:
    return coco2014()
