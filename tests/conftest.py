"""Fixtures that several test files share. torch is imported inside them: torch-free tests run without it."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

# Compilation, not computation, takes the tests' time: LLVM's optimiser doubles it, and a resumed or repeated run
# compiles what an earlier test compiled, maybe in the other worker. All of these are read when jax starts. The older
# emitters of loops, which jaxlib 0.12 no longer has, are a quarter faster still, and a program in one piece is so on
# two cores that are busy anyway.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib") < "0.12" else ""),
)
os.environ.setdefault("JAX_OPTIMIZATION_LEVEL", "O0")
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache = tempfile.mkdtemp(prefix="d2g_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**40)  # a size is what makes jax lock the cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["D2G_JAX_TINY"] = _tiny = tempfile.mkdtemp(prefix="d2g_jax_tiny_")
    for _folder in (_cache, _tiny):
        atexit.register(shutil.rmtree, _folder, ignore_errors=True)

import jax
import pytest
from jax._src import lru_cache

from d2g_jax.digits import scenes
from d2g_jax.runtime import mesh

mesh.use_cpu_devices(2)  # as the demo has
# With a size jax looks at all entries before it writes another: of thousands of small ones, longer than they compile.
lru_cache.LRUCache._evict_if_needed = lambda cache, additional_size=0: None


HEAVY = ("test_jobs.py", "test_step.py", "test_interrupt.py", "test_demo.py")
"""Files that take minutes: first, so that no worker is left alone with one; the demo after the jobs, whose programs are
its own."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: HEAVY.index(item.path.name) if item.path.name in HEAVY else len(HEAVY))


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """A file's compiled programs go with it: together they would take ten gigabytes.

    What is left is frozen: mostly modules and their classes, which every later collection would walk through.
    """
    yield
    jax.clear_caches()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def few_real_scenes():
    """A tenth of them: they are drawn and judged with every evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "REAL", scenes.REAL // 10)
        yield


@pytest.fixture
def libtpu(monkeypatch: pytest.MonkeyPatch):
    """The TPU compiler, where it is installed; it dies of flags in XLA_FLAGS that it does not know."""
    pytest.importorskip("libtpu")
    jax.devices()  # reads the flags
    monkeypatch.delenv("XLA_FLAGS", raising=False)


LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
MERGES = ["c a", "ca t</w>", "d o", "do g</w>", "t h", "th e</w>"]


def tiny_vocab() -> dict[str, int]:
    """A CLIP vocabulary: letters, letters at the end of a word, the merges' results, the two special tokens."""
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *(merge.replace(" ", "") for merge in MERGES)]
    return {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}


@pytest.fixture(scope="session")
def tiny_vocabulary() -> tuple[dict[str, int], list[str]]:
    """`vocab` and `merges` of a CLIP tokenizer that knows three words and spells the others."""
    return tiny_vocab(), MERGES


def _torch():
    """torch, diffusers and transformers, seeded; skips the test where they are not installed."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return torch, diffusers, pytest.importorskip("transformers")


def _tokenizer_and_text_config(**fields):
    _, _, transformers = _torch()
    vocab = tiny_vocab()
    tokenizer = transformers.CLIPTokenizer(
        vocab=vocab, merges=[tuple(merge.split()) for merge in MERGES], model_max_length=16
    )
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocab), intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, eos_token_id=len(vocab) - 1, bos_token_id=len(vocab) - 2, **fields,
    )  # fmt: skip
    return tokenizer, config


def _vae():
    _, diffusers, _ = _torch()
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip


def _scheduler():
    _, diffusers, _ = _torch()
    return diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random miniature Stable Diffusion folder, written by diffusers: (8, 8, 4) latents, 32x32 images."""
    _, diffusers, transformers = _torch()
    tokenizer, text_config = _tokenizer_and_text_config(hidden_size=16)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny_sd")
    diffusers.StableDiffusionPipeline(
        _vae(), transformers.CLIPTextModel(text_config), tokenizer, unet, _scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random miniature SDXL folder, written by diffusers: two text towers, (8, 8, 4) latents, 32x32 images."""
    _, diffusers, transformers = _torch()
    tokenizer, text_config = _tokenizer_and_text_config(hidden_size=16)
    tokenizer_2, text_config_2 = _tokenizer_and_text_config(hidden_size=8, projection_dim=12, hidden_act="gelu")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=24,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=12 + 6 * 4,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny_sdxl")
    diffusers.StableDiffusionXLPipeline(
        _vae(), transformers.CLIPTextModel(text_config), transformers.CLIPTextModelWithProjection(text_config_2),
        tokenizer, tokenizer_2, unet, _scheduler(), add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder
