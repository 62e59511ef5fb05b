"""Small stand-ins for the metrics' published weights."""

from __future__ import annotations

import dataclasses
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
def tiny_clip(tmp_path_factory: pytest.TempPathFactory, tiny_vocabulary) -> Path:
    """A random CLIP of patch 32 in transformers' layout, with the tokenizer of the tiny pipelines."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    vocab, merges = tiny_vocabulary
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(vocab), "max_position_embeddings": 16, "eos_token_id": len(vocab) - 1}
    config = transformers.CLIPConfig(
        text_config={**small, **text, "bos_token_id": len(vocab) - 2},
        vision_config={**small, "image_size": 64, "patch_size": 32},
        projection_dim=8,
    )
    folder = tmp_path_factory.mktemp("tiny_clip")
    transformers.CLIPModel(config).save_pretrained(folder)
    merges = [tuple(merge.split()) for merge in merges]
    transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16).save_pretrained(folder)
    processor = {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 64},
        "crop_size": {"height": 64, "width": 64}, "resample": 3, "do_resize": True, "do_center_crop": True,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True,
        "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
