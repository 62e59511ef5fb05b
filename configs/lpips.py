"""A LatentLPIPS for the VAE of SD 1.5, by the paper's recipe as far as it is known; for another VAE change `pipeline`.

    d2g lpips --config=configs/lpips.py --workdir=runs/lpips_sd15 \
        --config.images.train=imagenet/train --config.images.val=imagenet/val --config.triplets.folder=bapps/2afc

Data, layout, costs, and what has been measured (nothing at this size): docs/lpips.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Sources are the sections of docs/lpips.md; "released" is the author's code, "LPIPS" arXiv 1801.03924's."""
    c = ConfigDict()
    c.name = "sd15"  # of the latent space, as the metric's config.json will say
    c.seed = 0
    c.pipeline = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # folder or hub id; only vae/ is read
    c.mesh = ConfigDict()  # all devices share each batch; {"cpu_devices": 2} splits the host's CPU
    c.trunk = ConfigDict(
        {
            # VGG16-BN without its first three pools: released.
            "widths": (64, 128, 256, 512, 512),
            "convs": (2, 2, 3, 3, 3),
            "pools": (False, False, False, True, True),
        }
    )
    c.images = images()
    c.encoder = ConfigDict({"batch_size": 32, "dtype": "float32"})
    c.classification = classification()
    c.triplets = triplets()
    c.calibration = calibration()
    return c.lock()


def images() -> ConfigDict:
    """Labelled images, ImageNet-1k in the paper."""
    return ConfigDict(
        {
            "train": "",  # a folder of class folders, or a TFDS folder such as imagenet2012/5.1.0
            "val": "",  # the same for held-out images; empty takes a share of train
            "train_split": "train",  # of TFDS folders
            "val_split": "validation",
            "held_out": 0.02,  # that share
            "cache": "",  # encode once, to this folder; empty encodes every batch anew. A whole cache needs no images
            "views": 4,  # crops per image in a cache: the centre and random ones. Not in the paper
            "size": 512,  # pixels; 64x64 latents: a reimplementation that the author recommends
            "resize": 600,  # short side before the centre crop of held-out images: the same. 0: no resizing at all
            "posterior": "sample",  # of training images, "mean" or "sample": the same. Held-out images take the mean
        }
    )


def classification() -> ConfigDict:
    """Stage one. The paper's optimiser is unknown; the released checkpoint looks like PyTorch's ImageNet example."""
    return ConfigDict(
        {
            "epochs": 90.0,  # that example's, as all down to decay
            "batch_size": 256,
            "learning_rate": 0.1,
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "decay_epochs": 30.0,  # the rate is multiplied by `decay` after each
            "decay": 0.1,
            "pool": 7,  # the head of torchvision's VGG: released. 0 takes the last tap as it is
            "hidden": (4096, 4096),
            "dropout": 0.5,
            "dtype": "bfloat16",  # compute; weights, batch statistics and the head are float32
            "save_every": 1000,  # steps
        }
    )


def triplets() -> ConfigDict:
    """Human judgements: BAPPS, the data set of LPIPS."""
    return ConfigDict(
        {
            "folder": "",  # its 2afc folder, with train and val
            "size": 512,  # pixels that its 64-pixel patches are upsampled to: the reimplementation's
            "posterior": "mean",  # less variance than a sample
        }
    )


def calibration() -> ConfigDict:
    """Stage two: LPIPS' own recipe, but for the dropout inside its heads."""
    return ConfigDict(
        {
            "epochs": 5.0,  # at the full rate
            "decay_epochs": 5.0,  # then linearly to zero
            "batch_size": 50,
            "learning_rate": 1e-4,
            "betas": (0.5, 0.999),
            "save_every": 1000,  # steps
        }
    )
