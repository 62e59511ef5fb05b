"""The CLIP score of a random model against its own towers, called by hand."""

import shutil

import numpy as np
import pytest
from PIL import Image

from d2g_jax.evaluate import clip_score
from d2g_jax.runtime.errors import UserError

TEXTS = ["a photo depicts the cat", "the dog the cat the dog the cat the dog the cat the dog the cat the dog"]


def test_cosines_of_prepared_images_and_cut_off_texts(tiny_clip):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    images = np.random.default_rng(0).integers(0, 256, (2, 80, 80, 3), dtype=np.uint8)
    found = clip_score.load("clip_b32", tiny_clip).cosines(images, TEXTS)
    model = transformers.CLIPModel.from_pretrained(tiny_clip).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tiny_clip)
    mean, std = np.array([0.48, 0.46, 0.41]), np.array([0.27, 0.26, 0.28])
    small = [np.asarray(Image.fromarray(x).resize((64, 64), Image.Resampling.BICUBIC)) for x in images]
    pixels = torch.tensor(((np.stack(small) / 255 - mean) / std).transpose(0, 3, 1, 2), dtype=torch.float32)
    expected = []
    for i, text in enumerate(TEXTS):
        ids = tokenizer(text)["input_ids"]
        ids = [*ids[:15], ids[-1]] if len(ids) > 16 else ids  # CLIP's truncation keeps the end token
        with torch.no_grad():
            output = model(input_ids=torch.tensor([ids]), pixel_values=pixels[i : i + 1])
        expected.append(float((output.image_embeds * output.text_embeds).sum()))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert abs(found[0] - found[1]) > 1e-3


def test_another_model_and_none(tiny_clip, tmp_path):
    with pytest.raises(UserError, match=r"--weights-clip-g14.*patches of 32 pixels"):
        clip_score.load("clip_g14", tiny_clip)
    with pytest.raises(UserError, match="hf download openai/clip-vit-base-patch32"):
        clip_score.load("clip_b32", tmp_path)
    without = shutil.copytree(tiny_clip, tmp_path / "pickled")
    (without / "model.safetensors").rename(without / "pytorch_model.bin")
    with pytest.raises(UserError, match="no safetensors"):
        clip_score.load("clip_b32", without)
    damaged = shutil.copytree(tiny_clip, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="damaged"):
        clip_score.load("clip_b32", damaged)
