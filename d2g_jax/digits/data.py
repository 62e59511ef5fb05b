"""scikit-learn's 1,797 handwritten digits, and the attributes that captions name, measured from the pixels at 32x32.

An attribute is relative to its digit: a seven's crossbar and a two's foot give their second moments a lean that no
reader would call a slant, and a one has fewer edges to its ink than an eight. So the thresholds are per digit: the
quartiles of the training images, which makes `regular` and `upright` the middle half.
"""

from __future__ import annotations

import dataclasses

import numpy as np

SIZE = 32
TRAIN_IMAGES = 1437  # of 1,797; the other 360 are the test set
WEIGHTS = ("thin", "regular", "bold")
SLANTS = ("left", "upright", "right")

UNCLEAR = -1
"""The label of what a caption cannot name: a weight or slant between two names, what a plain ground does not have."""

INK_FLOOR = 0.1
"""Ink below this is paper: a haze of 0.02 over a whole image would else weigh as much as a stroke."""

CLEAR_MARGIN = 0.2
"""Half-width of the dead band around a threshold, in units of the digit's interquartile range (about 0.27 sigma)."""

# Lower and upper quartile per digit of the training set; a test finds them again.
WEIGHT_THRESHOLDS = np.array([
    [2.4191, 3.1728], [3.8493, 5.0068], [3.0791, 3.5571], [2.6292, 3.3718], [3.1473, 3.6785], [2.7340, 3.4509],
    [2.7853, 3.8388], [3.1425, 3.6479], [2.8674, 3.8455], [2.6489, 3.3721],
])  # fmt: skip
SLANT_THRESHOLDS = np.array([
    [-0.0667, 0.0126], [-0.0815, 0.0387], [-0.1874, -0.0632], [-0.1296, -0.0163], [-0.0433, 0.0394],
    [-0.0840, 0.0493], [-0.2443, -0.1630], [0.1055, 0.1864], [-0.0604, 0.0542], [-0.1516, -0.0146],
])  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Digits:
    """As scikit-learn has them: ink float64 (N, 8, 8) in [0, 1], and labels int64 (N,) 0..9."""

    ink: np.ndarray
    labels: np.ndarray


def cubic_matrix(inputs: int, outputs: int) -> np.ndarray:
    """Keys' cubic convolution (1981, a = -1/2) as a float64 matrix (outputs, inputs), pixel centres aligned."""
    centre = (np.arange(outputs) + 0.5) * inputs / outputs - 0.5
    t = np.abs(centre[:, None] - np.arange(inputs)[None])
    near = 1.5 * t**3 - 2.5 * t**2 + 1
    far = -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))


def enlarge(ink: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Ink (N, 8, 8) in [0, 1] -> float64 (N, size, size), which the cubic takes a little below 0 and above 1.

    A border of one empty pixel is added first: the data set crops its digits to the box, and a stroke cut by the
    image's edge would have no edge of its own.
    """
    matrix = cubic_matrix(10, size)[:, 1:9]
    return np.einsum("oi,nij,pj->nop", matrix, ink, matrix)


def load() -> tuple[Digits, Digits]:
    """The training (1,437) and test (360) images, always the same ones in the same order."""
    from sklearn.datasets import load_digits  # scikit-learn takes a second to import

    source = load_digits()
    ink, labels = source.images / 16, source.target.astype(np.int64)
    train, test = _split(len(labels))
    return Digits(ink[train], labels[train]), Digits(ink[test], labels[test])


def _split(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the training and of the test images."""
    order = np.random.RandomState(0).permutation(count)  # RandomState's stream is frozen, Generator's is not
    return order[:TRAIN_IMAGES], order[TRAIN_IMAGES:]


def weight_values(ink: np.ndarray) -> np.ndarray:
    """Ink per length of stroke, float64 (N,), of ink (N, H, W) in [0, 1].

    A stroke of length L, width w and brightness b has mass wLb and total variation 2Lb (each of its two flanks rises
    by b). So 2 mass / variation is w whatever L, and times b, the mean brightness weighted by ink, it is the ink per
    length: a thin pen on the scanner's 8x8 grid shows as a dim stroke rather than as a narrow one. 0 without ink.
    """
    ink = _above_floor(ink)
    padded = np.pad(ink, ((0, 0), (1, 1), (1, 1)))
    down = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2
    right = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2
    variation = np.sqrt(down**2 + right**2).sum((1, 2))
    return 2 * np.square(ink).sum((1, 2)) / np.maximum(variation, 1e-12)


def slant_values(ink: np.ndarray) -> np.ndarray:
    """Horizontal shear, float64 (N,), of ink (N, H, W) in [0, 1]: positive when the top leans to the right.

    -mu11 / mu02 with central moments, y pointing down: shearing an image by x' = x - s y adds s. 0 without ink.
    """
    ink = _above_floor(ink)
    mass = np.maximum(ink.sum((1, 2)), 1e-12)
    y, x = np.arange(ink.shape[1]), np.arange(ink.shape[2])
    dy = y[None] - (ink.sum(2) @ y / mass)[:, None]  # (N, H)
    dx = x[None] - (ink.sum(1) @ x / mass)[:, None]  # (N, W)
    mu11 = np.einsum("nhw,nh,nw->n", ink, dy, dx)
    mu02 = np.einsum("nhw,nh->n", ink, dy**2)
    return -mu11 / np.maximum(mu02, 1e-12)


def attributes(digits: Digits) -> tuple[np.ndarray, np.ndarray]:
    """Weight and slant, int64 (N,), measured at 32x32 by the thresholds of each digit; `UNCLEAR` near one of these."""
    ink = _measured_ink(digits)
    measured = (weight_values(ink), WEIGHT_THRESHOLDS), (slant_values(ink), SLANT_THRESHOLDS)
    classes = (_classify(values, thresholds[digits.labels]) for values, thresholds in measured)
    weight, slant = (np.where(clear, index, UNCLEAR) for index, clear in classes)
    return weight, slant


def _measured_ink(digits: Digits) -> np.ndarray:
    """(N, 32, 32) in [0, 1]. Through float32 and [-1, 1], as when the thresholds were found."""
    ink = np.clip(enlarge(digits.ink), 0, 1).astype(np.float32)
    return np.clip((ink * 2 - 1).astype(np.float64) / 2 + 0.5, 0, 1)


def _above_floor(ink: np.ndarray) -> np.ndarray:
    return np.maximum(np.asarray(ink, np.float64) - INK_FLOOR, 0) / (1 - INK_FLOOR)


def _classify(value: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index 0..2 of value (N,) between thresholds (N, 2), and whether it lies outside both dead bands."""
    index = (value[:, None] >= thresholds).sum(1)
    margin = CLEAR_MARGIN * (thresholds[:, 1] - thresholds[:, 0])
    clear = (np.abs(value[:, None] - thresholds) >= margin[:, None]).all(1)
    return index, clear
