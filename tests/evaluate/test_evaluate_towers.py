"""Scores and features of random models of transformers against their own towers, called by hand."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

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
    found = towers.load("clip_b32", tiny_clip).run(images, TEXTS)
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
    pick, hps = (towers.load(name, folder).run(images, TEXTS) for name in ("pickscore", "hpsv2"))
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
    np.testing.assert_allclose(towers.load("aesthetic", folder).run(images, []), expected, rtol=1e-4)
    torch.save({"layers.0.weight": torch.zeros(3, 8)}, folder / "head.pth")
    with pytest.raises(UserError, match=r"head\.pth: no head of linear layers from 8 numbers to 1"):
        towers.load("aesthetic", folder)
    for key, value in (("0.bias", torch.zeros(5)), ("4.weight", torch.zeros(2, 4)), ("2.weight", torch.zeros(4))):
        torch.save({f"layers.{k}": v for k, v in {**layers.state_dict(), key: value}.items()}, folder / "head.pth")
        with pytest.raises(UserError, match=r"head\.pth: no head of linear layers from 8 numbers to 1"):
            towers.load("aesthetic", folder)
    torch.save({"layers.0.weight": torch.full((1, 8), np.nan), "layers.0.bias": torch.zeros(1)}, folder / "head.pth")
    with pytest.raises(UserError, match="NaN or infinity for a black image"):
        towers.load("aesthetic", folder)
    (folder / "head.pth").unlink()
    with pytest.raises(UserError, match=r"--weights-aesthetic=.*0 files \.pth, not one head"):
        towers.load("aesthetic", folder)


def test_dinov2_s_features_are_its_class_token_s(tiny_dino, images):
    """With positions as the authors' code takes them at 224 pixels: every 37 / 16.1 of the 37."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    found = towers.load("dinov2", tiny_dino).run(images)
    model = transformers.Dinov2Model.from_pretrained(tiny_dino).eval()
    table, weights = model.embeddings.position_embeddings.detach().numpy(), np.zeros((16, 37))
    for i in range(16):
        at = (i + 0.5) * 37 / 16.1 - 0.5
        for j in range(math.floor(at) - 1, math.floor(at) + 3):  # the cubic of a = -0.75, its ends held
            x, a = abs(at - j), -0.75
            cubic = (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[i, np.clip(j, 0, 36)] += cubic
    grid = np.einsum("ip,jq,pqd->ijd", weights, weights, table[0, 1:].reshape(37, 37, -1)).reshape(256, -1)
    table = np.concatenate([table[0, :1], grid])[None].astype(np.float32)
    model.embeddings.position_embeddings = torch.nn.Parameter(torch.from_numpy(table))
    with torch.no_grad():
        pixels = prepared(images, 224, np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225]))
        expected = model(pixel_values=pixels).last_hidden_state[:, 0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_clip_s_features_are_at_unit_length(make_clip, images):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = make_clip(14, 24, 336)
    found = towers.load("clip_l14_336", folder).run(images)
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
    with pytest.raises(UserError, match=message):
        towers.load(name, make_clip(*shape))


def test_what_is_no_dinov2(tiny_dino, tmp_path):
    folder = shutil.copytree(tiny_dino, tmp_path / "vit")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    with pytest.raises(UserError, match=r"another model, type vit, not dinov2; hf download facebook/dinov2-large"):
        towers.load("dinov2", folder)


def test_no_model(tiny_clip, tmp_path):
    with pytest.raises(UserError, match="hf download openai/clip-vit-base-patch32"):
        towers.load("clip_b32", tmp_path)
    with pytest.raises(UserError, match="hf download openai/clip-vit-base-patch32"):
        towers.load("clip_b32", tiny_clip / "model.safetensors")


def test_a_model_in_pytorch_s_own_file(tiny_clip, images, tmp_path):
    """As OpenAI publishes some; a pickle that is more than tensors is not run."""
    torch, safetensors = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    folder = shutil.copytree(tiny_clip, tmp_path / "pickled")
    tensors = safetensors.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    found, expected = (towers.load("clip_b32", one).run(images, TEXTS) for one in (folder, tiny_clip))
    np.testing.assert_array_equal(found, expected)
    torch.save({**tensors, "more": Path}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickled: cannot be read as clip_b32 \(.*Path"):
        towers.load("clip_b32", folder)


def rewritten(change):
    def write(folder):
        file = folder / "model.safetensors"
        tensors = load_file(file)
        save_file(change(tensors) or tensors, file, {"format": "pt"})

    return write


def resized(folder):
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def truncated(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rewritten(lambda x: {k: v for k, v in x.items() if "text_" not in k}), "its weights have no fitting text_"),
        (rewritten(lambda x: {**x, "logit_scale": np.zeros(3, np.float32)}), "no fitting logit_scale"),
        (rewritten(lambda x: x["visual_projection.weight"].fill(np.nan)), "NaN or infinity for a black image"),
        (truncated, "cannot be read as clip_b32"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config.json"),
        (lambda folder: (folder / "preprocessor_config.json").write_text("{"), "preprocessor_config.json"),
        (lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], r"its tokenizer knows \d+ tokens of 80"),
        (resized, r"Input image size \(32\*32\)"),
    ],
)
def test_a_damaged_model_is_refused_before_it_measures(damage, message, tiny_clip, tmp_path):
    folder = shutil.copytree(tiny_clip, tmp_path / "damaged")
    damage(folder)
    with pytest.raises(UserError, match=message) as told:
        towers.load("clip_b32", folder)
    assert "hf download openai/clip-vit-base-patch32" in str(told.value)
    assert "\n" not in str(told.value)


def test_damaged_features_are_refused_before_they_measure(tiny_dino, make_clip, tmp_path):
    dino = shutil.copytree(tiny_dino, tmp_path / "dino")
    rewritten(lambda x: {k: v for k, v in x.items() if "layer.3." not in k})(dino)
    with pytest.raises(UserError, match=r"cannot be read as dinov2 \(its weights have no fitting encoder\.layer\.3\."):
        towers.load("dinov2", dino)
    clip = shutil.copytree(make_clip(14, 24, 336), tmp_path / "clip")
    rewritten(lambda x: x["visual_projection.weight"].fill(0))(clip)  # of no length
    with pytest.raises(UserError, match=r"NaN or infinity for a black image\); hf download"):
        towers.load("clip_l14_336", clip)
