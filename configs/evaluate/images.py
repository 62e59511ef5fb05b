r"""Systems without weights in diffusers' layout: a folder of their images, one for each caption in order.

    CONFIG=configs/evaluate/images.py
    FILES="--prompts=coco2014_30k.txt --reference=coco2014.npz --weights-inception=inception-2015-12-05.pt \
        --weights-clip-b32=clip-b32 --weights-clip-g14=clip-g14"
    d2g evaluate --config=$CONFIG --images=gigagan --name="GigaGAN" $FILES --out=results/gigagan.json
    d2g evaluate --config=$CONFIG --images=stylegan_t --name="StyleGAN-T" $FILES --out=results/stylegan_t.json
    d2g evaluate --config=$CONFIG --images=ufogen --name="UFOGen" $FILES --out=results/ufogen.json
    d2g evaluate --config=$CONFIG --images=md_ufogen --name="MD-UFOGen" $FILES --out=results/md_ufogen.json
    d2g evaluate --config=$CONFIG --images=dalle2 --name="DALL-E 2" $FILES --out=results/dalle2.json
    d2g evaluate --config=$CONFIG --images=imagen --name="Imagen" $FILES --out=results/imagen.json
    d2g evaluate --config=$CONFIG --images=pixart --name="PixArt-α" $FILES --out=results/pixart.json

Published FID: GigaGAN 9.09, StyleGAN-T 13.90, UFOGen 12.78, MD-UFOGen 11.67, DALL-E 2 10.39, Imagen 7.27, PixArt-α
10.65.
GigaGAN's authors give their images away: they check this whole path (9.06 to 9.09, CLIP ViT-B/32 0.33).
Not run here: no images, no weights. How to get every file named here: docs/evaluate.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every field is a flag of `d2g evaluate`, which overrides it."""
    c = ConfigDict()
    c.protocol = "coco2014-30k"
    return c
