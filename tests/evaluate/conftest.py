"""Small stand-ins for the metrics' published weights."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eighty real scenes, 00000.png ..."""
    from d2g_jax.digits import scenes

    folder = tmp_path_factory.mktemp("real")
    for i, image in enumerate(scenes.render(80, 8, test=True).images):
        Image.fromarray(image).save(folder / f"{i:05d}.png")
    return folder


@pytest.fixture(scope="session")
def tiny_lpips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow pixel LPIPS at random."""
    import jax

    from d2g_jax.losses.lpips import save_lpips
    from d2g_jax.models import vgg

    widths = (4, 4, 8, 8, 8)
    config = dataclasses.replace(vgg.PIXELS, widths=widths)
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("tiny_lpips") / "metric"
    save_lpips(folder, vgg.build(config).init(jax.random.key(0)), [rng.uniform(size=w) for w in widths], config)
    return folder


@pytest.fixture(scope="session")
def make_clip(tmp_path_factory: pytest.TempPathFactory, tiny_vocabulary):
    """(patch, layers, side) -> a random narrow CLIP in transformers' layout, with the tiny pipelines' tokenizer."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    vocab, merges = tiny_vocabulary
    merges = [tuple(merge.split()) for merge in merges]

    @functools.cache
    def make(patch: int, layers: int, side: int = 64) -> Path:
        torch.manual_seed(0)
        small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        text = {"vocab_size": len(vocab), "max_position_embeddings": 16, "eos_token_id": len(vocab) - 1}
        config = transformers.CLIPConfig(
            text_config={**small, **text, "bos_token_id": len(vocab) - 2},
            vision_config={
                **small,
                "num_hidden_layers": layers,
                "image_size": side,
                "patch_size": patch,
                "projection_dim": 8,
            },
            projection_dim=8,
        )
        folder = tmp_path_factory.mktemp("tiny_clip")
        transformers.CLIPModel(config).save_pretrained(folder)
        transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16).save_pretrained(folder)
        processor = {
            "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side}, "resample": 3, "do_resize": True, "do_center_crop": True,
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True,
            "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28],
        }  # fmt: skip
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_clip(make_clip) -> Path:
    """Of ViT-B/32's shape."""
    return make_clip(32, 12)


@pytest.fixture(scope="session")
def tiny_dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random narrow DINOv2 of ViT-L/14's depth in transformers' layout."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "mlp_ratio": 2, "num_hidden_layers": 24, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("tiny_dino")
    transformers.Dinov2Model(transformers.Dinov2Config(**small, patch_size=14, image_size=518)).save_pretrained(folder)
    return folder
