"""Weights and inputs by formula, so that numbers of a network can be written down without its weights."""

import math
import zlib

import numpy as np


def tensor(name, shape):
    """Weights near the size of an initialisation, biases of 0.1, norms near one; of a name and a shape alone."""
    wave = np.sin(0.37 * np.arange(math.prod(shape)) ** 1.3 + zlib.crc32(name.encode()) % 1000).reshape(shape)
    if len(shape) > 1:
        return (wave / math.sqrt(math.prod(shape[1:]))).astype(np.float32)
    return (0.1 * wave + (name.endswith("weight"))).astype(np.float32)


def image(shape):
    return np.sin(0.71 * np.arange(math.prod(shape)) ** 1.1).reshape(shape).astype(np.float32)
