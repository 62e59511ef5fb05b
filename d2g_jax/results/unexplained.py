"""R: how much of the map from noise to image one network call does not explain.

The figure that says whether a perceptual loss can pay (docs/when.md): where it is near 0, squared error learns the
teacher's own image and no loss does better; where it is large, squared error draws the mean of many images.
"""

from __future__ import annotations

import numpy as np


def unexplained(generated: np.ndarray, target: np.ndarray) -> float:
    """Mean squared error over the variance of the targets about the mean of each channel; NaN where that is 0.

    Args:
      generated, target: (N, C, h, w), a student's scaled latents and its teacher's for the same noise and prompts, on
        which the student was not trained.

    Returns:
      0 for a student that draws its teacher's images, 1 for one that always draws their mean; above 1 for worse.
    """
    target = np.asarray(target, np.float64)
    spread = np.square(target - target.mean(axis=(0, 2, 3), keepdims=True)).sum()
    error = np.square(np.asarray(generated, np.float64) - target).sum()
    return float(error / spread) if spread else float("nan")
