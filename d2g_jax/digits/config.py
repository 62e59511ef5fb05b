"""The digits configuration: every field of every job, with the values of the demo.

d2g demo                                              pairs, three students, figures, report
d2g pairs --workdir=runs/digits                       the pairs alone
d2g train --workdir=runs/digits                       one student alone, on those pairs
"""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict, config_dict

WEIGHTS = Path(__file__).parent / "weights"
"""Package data, made by `d2g teacher`: pipeline/, metric/, lpips/, classifier.safetensors, prompts.txt."""


def get_config() -> ConfigDict:
    """Two CPU cores, ten minutes: see README.md for the measured figures."""
    c = ConfigDict()
    c.name = "digits"
    c.seed = 0
    c.pipeline = str(WEIGHTS / "pipeline")  # a folder in diffusers' layout: the teacher
    c.mesh = ConfigDict({"data": -1, "fsdp": 1, "cpu_devices": 2})  # data = -1: the devices that fsdp leaves
    # XLA's, O0 to O3, or UNKNOWN for its default. Compiling takes a third of the demo; at O0 the steps compile some 15%
    # faster and run no slower.
    c.optimization_level = "O0"
    c.pairs = pairs()
    c.loss = loss()
    c.generator = ConfigDict({"timestep": config_dict.placeholder(int)})  # None: where the pairs' solver starts
    c.discriminator = discriminator()
    c.adversarial = adversarial()
    c.optimizer = optimizer()
    c.train = train()
    c.evaluation = ConfigDict({"samples": 2000, "batch_size": 256, "seed": 1})  # the pairs' batch: one program
    c.overfit = overfit()
    c.teacher = teacher()
    return c.lock()


def pairs() -> ConfigDict:
    """Prompts x noise -> the teacher's guided 50-step DDIM solutions."""
    return ConfigDict(
        {
            "prompts": str(WEIGHTS / "prompts.txt"),  # text, one a line; .jsonl, .parquet or a TFDS folder
            "prompts_column": "",  # of .jsonl and .parquet, the text feature of a TFDS folder
            "pairs_per_prompt": 1,
            "count": 1024,
            "records_per_shard": 512,
            "steps": 50,
            "solver": "ddim",  # ddim, euler, dpmpp_2m, heun
            "guidance_rescale": 0.0,  # phi of arXiv 2305.08891; not in the paper
            "guidance_scale": 2.0,  # measured: see docs/digits.md; the paper has 3 and 8 for SD 1.5
            "negative_prompt": "",
            "seed": 0,
            "batch_size": 256,
            "dtype": "float32",
            # What a record holds: docs/pairs.md has the bytes of each choice.
            "latent_dtype": "float16",  # or bfloat16; of stored text embeddings too
            "store_noise": False,  # False: drawn again from seed and record id, bit for bit
            "store_text": False,  # True: training reads the prompts' embeddings and runs no text tower
            # Workers that share a folder claim shards; a claim not renewed for so long is taken over. 0: no claims.
            "lease_seconds": 120.0,
        }
    )


def loss() -> ConfigDict:
    """The regression term."""
    return ConfigDict(
        {
            "name": "e_latent_lpips",  # mse, pseudo_huber, latent_lpips, e_latent_lpips
            "metric": str(WEIGHTS / "metric"),
            # Geometric transforms and cutout, the paper's main text; the release has b, g, c, o, co, bg, bgc, bgco.
            "preset": "bgo",
            # Not in the paper. A pilot without it let the latents' amplitude run away (not measured again since).
            "l1_weight": 1.0,
            "pseudo_huber_c": 0.00054,  # improved consistency training's constant
        }
    )


def discriminator() -> ConfigDict:
    """The paper's D; what it does not state is section 8 of no paper but common practice, one comment each."""
    return ConfigDict(
        {
            "timestep": 0,  # D sees clean latents, and 0 is where the teacher saw them too
            "head_channels": 32,  # 256 for SD
            "z_conditioning": True,
            "multiscale_inputs": True,
            "multiscale_heads": True,
        }
    )


