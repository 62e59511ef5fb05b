"""A protocol's own features: clean-fid's Inception-v3, or the demo's judge."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from d2g_jax.evaluate.protocols import DIGITS, INSIDE, Protocol
from d2g_jax.results import metric_weights
from d2g_jax.runtime.errors import UserError

INCEPTION_FILE = "inception-2015-12-05.pt"
"""What clean-fid looks for in the folder that it is given."""


@dataclasses.dataclass(frozen=True)
class FrozenNetwork:
    """A frozen network.

    Attributes:
      name: with its library's version where that may change a number.
      sha256: of its weights.
      run: of uint8 images (B, S, S, 3): features float32 (B, D); with the prompts of B images, their scores float64
        (B,); with B other images, the distances float64 (B,).
    """

    name: str
    sha256: str
    run: Callable[..., np.ndarray]

    def describe(self) -> dict[str, str]:
        """For the result file."""
        return {"name": self.name, "sha256": self.sha256}


def make_extractor(protocol: Protocol, inception: Path | None) -> FrozenNetwork:
    """The protocol's. Raises `UserError` for missing weights, and without the libraries of the extra `eval`."""
    if protocol.features == DIGITS:
        return _digits()
    if inception is None:
        raise metric_weights.missing("FID, KID, precision and recall", "inception")
    return _inception(inception, inside=protocol.features == INSIDE)


def _digits() -> FrozenNetwork:
    from d2g_jax.digits import judge
    from d2g_jax.digits.config import JUDGE

    params = judge.load_judge(JUDGE)
    return FrozenNetwork(
        "d2g_jax judge of digits and textures, 64 features",
        metric_weights.sha256_of(JUDGE),
        lambda images: judge.judge(params, images)[0].astype(np.float32),
    )


def _inception(file: Path, *, inside: bool) -> FrozenNetwork:
    """clean-fid's mode "clean": channels to 299 pixels by PIL's bicubic in float, not rounded, then Inception-v3.

    `inside`: the images go in as they are, and the file's network enlarges them by itself.
    """
    if not file.is_file() or file.name != INCEPTION_FILE:
        wanted = f"give the file {INCEPTION_FILE} under that name, from {metric_weights.WHERE['inception']}"
        raise UserError(f"{metric_weights.flag('inception')}={file}: {wanted}")
    try:
        import torch
        from cleanfid.inception_torchscript import InceptionV3W
        from cleanfid.resize import build_resizer
    except ImportError as error:
        raise metric_weights.needs_extra("FID", error) from error
    device = best_device(torch)
    try:
        with warnings.catch_warnings():
            # TorchScript is what clean-fid's file is, whatever newer releases of PyTorch would rather have.
            warnings.filterwarnings("ignore", "`torch.jit.load`", DeprecationWarning)
            network = InceptionV3W(str(file.parent), download=False, resize_inside=inside).to(device).eval()
    except RuntimeError as error:
        raise UserError(f"{file}: not clean-fid's TorchScript file ({str(error).splitlines()[0]})") from error
    resize, pool = build_resizer("clean"), ThreadPoolExecutor()

    def extract(images: np.ndarray) -> np.ndarray:
        # (B, 299, 299, 3) float32, 0 to 255; or as they are
        large = images if inside else np.stack(list(pool.map(resize, images)))
        with torch.inference_mode():
            return network(torch.from_numpy(large).permute(0, 3, 1, 2).to(device)).cpu().numpy()

    name = f"clean-fid {importlib.metadata.version('clean-fid')}, Inception-v3{', resized inside' if inside else ''}"
    return FrozenNetwork(name, metric_weights.sha256_of(file), extract)


def best_device(torch: Any) -> Any:
    """CUDA where torch has it."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
