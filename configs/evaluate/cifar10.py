"""A student of EDM's teacher of CIFAR-10, one class after another.

    d2g evaluate --config=configs/evaluate/cifar10.py --out=results/cifar10.json

Published for the recipe of configs/cifar10_edm.py: FID 3.82. Not run here: no weights. The
reference is made of the training images once: docs/cifar10.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every field is a flag of `d2g evaluate`, which overrides it."""
    c = ConfigDict()
    c.protocol = "cifar10-50k"
    c.name = "EDM, CIFAR-10, 1 step"
    c.model = "runs/cifar10_edm"
    c.reference = "stats/cifar10.npz"
    c.weights_inception = "inception-2015-12-05.pt"
    c.metrics = "fid"
    c.draw_batch = 1000
    return c
