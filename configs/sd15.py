"""Stable Diffusion 1.5 at 512 px, by the paper's recipe as far as it is known: SD-CFG-3, batch 1024.

    d2g metric convert sd15_latest_vgg16_tuned.pth --space=sd15 --out=metric/sd15
    d2g pairs --config=configs/sd15.py --workdir=runs/sd15                        3 M pairs, 0.10 TB
    d2g plan  --config=configs/sd15.py --topology=gpu:8xH100                      what fits, before the first step
    d2g train --config=configs/sd15.py --workdir=runs/sd15                        on a pod: launch/

Planned, not measured: 27 images/s on an H100 (40% of its peak), so that 20 M images take 26 hours of 8 H100.
Published for the paper's own run on 64 A100 (of unknown length): FID-30k 9.29 on COCO 2014, with E-LatentLPIPS alone
14.72.

For visual quality rather than FID the paper took guidance 8 and 12 M pairs:
--config.pairs.guidance_scale=8 --config.pairs.count=12000000. One device: --config.mesh.fsdp=1.

The adversary is the paper's: of what docs/ablations.md compares on the embedded world nothing is nearer. Without R1's
program, a fifth slower: --config.adversarial.penalty=approximate_r1.

Pruned relatives load by their own folder and train with less memory (D is then pruned too), the metric stays:
--config.pipeline=nota-ai/bk-sdm-base (or -small, -tiny), --config.pipeline=segmind/small-sd.

Every field and its meaning: d2g_jax/config/base_config.py.
"""

from ml_collections import ConfigDict

from d2g_jax.config.base_config import base_config


def get_config() -> ConfigDict:
    """Eight devices or a multiple; `train.groups` = 64 is the paper's number of devices, each with one R1 sample."""
    c = base_config()
    c.name = "sd15"
    c.pipeline = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    c.mesh.fsdp = 8
    c.pairs.prompts = "prompts/sd15.txt"  # the paper's are probably the captions of LAION-Aesthetics 6.25+
    c.loss.metric = c.overfit.metric = "metric/sd15"
    c.train.update(remat="full", micro_batch=16, r1_micro_batch=2)
    c.loss.lpips = c.overfit.lpips = "metric/lpips"
    return c.lock()