def adversarial() -> ConfigDict:
    """The GAN term; weight 0 is a regression-only run without a discriminator."""
    return ConfigDict(
        {
            "weight": 0.1,  # lambda_GAN, not in the paper: aim for 0.1 to 0.5 of the regression's gradient norm
            "start_images": 1_536,  # regression alone before D starts
            "warmup_images": 512,  # D alone learns for so long before G listens to it
            "r1_gamma": 0.2,  # not in the paper; the term should be 1 to 10% of D's loss
            "r1_interval": 16,  # the paper's
            "mix_and_match": 0.25,  # share of the fake half that is replaced; not in the paper
        }
    )


def optimizer() -> ConfigDict:
    """Adam's settings are not in the paper. New layers are those that the teacher does not have."""
    return ConfigDict(
        {
            "generator": {
                "learning_rate": 3e-4,  # the MSE student's best of 3e-3, 1e-3, 3e-4: see docs/digits.md
                "betas": (0.9, 0.99),
                "weight_decay": 0.0,
                "warmup_images": 1024,
                "gradient_clip": 10.0,
            },
            "discriminator": {
                "learning_rate": 3e-4,
                "new_learning_rate": 1e-3,
                "betas": (0.0, 0.99),
                "weight_decay": 0.0,
                "warmup_images": 1024,
                "gradient_clip": 10.0,
            },
        }
    )


def train() -> ConfigDict:
    """Length, batch, and how often things are written; all counted in images."""
    return ConfigDict(
        {
            "images": 4_096,
            "batch_size": 64,
            "groups": 2,  # logical groups of the batch; R1 takes one sample of each. A multiple of the devices
            "dtype": "float32",
            "remat": False,
            "compile_workers": 1,  # programs compiled at once: 3 save 30 s of the demo and take 2.7 GiB more
            "ema_half_life_images": 2_000.0,
            "log_every": 512,
            "sample_every": 2_048,
            "checkpoint_every": 2_048,
            "keep_checkpoints": 2,
            "skip_corrupt": False,  # True: a corrupt record is left out and counted; False: it stops the run
        }
    )


def overfit() -> ConfigDict:
    """Figure 5 of the paper (`d2g overfit`): latents optimised to match targets. The VAE is that of `pipeline`."""
    return ConfigDict(
        {
            "losses": ("mse", "lpips", "latent_lpips", "e_latent_lpips"),
            "metric": str(WEIGHTS / "metric"),
            "lpips": str(WEIGHTS / "lpips"),  # pixel LPIPS, the loss `lpips` and everyone's judge
            "preset": "bgo",  # of e_latent_lpips, as in `loss`
            "images": "",  # an image, or a folder of images; empty takes the digits' test set
            "targets": 8,  # images, from the first on; all are optimised at once, each by itself
            "steps": 1000,
            "every": 100,  # steps between measurements, and between saved states
            "learning_rate": 3e-2,  # of Adam, decaying to 0 by a cosine
            "seed": 0,  # of the noise that the latents start as, and of the augmentation
        }
    )


def teacher() -> ConfigDict:
    """Training of the embedded teacher (`d2g teacher`), stage by stage."""
    return ConfigDict(
        {
            "autoencoder": {
                "steps": 1500,
                "batch_size": 32,
                "learning_rate": 2e-3,
                "kl_weight": 1e-4,
                "seed": 0,
            },
            "denoiser": {
                "steps": 5000,
                "batch_size": 128,
                "learning_rate": 2e-3,
                "weight_decay": 0.01,
                "caption_dropout": 0.1,
                "caption_variants": 64,
                "ema": 0.999,
                "seed": 0,
            },
            "metric": perceptual_metric(steps=2000, batch_size=128, rounds=15),
            "pixel_metric": perceptual_metric(steps=1000, batch_size=64, rounds=7),
            "prompts": {"count": 4096, "seed": 2},  # training prompts; the demo evaluates on others
        }
    )


def perceptual_metric(steps: int, batch_size: int, rounds: int) -> ConfigDict:
    """Classification, then calibration: of the latent metric and of the pixel metric, each its own."""
    return ConfigDict(
        {
            "trunk": {
                "steps": steps,
                "batch_size": batch_size,
                "learning_rate": 2e-3,
                "weight_decay": 0.01,
                "rounds": rounds,  # warped copies of every image
                "seed": 0,
            },
            "heads": {
                "steps": 1000,
                "batch_size": 50,
                "learning_rate": 1e-3,
                "triplets": 8000,
                "seed": 0,
            },
        }
    )
