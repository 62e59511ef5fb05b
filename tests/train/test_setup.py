"""What training refuses before its first step: pairs of another teacher, and teachers that are none."""

from types import SimpleNamespace

import pytest

from d2g_jax.diffusion import noise
from d2g_jax.digits.config import get_config
from d2g_jax.pipeline.hub import folder_hash
from d2g_jax.runtime.errors import UserError
from d2g_jax.train.setup import check_mismatches, check_pairs

SCHEDULER = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}


@pytest.fixture
def teacher(tmp_path):
    folder = tmp_path / "teacher"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    unet = SimpleNamespace(config=SimpleNamespace(time_cond_proj_dim=None))
    return SimpleNamespace(
        folder=folder, index={"_class_name": "StableDiffusionPipeline"}, unet=unet, scheduler=SCHEDULER,
        latent_shape=(8, 8, 4), token_length=16, scaling_factor=0.2,
    )  # fmt: skip


@pytest.fixture
def manifest(teacher):
    return SimpleNamespace(
        teacher="teacher", teacher_hash=folder_hash(teacher.folder), scheduler=SCHEDULER, latent_shape=(4, 8, 8),
        token_length=16, scaling_factor=0.2, noise_implementation=noise.IMPLEMENTATION,
    )  # fmt: skip


def test_pairs_of_this_teacher_wherever_it_lies(teacher, manifest, tmp_path):
    check_pairs(tmp_path, manifest, teacher)
    (teacher.folder / "notes.txt").write_text("mine")
    teacher.folder = teacher.folder.rename(tmp_path / "moved")
    check_pairs(tmp_path, manifest, teacher)


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "model_index.json", "unet/config.json"])
def test_pairs_of_another_teacher_of_the_same_shapes(name, teacher, manifest, tmp_path):
    (teacher.folder / name).write_bytes(b"other")
    with pytest.raises(
        UserError, match=r"pairs do not fit the teacher: teacher_hash is .*; make pairs with this teacher"
    ):
        check_pairs(tmp_path, manifest, teacher)


def test_a_latent_consistency_model_is_no_teacher(teacher, manifest, tmp_path):
    teacher.unet.config.time_cond_proj_dim = 256
    with pytest.raises(UserError, match="latent consistency"):
        check_pairs(tmp_path, manifest, teacher)


def test_groups_of_one_sample_have_no_neighbour_to_swap_with():
    config = get_config()
    check_mismatches(config)
    config.train.groups = config.train.batch_size
    with pytest.raises(UserError, match=r"^train.groups=64 is train.batch_size, and adversarial.mix_and_match needs"):
        check_mismatches(config)
    config.adversarial.mix_and_match = 0.0
    check_mismatches(config)
