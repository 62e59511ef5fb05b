"""Scores and features of random models of transformers against their own towers, called by hand."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from d2g_jax.evaluate import towers
from d2g_jax.runtime.errors import UserError

TEXTS = ["a photo depicts the cat", "the dog the cat the dog the cat the dog the cat the dog the cat the dog"]
MEAN, STD = np.array([0.48, 0.46, 0.41]), np.array([0.27, 0.26, 0.28])


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (2, 80, 80, 3), dtype=np.uint8)


def prepared(images, side, mean=MEAN, std=STD):
    import torch

    small = [np.asarray(Image.fromarray(x).resize((side, side), Image.Resampling.BICUBIC)) for x in images]
    return torch.tensor(((np.stack(small) / 255 - mean) / std).transpose(0, 3, 1, 2), dtype=torch.float32)


def test_cosines_of_prepared_images_and_cut_off_texts(tiny_clip, images):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    found = towers.load_score("clip_b32", tiny_clip).values(images, TEXTS)
    model = transformers.CLIPModel.from_pretrained(tiny_clip).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tiny_clip)
    pixels, expected = prepared(images, 64), []
    for i, text in enumerate(TEXTS):
        ids = tokenizer(text)["input_ids"]
        ids = [*ids[:15], ids[-1]] if len(ids) > 16 else ids  # CLIP's truncation keeps the end token
        with torch.no_grad():
            output = model(input_ids=torch.tensor([ids]), pixel_values=pixels[i : i + 1])
        expected.append(float((output.image_embeds * output.text_embeds).sum()))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert abs(found[0] - found[1]) > 1e-3


def test_preferences_are_cosines_too(make_clip, images):
    """PickScore with the model's own scale, as its authors' code has it; HPSv2 in hundreds, as its tables have it."""
    transformers = pytest.importorskip("transformers")
    folder = make_clip(14, 32)
    pick, hps = (towers.load_score(name, folder).values(images, TEXTS) for name in ("pickscore", "hpsv2"))
    scale = float(transformers.CLIPModel.from_pretrained(folder).logit_scale.detach().exp())
    np.testing.assert_allclose(pick / scale, hps / 100, rtol=1e-5)
    assert not towers.TOWERS["pickscore"].prefixed


def test_the_aesthetic_head(make_clip, images, tmp_path):
    """LAION's: linear layers, among dropouts that do nothing here, on the image at unit length."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = shutil.copytree(make_clip(14, 24, 224), tmp_path / "clip")
    drop = torch.nn.Dropout
    layers = torch.nn.Sequential(
        torch.nn.Linear(8, 6), drop(0.2), torch.nn.Linear(6, 4), drop(0.1), torch.nn.Linear(4, 1)
    )
    torch.save({f"layers.{key}": value for key, value in layers.state_dict().items()}, folder / "head.pth")
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        x = model.get_image_features(pixel_values=prepared(images, 224))
        x = getattr(x, "pooler_output", x)
        expected = layers.eval()(x / x.norm(dim=-1, keepdim=True))[:, 0]
    np.testing.assert_allclose(towers.load_score("aesthetic", folder).values(images, []), expected, rtol=1e-4)
    torch.save({"layers.0.weight": torch.zeros(3, 8)}, folder / "head.pth")
    with pytest.raises(UserError, match=r"head\.pth: no head of linear layers from 8 numbers to 1"):
        towers.load_score("aesthetic", folder)
    (folder / "head.pth").unlink()
    with pytest.raises(UserError, match=r"--weights-aesthetic=.*0 files \.pth, not one head"):
        towers.load_score("aesthetic", folder)


def test_dinov2_s_features_are_its_class_token_s(tiny_dino, images):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    found = towers.load_space("dinov2", tiny_dino).extract(images)
    model = transformers.Dinov2Model.from_pretrained(tiny_dino).eval()
    with torch.no_grad():
        pixels = prepared(images, 224, np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225]))
        expected = model(pixel_values=pixels).last_hidden_state[:, 0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_clip_s_features_are_at_unit_length(make_clip, images):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = make_clip(14, 24, 336)
    found = towers.load_space("clip_l14_336", folder).extract(images)
    model = transformers.CLIPVisionModelWithProjection.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(pixel_values=prepared(images, 336)).image_embeds
    np.testing.assert_allclose(found, expected / expected.norm(dim=-1, keepdim=True), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("clip_g14", (32, 12), r"--weights-clip-g14=.*patch 32, not 14"),
        ("hpsv2", (14, 24, 224), "layers 24, not 32"),
        ("aesthetic", (14, 24, 336), "side 336, not 224"),
        ("clip_l14_336", (14, 24, 224), "side 224, not 336"),
    ],
)
def test_a_clip_of_another_kind(name, shape, message, make_clip):
    load = towers.load_space if name in towers.SPACES else towers.load_score
    with pytest.raises(UserError, match=message):
        load(name, make_clip(*shape))


def test_what_is_no_dinov2(tiny_dino, tmp_path):
    folder = shutil.copytree(tiny_dino, tmp_path / "vit")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    with pytest.raises(UserError, match=r"a vit, no DINOv2; hf download facebook/dinov2-large"):
        towers.load_space("dinov2", folder)


def test_no_model_and_a_damaged_one(tiny_clip, tmp_path):
    with pytest.raises(UserError, match="hf download openai/clip-vit-base-patch32"):
        towers.load_score("clip_b32", tmp_path)
    without = shutil.copytree(tiny_clip, tmp_path / "pickled")
    (without / "model.safetensors").rename(without / "pytorch_model.bin")
    with pytest.raises(UserError, match="no safetensors"):
        towers.load_score("clip_b32", without)
    damaged = shutil.copytree(tiny_clip, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="damaged"):
        towers.load_score("clip_b32", damaged)
