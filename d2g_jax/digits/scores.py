"""What samples are measured by: is everything as asked, and are edges as sharp as the teacher's."""

from __future__ import annotations

import numpy as np
from scipy import fft

from d2g_jax.digits.data import UNCLEAR
from d2g_jax.digits.scenes import PARTS


def prompt_accuracy(found: np.ndarray, asked: np.ndarray) -> dict[str, float]:
    """Shares of images that the judge finds as asked: each part of the caption, and all together under "all".

    Args:
      found, asked: labels int64 (N, 7) in the order of `PARTS`. What is asked as `UNCLEAR` is right whatever it is.
    """
    right = (found == asked) | (asked == UNCLEAR)
    shares = dict(zip(PARTS, right.mean(axis=0), strict=True)) | {"all": right.all(axis=1).mean()}
    return {name: float(share) for name, share in shares.items()}


def sharp_energy(images: np.ndarray) -> float:
    """Energy of images (N, H, W, 3) uint8 above half the Nyquist frequency, a mean over images, pixels and channels.

    Of a student over the teacher's it is the demo's sharpness: 1 is right, a blur is far below, noise above.
    """
    height, width = images.shape[1:3]
    spectrum = fft.rfft2(images.astype(np.float32) / 255, axes=(1, 2), workers=-1)  # complex64
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    twice = np.where((np.arange(width // 2 + 1) % (width / 2)) == 0, 1.0, 2.0)  # the half that rfft leaves out
    weight = (twice * (radius > 0.25))[..., None]
    return float((np.square(np.abs(spectrum)) * weight).sum(axis=(1, 2)).mean() / (height * width) ** 2)
