"""Every field of `d2g pairs`, `train` and `overfit` with its meaning, and the method's values for Stable Diffusion.

`configs/*.py` and `digits/config.py` start from here and change what is theirs. Where the paper is silent, the value is
a choice and says so; none of them has been trained with at the size of Stable Diffusion.
"""

from __future__ import annotations

from ml_collections import ConfigDict, config_dict


def base_config() -> ConfigDict:
    """A config that lacks only `name`, `pipeline`, `pairs.prompts` and `loss.metric`; not locked."""
    c = ConfigDict()
    c.name = ""
    c.seed = 0
    c.pipeline = ""  # a folder in diffusers' layout, a .safetensors file or a hub id: the teacher
    c.mesh = mesh()
    c.optimization_level = "UNKNOWN"  # XLA's (on CPUs LLVM's), O0 to O3, or UNKNOWN for its default
    c.pairs = pairs()
    c.loss = loss()
    c.lora = ConfigDict(  # low-rank updates of the frozen teacher in place of a generator trained whole: docs/lora.md
        {
            "rank": 0,  # 0: the whole generator is trained
            "alpha": config_dict.placeholder(float),  # the update is times alpha / rank; None: times one
            "targets": ("attention",),  # feed_forward, convolutions, all: kernels that are updated
        }
    )
    c.generator = ConfigDict({"timestep": config_dict.placeholder(int)})  # None: where the pairs' solver starts
    c.discriminator = discriminator()
    c.adversarial = adversarial()
    c.optimizer = optimizer()
    c.train = train()
    c.overfit = overfit()
    return c


def mesh() -> ConfigDict:
    """Devices: the batch is split over all of them, parameters and optimiser states over `fsdp` of them."""
    return ConfigDict(
        {
            "data": -1,  # copies of the parameters; -1: the devices that fsdp leaves
            "fsdp": 1,
            "cpu_devices": config_dict.placeholder(int),  # parts that the host's CPU is split into; None: JAX's own
        }
    )


def pairs() -> ConfigDict:
    """Prompts x noise -> the teacher's guided 50-step DDIM solutions."""
    return ConfigDict(
        {
            # .txt, .csv, .tsv, .json, .jsonl, .parquet, a folder of parquet files or of TFDS; a class a line for a
            # teacher of images, or empty: each of its classes in turn.
            "prompts": "",
            "prompts_column": "",  # or key; the text feature of a TFDS folder
            "skip_empty": False,  # True: rows without a prompt are left out; False: they are counted and refused
            "pairs_per_prompt": 1,
            "count": 3_000_000,  # the paper's smaller set
            "records_per_shard": 8192,
            "steps": 50,
            "solver": "ddim",  # ddim, euler, dpmpp_2m, heun
            "guidance_rescale": 0.0,  # phi of arXiv 2305.08891; not in the paper
            "guidance_scale": 3.0,
            "negative_prompt": "",
            "seed": 0,
            "batch_size": 256,  # all devices of a worker together
            "dtype": "bfloat16",
            # What a record holds: docs/pairs.md has the bytes of each choice.
            "latent_dtype": "float16",  # or bfloat16, float32; of stored text embeddings too
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
            "name": "e_latent_lpips",  # mse, pseudo_huber, lpips, e_lpips, latent_lpips, e_latent_lpips
            "metric": "",  # a folder made by `d2g metric convert` or `d2g lpips`
            "lpips": "",  # pixel LPIPS, for the losses `lpips` and `e_lpips`, which decode both latents
            "size": 0,  # pixels that smaller images are enlarged to for them; 224 for CIFAR-10
            "dtype": "float32",  # or bfloat16: the metric's convolutions; docs/metric.md says what that changes
            # Geometric transforms and cutout, the paper's main text; the release has b, g, c, o, co, bg, bgc, bgco.
            "preset": "bgo",
            "l1_weight": 0.0,  # beside a perceptual loss; not in the paper, the release's code has 1
            "pseudo_huber_c": 0.00054,  # improved consistency training's constant
        }
    )


def discriminator() -> ConfigDict:
    """The paper's D; where it is silent these are common practice, one comment each."""
    return ConfigDict(
        {
            # The teacher's UNet in D; heads and new inputs are trained in any case. docs/lora.md
            "backbone": "trained",  # or frozen
            "lora_rank": 0,  # not 0: trained as low-rank updates of `lora.targets`
            "timestep": 0,  # D sees clean latents, and 0 is where the teacher saw them too
            # True: real and fake latent of a record are noised alike, to a level drawn for it, which D gets as its time
            "diffuse": False,
            "head_channels": 256,
            "z_conditioning": True,
            "multiscale_inputs": True,
            "multiscale_heads": True,
        }
    )


