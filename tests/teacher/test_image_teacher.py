"""The whole way of a teacher of images: trained on small scenes told their digit, distilled by two losses, exported.

Prints its figures. Half an hour of a core, with compilers that optimise: XLA_FLAGS= JAX_OPTIMIZATION_LEVEL=O1.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_images
from PIL import Image

from d2g_jax import __main__ as cli
from d2g_jax import load
from d2g_jax.diffusion.schedule import Schedule, add_noise, training_target
from d2g_jax.digits import judge, scenes
from d2g_jax.digits.config import JUDGE, WEIGHTS
from d2g_jax.inputs.images import to_floats
from d2g_jax.lpips_training.fit import Recipe, fit
from d2g_jax.models import denoisers
from d2g_jax.models.image_unet_config import ImageUNetConfig
from d2g_jax.pipeline.folder import save_pipeline
from d2g_jax.results import frechet

SIDE, STEPS, BATCH = 16, 5000, 32
CONFIG = ImageUNetConfig(
    sample_size=SIDE, block_out_channels=(32, 64, 96), layers_per_block=1, norm_num_groups=8, attn_norm_num_groups=8,
    attention_head_dim=16, resnet_time_scale_shift="scale_shift", num_class_embeds=10,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
SCHEDULER = {
    "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True,
    "clip_sample": False,
}  # fmt: skip
DRAWN = 500


def small(images):
    """uint8 (N, 64, 64, 3) to (N, SIDE, SIDE, 3)."""
    return np.stack([np.asarray(Image.fromarray(x).resize((SIDE, SIDE), Image.Resampling.BOX)) for x in images])


def seen(images):
    """Images as the judge sees them."""
    return np.stack([np.asarray(Image.fromarray(x).resize((64, 64), Image.Resampling.BICUBIC)) for x in images])


def train_teacher(folder):
    shown = scenes.render(3000, 0, plain=True)
    images, digits = to_floats(small(shown.images)), shown.labels[:, 0]
    network, schedule = denoisers.build(CONFIG), Schedule.from_config(SCHEDULER)

    def loss(params, batch, key):
        noise_key, time_key = jax.random.split(key)
        x0 = batch["images"]
        drawn = jax.random.normal(noise_key, x0.shape)
        places = (jnp.arange(len(x0)) + jax.random.uniform(time_key, (len(x0),))) / len(x0)
        t = (places * schedule.num_train_timesteps).astype(jnp.int32)
        alpha_bar = jnp.asarray(schedule.alphas_cumprod)[t][:, None, None, None]
        output = network.apply(params, add_noise(x0, drawn, alpha_bar), t, batch["classes"])
        return jnp.mean(jnp.square(output - training_target("v_prediction", x0, drawn, alpha_bar)))

    def batch_at(step):
        rows = np.random.default_rng([1, step]).integers(len(images), size=BATCH)
        return {"images": images[rows], "classes": np.eye(10, dtype=np.float32)[digits[rows]]}

    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 100, STEPS)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.0))
    recipe = Recipe(optimizer, STEPS, BATCH, 0)
    params = fit(loss, network.init(jax.random.key(0)), batch_at, recipe, label="teacher", ema=0.998)
    save_pipeline(folder, {"unet": CONFIG, "scheduler": SCHEDULER}, {"unet": params}, {}, np.float32)


def figures(images, prompts, reference):
    """Digits that the judge reads as they were asked for, and the Frechet distance of its features."""
    features, labels = judge.judge(judge.load_judge(JUDGE), seen(images))
    right = float(np.mean(labels[:, 0] == np.asarray(prompts, int)))
    return {"digit": round(right, 3), "fd": round(frechet.frechet_distance(features, reference), 2)}


@pytest.mark.slow
def test_a_teacher_of_images_is_distilled(tmp_path, monkeypatch):
    train_teacher(tmp_path / "teacher")
    monkeypatch.setenv("D2G_JAX_TINY_IMAGES", str(tmp_path / "teacher"))
    prompts = [str(i % 10) for i in range(DRAWN)]
    teacher = load(tmp_path / "teacher")
    solution = {"steps": 25, "guidance_scale": 1.0, "batch": 250}
    targets, others = (teacher.draw(prompts, seed=seed, **solution) for seed in (100, 101))
    reference = judge.judge(judge.load_judge(JUDGE), seen(targets.images))[0]
    shown = scenes.render(DRAWN, 1, plain=True, test=True)
    real = figures(small(shown.images), shown.labels[:, 0], reference)
    found = {"real": real, "teacher again": figures(others.images, prompts, reference)}
    pairs = ["count=2048", "records_per_shard=1024", "batch_size=256", "steps=25"]
    made = [f"--workdir={tmp_path}", *(f"--config.pairs.{p}" for p in pairs)]
    assert cli.main(["pairs", tiny_images.CONFIG, *made]) == 0
    flags = [f"--config.pairs.{p}" for p in pairs] + [f"--config.loss.lpips={WEIGHTS / 'lpips'}"]
    # LPIPS at the size that it was trained at, as the paper enlarges CIFAR's images to 224.
    flags += ["--config.loss.size=64", "--config.adversarial.weight=0.0", "--config.train.images=12288"]
    flags += ["--config.optimizer.generator.learning_rate=0.001", "--config.optimizer.generator.warmup_images=1024"]
    flags += ["--config.train.sample_every=12288", "--config.train.checkpoint_every=12288"]
    students = {}
    for name in ("mse", "e_lpips"):
        work = tmp_path / name
        work.mkdir()
        (work / "pairs").symlink_to(tmp_path / "pairs")
        student = [f"--workdir={work}", *flags, f"--config.loss.name={name}"]
        assert cli.main(["train", tiny_images.CONFIG, *student]) == 0
        students[name] = load(work).draw(prompts, seed=100, batch=250)
        line = json.loads((work / "metrics.jsonl").read_text().splitlines()[-1])
        found[name] = figures(students[name].images, prompts, reference)
        found[name]["unexplained"] = round(line["unexplained"], 3)
    print(json.dumps(found, indent=1))
    assert found["real"]["digit"] > 0.9
    assert found["teacher again"]["digit"] > 0.8 * found["real"]["digit"]
    assert found["e_lpips"]["digit"] > 0.8 * found["teacher again"]["digit"]
    assert found["e_lpips"]["digit"] > found["mse"]["digit"]
    exported_as_diffusers_draws_it(tmp_path / "e_lpips", tmp_path / "diffusers")
    if found["e_lpips"]["fd"] >= found["mse"]["fd"]:
        pytest.xfail("a bar that is missed: squared error is nearer in Frechet distance, see docs/cifar10.md")


def exported_as_diffusers_draws_it(work, out):
    pytest.importorskip("diffusers")
    pytest.importorskip("torch")
    assert cli.main(["export", f"--model={work}", "--to=diffusers", f"--out={out}"]) == 0
    noise = np.random.default_rng(0).standard_normal((4, 3, SIDE, SIDE)).astype(np.float32)
    drawn = load(work).latents(["0", "3", "5", "9"], latents=noise)
    x = tiny_images.one_step_by_diffusers(out, noise, [0, 3, 5, 9])
    np.testing.assert_allclose(x, drawn, atol=1e-4 * np.abs(x).max())
