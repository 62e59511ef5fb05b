"""A random miniature VAE, two classes of pictures and two kinds of triplets, all of them files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from d2g_jax.models import vae
from d2g_jax.pipeline.weights import save_state_dict, to_state_dict

VAE = vae.VaeConfig(
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(4, 4),
    norm_num_groups=2,
    mid_block_add_attention=False,
    sample_size=16,
    scaling_factor=0.5,
)
CONFIG = Path(__file__).parents[2] / "configs" / "lpips.py"
COLOURS = {"blue": (40, 60, 200), "red": (200, 60, 40)}


def write_vae(folder: Path, params) -> Path:
    """A folder in diffusers' layout with a VAE and nothing else."""
    (folder / "vae").mkdir(parents=True)
    (folder / "vae" / "config.json").write_text(json.dumps(VAE.to_json()))
    save_state_dict(to_state_dict(params), folder / "vae" / "diffusion_pytorch_model.safetensors")
    return folder


def picture(rng: np.random.Generator, colour: tuple[int, int, int], size: int) -> Image.Image:
    pixels = np.asarray(colour) + rng.normal(0, 30, (size, size, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture
def shipped() -> ConfigDict:
    """`configs/lpips.py` as it is."""
    spec = importlib.util.spec_from_file_location("lpips_config", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.fixture(scope="session")
def vae_params():
    return vae.build(VAE).init(jax.random.key(0))


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory, vae_params) -> Path:
    """16x16 images, 8x8x4 latents."""
    return write_vae(tmp_path_factory.mktemp("pipeline"), vae_params)


@pytest.fixture
def class_folders(tmp_path) -> Path:
    """`images/{blue,red}/N.png`: nine 20x24 images of either."""
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(9):
            image = picture(rng, colour, 24).crop((0, 0, 20, 24))
            image.save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def triplet_folder(tmp_path) -> Path:
    """`2afc/{train,val}/{noise,tint}/...`: 8x8 patches, six triplets of a kind; the smaller change is the closer."""
    rng = np.random.default_rng(1)
    for part in ("train", "val"):
        for kind in ("noise", "tint"):
            folder = tmp_path / "2afc" / part / kind
            for name in ("ref", "p0", "p1", "judge"):
                (folder / name).mkdir(parents=True)
            for i in range(6):
                reference = rng.uniform(60, 190, (8, 8, 3))
                strengths = (5, 50) if i % 2 else (50, 5)
                change = rng.normal(0, 1, (2, 8, 8, 3)) if kind == "noise" else rng.normal(0, 1, (2, 1, 1, 3))
                sides = {"ref": reference, "p0": reference + strengths[0] * change[0]}
                sides["p1"] = reference + strengths[1] * change[1]
                for name, pixels in sides.items():
                    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i:06d}.png")
                np.save(folder / "judge" / f"{i:06d}.npy", np.array([0.0 if i % 2 else 1.0], np.float32))
    return tmp_path / "2afc"
