"""`tiny` for teachers of images: three classes, 8x8 pixels, random weights. No torch is needed."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import numpy as np
import tiny
from ml_collections import ConfigDict

from d2g_jax.models import denoisers
from d2g_jax.models.image_unet_config import ImageUNetConfig
from d2g_jax.pipeline.folder import save_pipeline
from d2g_jax.teacher.convert import SCHEDULER

CONFIG = f"--config={__file__}"
EDM = SCHEDULER
DDIM = {
    "_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001,
    "beta_end": 0.02, "prediction_type": "epsilon", "clip_sample": True,
}  # fmt: skip
BLOCKS = dict(
    sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
CLASSES = ImageUNetConfig(**BLOCKS, num_class_embeds=3)
NOTHING = ImageUNetConfig(**BLOCKS, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1)
SONG = ImageUNetConfig(
    sample_size=8, block_out_channels=(8, 16), stem_channels=4, layers_per_block=1, norm_num_groups=4, freq_shift=1,
    down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"), flip_sin_to_cos=False, num_class_embeds=3,
    up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), attention_head_dim=None, song=True, norm_eps=1e-6,
    downsample_type="resnet", upsample_type="resnet", fourier=(1.0, 2.0), residual_input=True, augment_dim=9,
    resample_filter=(1, 3, 3, 1),
)  # fmt: skip


def make(folder: Path, config: ImageUNetConfig = CLASSES, scheduler: dict = DDIM) -> Path:
    """A pipeline folder."""
    params = {"unet": denoisers.build(config).init(jax.random.key(0))}
    save_pipeline(folder, {"unet": config, "scheduler": scheduler}, params, {}, np.float32)
    return folder


def one_step_by_diffusers(folder: Path, noise: np.ndarray, classes: list[int]) -> np.ndarray:
    """What diffusers draws in one step with an exported student of classes: (N, 3, h, w)."""
    import diffusers
    import torch

    unet = diffusers.UNet2DModel.from_pretrained(folder / "unet")
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(1)
    (t,) = scheduler.timesteps
    x = torch.from_numpy(noise)
    with torch.no_grad():
        return scheduler.step(unet(x, t, class_labels=torch.tensor(classes)).sample, t, x).prev_sample.numpy()


def get_config() -> ConfigDict:
    """`tiny`'s, of the teacher of images in D2G_JAX_TINY_IMAGES, by E-LPIPS and with an adversary."""
    c = tiny.get_config().unlock()
    c.pipeline = os.environ["D2G_JAX_TINY_IMAGES"]
    c.pairs.update(prompts="", steps=3, guidance_scale=1.0, latent_dtype="float32")
    c.loss.update(name="e_lpips", size=16)
    return c.lock()