def adversarial() -> ConfigDict:
    """The GAN term; weight 0 is a regression-only run without a discriminator.

    The paper's loss and penalty: of what docs/ablations.md compares on the embedded world nothing is nearer.
    """
    return ConfigDict(
        {
            "weight": 0.1,  # lambda_GAN, not in the paper: aim for 0.1 to 0.5 of the regression's gradient norm
            "start_images": 5_120_000,  # regression alone before D starts: the length of the paper's loss ablation
            "warmup_images": 1_024_000,  # D alone learns for so long before G listens to it; not in the paper
            "loss": "non_saturating",  # the paper's; or hinge, relativistic: real against fake of the same record
            # r1: the paper's, exact, lazy, on one sample of each group. r1_r2: on a generated one too. approximate_r1,
            # approximate_r1_r2: by differences over noise of size penalty_sigma, on every sample in every update of D.
            "penalty": "r1",
            "penalty_sigma": 0.05,  # not in the paper; latents have a deviation of about 1, bfloat16 steps of 0.008
            "r1_gamma": 0.2,  # of any penalty; not in the paper; the term should be 1 to 10% of D's loss
            "r1_interval": 16,  # the paper's
            "mix_and_match": 0.25,  # share of the fake half that is replaced; not in the paper
        }
    )


def optimizer() -> ConfigDict:
    """Adam's settings are not in the paper. New layers are those that the teacher does not have."""
    return ConfigDict(
        {
            "generator": {
                "learning_rate": 1e-5,  # DMD2's
                "betas": (0.0, 0.99),  # StyleGAN2's, once a discriminator takes part
                "regression_beta1": config_dict.placeholder(
                    float
                ),  # the first beta until G listens to D; None: as then
                "weight_decay": 0.01,
                "warmup_images": 512_000,
                "gradient_clip": 10.0,
                # Of Adam's first moments; bfloat16 saves two bytes a parameter. With a first beta of 0 the stored
                # moments are never read, and nothing is lost.
                "moment_dtype": "bfloat16",
            },
            "discriminator": {
                "learning_rate": 1e-5,
                "new_learning_rate": 1e-4,
                "betas": (0.0, 0.99),
                "weight_decay": 0.0,
                "warmup_images": 512_000,
                "gradient_clip": 10.0,
                "moment_dtype": "bfloat16",
            },
        }
    )


def train() -> ConfigDict:
    """Length, batch, and how often things are written; all counted in images."""
    return ConfigDict(
        {
            "images": 20_480_000,  # not in the paper
            "batch_size": 1024,  # the paper's
            "groups": 64,  # logical groups of the batch; R1 takes one sample of each. A multiple of the devices
            "dtype": "bfloat16",  # the networks' arithmetic but the metric's; parameters, losses and R1 are float32
            # What of its share a device takes at once, gradients summed: None for all. R1 is float32 and differentiated
            # twice, and has a number of its own.
            "micro_batch": config_dict.placeholder(int),
            "r1_micro_batch": config_dict.placeholder(int),
            # What the backward pass computes again: none, elementwise (norms and activations: no products), dots (all
            # but products with weights), full (all of a block).
            "remat": "none",
            # Parameters as one vector for each part of a network: for small ones, whose steps compile faster. Large
            # ones would be gathered part by part with mesh.fsdp, not kernel by kernel.
            "packed": False,
            "compile_workers": 1,  # programs compiled at once, at the price of their compilers' memory
            "ema_half_life_images": 500_000.0,  # about a decay of 0.999 at batch 1024; not in the paper
            "held_out": 256,  # records never trained on, at most a tenth: every line has R on them (docs/when.md)
            "log_every": 10_240,
            "sample_every": 512_000,
            "checkpoint_every": 512_000,
            "keep_checkpoints": 2,  # the newest
            "keep_best": "loss_regression",  # and the one after the lowest line of this metric; empty for none
            "skip_nonfinite": 0,  # updates that may be left out in a row for a NaN or infinity; 0 stops at the first
            # The same lines and grids elsewhere too (docs/report.md); neither package is needed without.
            "tensorboard": False,  # event files in WORKDIR/tensorboard; needs the extra `tensorboard`
            "wandb": "",  # a project of Weights & Biases, offline unless WANDB_MODE says otherwise; extra `wandb`
            "skip_corrupt": False,  # True: a corrupt record is left out and counted; False: it stops the run
        }
    )


def overfit() -> ConfigDict:
    """Figure 5 of the paper (`d2g overfit`): latents optimised to match targets. The VAE is that of `pipeline`."""
    return ConfigDict(
        {
            "losses": ("mse", "lpips", "latent_lpips", "e_latent_lpips"),
            "metric": "",
            "lpips": "",  # pixel LPIPS, the loss `lpips` and everyone's judge
            "preset": "bgo",  # of e_latent_lpips, as in `loss`
            "images": "",  # an image, or a folder of images; empty takes scenes of held-out digits
            "targets": 8,  # images, from the first on; all are optimised at once, each by itself
            "steps": 15_000,  # the released script's, as is the rate
            "every": 100,  # steps between measurements, and between saved states
            "learning_rate": 1e-2,  # of Adam, decaying to 0 by a cosine
            "seed": 0,  # of the noise that the latents start as, and of the augmentation
        }
    )
