"""CLIP text towers against transformers' PyTorch classes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2g_jax.models import clip
from d2g_jax.pipeline import weights
from d2g_jax.runtime.errors import UserError

SOURCE = "text_encoder/config.json"
FULL = {
    "L": dict(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768,
    ),
    "H": dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu",
        projection_dim=512,
    ),
    "bigG": dict(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu",
        projection_dim=1280,
    ),
}  # fmt: skip


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def tiny(architecture: str, **fields):
    """A random PyTorch tower and our network with its parameters."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    defaults = dict(
        vocab_size=40, hidden_size=24, intermediate_size=36, num_hidden_layers=3, num_attention_heads=3,
        max_position_embeddings=9, projection_dim=10, bos_token_id=38, eos_token_id=39,
    )  # fmt: skip
    config = transformers.CLIPTextConfig(**defaults | fields)
    model = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: at their initial 0 and 1 they would hide errors
            parameter.add_(0.2 * torch.randn_like(parameter))
    values = {**config.to_dict(), "architectures": [architecture]}
    network = clip.build(clip.ClipTextConfig.from_json(values, source=SOURCE))
    state = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    return model, network, weights.to_params(state, network.abstract(), source=SOURCE)


def token_ids(end: int) -> np.ndarray:
    """Prompts of several lengths, padded by repeating the end token or by other ids."""
    ids = np.random.default_rng(0).integers(3, 38, (3, 9))
    ids[0, 4:] = end
    ids[1, 7:] = end
    ids[2, 3], ids[2, 4:] = end, 1
    return ids.astype(np.int32)


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("CLIPTextModel", {}),
        ("CLIPTextModel", dict(hidden_act="gelu", eos_token_id=2)),
        ("CLIPTextModelWithProjection", dict(hidden_act="gelu")),
        ("CLIPTextModelWithProjection", dict(eos_token_id=2)),
    ],
)
def test_tower_equals_transformers(architecture, fields):
    torch = pytest.importorskip("torch")
    model, network, params = tiny(architecture, **fields)
    ids = token_ids(39)
    ours = jax.jit(network.apply)(params, ids)
    with torch.no_grad():
        theirs = model(torch.tensor(ids.astype(np.int64)), output_hidden_states=True)
    assert relative(ours.last_hidden_state, theirs.last_hidden_state) <= 1e-5
    assert relative(ours.penultimate_hidden_state, theirs.hidden_states[-2]) <= 1e-5
    end = [4, 7, 3]
    np.testing.assert_array_equal(ours.pooled, np.asarray(ours.last_hidden_state)[np.arange(3), end])
    if network.config.with_projection:
        assert relative(ours.text_embeds, theirs.text_embeds) <= 1e-5
    else:
        assert ours.text_embeds is None
        assert relative(ours.pooled, theirs.pooler_output) <= 1e-5


def test_gradients_equal_torch():
    torch = pytest.importorskip("torch")
    model, network, params = tiny("CLIPTextModelWithProjection")
    ids = token_ids(39)
    weight = np.random.default_rng(1).normal(size=(3, 9, 24)).astype(np.float32)

    def loss(params):
        out = network.apply(params, ids)
        return jnp.sum(out.last_hidden_state * weight) + jnp.sum(out.text_embeds**2)

    ours = weights.to_state_dict(jax.jit(jax.grad(loss))(params))
    out = model(torch.tensor(ids.astype(np.int64)))
    ((out.last_hidden_state * torch.tensor(weight)).sum() + (out.text_embeds**2).sum()).backward()
    theirs = {key: value.grad.numpy() for key, value in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    whole = max(np.abs(value).max() for value in theirs.values())
    for key, value in theirs.items():
        # adding the same number to all keys changes no softmax: the gradient of that bias is rounding error only
        scale = whole if key.endswith("k_proj.bias") else np.abs(value).max()
        assert np.abs(ours[key] - value).max() <= 1e-4 * scale, key


def test_twelve_layers_keep_their_order():
    """Sorted as strings, layer 10 would come before layer 2."""
    torch = pytest.importorskip("torch")
    model, network, params = tiny("CLIPTextModel", num_hidden_layers=12)
    ids = token_ids(39)
    with torch.no_grad():
        theirs = model(torch.tensor(ids.astype(np.int64))).last_hidden_state
    assert relative(jax.jit(network.apply)(params, ids).last_hidden_state, theirs) <= 1e-5


def test_causal():
    network = clip.build(clip.ClipTextConfig(vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
                                             num_attention_heads=2, max_position_embeddings=9))  # fmt: skip
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), network.abstract())
    ids = token_ids(39)
    changed = ids.copy()
    changed[:, 5:] = 7
    apply = jax.jit(network.apply)
    before, after = apply(params, ids).last_hidden_state, apply(params, changed).last_hidden_state
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert np.abs(np.asarray(before - after))[:, 5:].max() > 1e-3


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("architecture", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_full_size_names_and_shapes(name, architecture):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = getattr(transformers, architecture)(transformers.CLIPTextConfig(**FULL[name]))
    theirs = {key: tuple(value.shape) for key, value in model.named_parameters()}
    theirs = {key if key.startswith("text_") else f"text_model.{key}": shape for key, shape in theirs.items()}
    config = clip.ClipTextConfig(architecture=architecture, **FULL[name])
    assert weights.torch_shapes(clip.build(config).abstract()) == theirs


def test_config_round_trip():
    config = clip.ClipTextConfig(architecture="CLIPTextModelWithProjection", hidden_act="gelu", eos_token_id=2)
    assert clip.ClipTextConfig.from_json(config.to_json(), source=SOURCE) == config


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"hidden_act": "relu"}, "hidden_act relu"),
        ({"architectures": ["BertModel"]}, "BertModel"),
        ({"eos_token_id": [1, 2]}, "eos_token_id"),
        ({"hidden_size": 10, "num_attention_heads": 3}, "hidden_size 10"),
        ({"use_attention_mask": True}, "use_attention_mask"),
    ],
)
def test_bad_config_is_one_line(values, word):
    with pytest.raises(UserError) as error:
        clip.ClipTextConfig.from_json(values, source=SOURCE)
    assert word in str(error.value)
    assert str(error.value).startswith(SOURCE)
    assert "\n" not in str(error.value)
