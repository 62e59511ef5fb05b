"""safetensors in and out: names, layouts, bytes, and every way a file can be wrong."""

from __future__ import annotations

import dataclasses
import json
import struct
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from d2g_jax.models import clip, vae
from d2g_jax.pipeline import weights
from d2g_jax.runtime.errors import UserError


def leaf(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


ABSTRACT = {
    "conv": {"kernel": leaf(3, 3, 2, 5), "bias": leaf(5)},
    "layers": {str(i): {"kernel": leaf(2, 3)} for i in range(12)},  # as strings, 10 sorts before 2
    "norm": {"scale": leaf(4), "mean": leaf(4)},
    "token": {"embedding": leaf(7, 2)},
}


def torch_state() -> dict[str, np.ndarray]:
    """What PyTorch would hold for `ABSTRACT`."""
    rng = np.random.default_rng(0)
    shapes = {
        "conv.weight": (5, 2, 3, 3), "conv.bias": (5,), "norm.weight": (4,), "norm.running_mean": (4,),
        "token.weight": (7, 2), **{f"layers.{i}.weight": (3, 2) for i in range(12)},
    }  # fmt: skip
    return {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


def random_state(abstract) -> dict[str, np.ndarray]:
    """Random PyTorch tensors for a network, without compiling its initialisation."""
    rng = np.random.default_rng(0)
    shapes = weights.torch_shapes(abstract)
    return {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


def one_line(error: pytest.ExceptionInfo, *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_axes():
    state = torch_state()
    params = weights.to_params(state, ABSTRACT, source="here")
    assert params["conv"]["kernel"][1, 2, 0, 4] == state["conv.weight"][4, 0, 1, 2]
    np.testing.assert_array_equal(params["layers"]["10"]["kernel"], state["layers.10.weight"].T)
    np.testing.assert_array_equal(params["token"]["embedding"], state["token.weight"])
    np.testing.assert_array_equal(params["norm"]["mean"], state["norm.running_mean"])
    assert weights.torch_shapes(ABSTRACT) == {key: value.shape for key, value in state.items()}


def test_axes_are_those_of_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    conv = torch.nn.Conv2d(2, 5, 3)
    x = rng.normal(size=(1, 6, 7, 2)).astype(np.float32)
    state = torch_state() | {f"conv.{key}": value.detach().numpy() for key, value in conv.state_dict().items()}
    params = weights.to_params(state, ABSTRACT, source="here")["conv"]
    ours = jax.lax.conv_general_dilated(
        x, params["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    theirs = conv(torch.tensor(x.transpose(0, 3, 1, 2))).detach().numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours + params["bias"], theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_round_trip_is_exact(dtype, tmp_path: Path):
    state = {key: value.astype(dtype) for key, value in torch_state().items()}
    weights.save_state_dict(state, tmp_path / "model.safetensors")
    read = weights.load_state_dict(tmp_path)
    assert {value.dtype for value in read.values()} == {np.dtype(np.float32)}
    again = weights.to_state_dict(weights.to_params(read, ABSTRACT, source="here"))
    weights.save_state_dict(again, tmp_path / "again.safetensors", dtype)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.safetensors", "model.safetensors"]


def test_bytes_of_a_torch_file(tiny_sd: Path, tmp_path: Path):
    """diffusers' own file comes back to the last byte of its tensors; the header differs in order only."""
    state = weights.load_state_dict(tiny_sd / "vae", dtype=None)
    config = vae.VaeConfig.from_json(json.loads((tiny_sd / "vae" / "config.json").read_text()), source="vae")
    params = weights.load_params(tiny_sd / "vae", vae.build(config).abstract())
    weights.save_state_dict(weights.to_state_dict(params), tmp_path / "vae.safetensors")
    again = weights.load_state_dict(tmp_path / "vae.safetensors", dtype=None)
    assert again.keys() == state.keys()
    for key, value in state.items():
        assert (again[key].shape, again[key].dtype, again[key].tobytes()) == (value.shape, value.dtype, value.tobytes())


@pytest.mark.parametrize("name", ["diffusion_pytorch_model", "model"])
@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards(name: str, variant: str, tmp_path: Path):
    state = torch_state()
    keys = sorted(state)
    weight_map = {}
    for i, part in enumerate((keys[:4], keys[4:]), start=1):
        file = f"{name}{variant}-0000{i}-of-00002.safetensors"
        save_file({key: state[key] for key in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    index = tmp_path / f"{name}.safetensors.index{variant}.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    read = weights.load_state_dict(tmp_path)
    assert read.keys() == state.keys()
    np.testing.assert_array_equal(read[keys[-1]], state[keys[-1]])
    (tmp_path / f"{name}{variant}-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError) as error:
        weights.load_state_dict(tmp_path)
    one_line(error, f"{name}{variant}-00002-of-00002.safetensors", index.name)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_leaf_by_leaf_equals_the_whole_file(dtype, tmp_path: Path):
    """Two shards; every leaf goes through `place` once, as float32 in our layout, and stands where it belongs."""
    state = {key: value.astype(dtype) for key, value in torch_state().items()}
    state["ids.position_ids"] = np.arange(3)
    keys = sorted(state)
    for i, part in enumerate((keys[:5], keys[5:])):
        save_file({key: state[key] for key in part}, tmp_path / f"{i}.safetensors")
    weight_map = {key: f"{int(i >= 5)}.safetensors" for i, key in enumerate(keys)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    seen = {}

    def place(path: tuple[str, ...], leaf: np.ndarray):
        assert (leaf.dtype, leaf.flags.c_contiguous) == (np.float32, True)
        assert path not in seen
        seen[path] = leaf
        return jnp.asarray(leaf)

    params = weights.load_params(tmp_path, ABSTRACT, place)
    expected = weights.to_params(state, ABSTRACT, source="here")
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    np.testing.assert_array_equal(seen["layers", "10", "kernel"], expected["layers"]["10"]["kernel"])
    assert len(seen) == len(jax.tree.leaves(ABSTRACT))
    jax.tree.map(np.testing.assert_array_equal, weights.load_params(tmp_path, ABSTRACT), expected)


@pytest.mark.parametrize(("dtype", "leaves"), [(np.float32, 32), (np.float16, 64)])
def test_memory_is_that_of_a_leaf(dtype, leaves: int, tmp_path: Path):
    """A 64 MB file whose leaves are dropped: what is held at once is a few leaves of 2 MB, not a copy of the file."""
    file = tmp_path / "model.safetensors"
    state = {f"layers.{i}.weight": np.zeros((1024, 512), dtype) for i in range(leaves)}
    weights.save_state_dict(state, file)
    del state
    assert file.stat().st_size > 64e6
    abstract = {"layers": {str(i): {"kernel": leaf(512, 1024)} for i in range(leaves)}}

    def peak(place) -> int:
        tracemalloc.start()
        weights.load_params(tmp_path, abstract, place)
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(lambda path, value: None) < 8e6
    assert peak(None) > leaves * 2e6  # the measure sees arrays


def test_plain_file_comes_before_variant(tmp_path: Path):
    save_file({"a": np.float16([1])}, tmp_path / "model.fp16.safetensors")
    assert weights.load_state_dict(tmp_path)["a"] == 1
    save_file({"a": np.float32([2])}, tmp_path / "model.safetensors")
    assert weights.load_state_dict(tmp_path)["a"] == 2


@pytest.mark.parametrize("convolutions", [False, True])
def test_old_names_of_the_vae_attention(convolutions: bool):
    config = vae.VaeConfig(block_out_channels=(4,), norm_num_groups=2)
    network = vae.build(config)
    state = random_state(network.abstract())
    renames = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    old = {}
    for key, value in state.items():
        for new_name, old_name in renames.items():
            key = key.replace(new_name, old_name)
        pointwise = convolutions and ".attentions.0." in key and value.ndim == 2
        old[key] = value[:, :, None, None] if pointwise else value
    assert sum(value.ndim == 4 for value in old.values()) == sum(v.ndim == 4 for v in state.values()) + 8 * convolutions
    assert sum("attentions.0.query" in key for key in old) == 4
    again = weights.to_state_dict(weights.to_params(old, network.abstract(), source="vae"))
    assert again.keys() == state.keys()
    assert all(np.array_equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize("architecture", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_clip_prefix_and_position_ids(architecture: str):
    network = clip.build(clip.ClipTextConfig(architecture, 9, 4, 4, 1, 1, 5, projection_dim=3))
    state = random_state(network.abstract())
    assert "text_model.embeddings.token_embedding.weight" in state
    bare = {key.removeprefix("text_model."): value for key, value in state.items()}
    bare["embeddings.position_ids"] = np.arange(5)[None]
    again = weights.to_state_dict(weights.to_params(bare, network.abstract(), source="clip"))
    assert again.keys() == state.keys()
    assert all(np.array_equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize("architecture", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_transformers_reads_the_exported_tower(architecture: str, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    config = clip.ClipTextConfig(architecture, 9, 4, 4, 1, 1, 5, projection_dim=3, bos_token_id=7, eos_token_id=8)
    state = random_state(clip.build(config).abstract())
    weights.save_state_dict(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    model, info = getattr(transformers, architecture).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = {key if key.startswith("text_") else f"text_model.{key}": v for key, v in model.named_parameters()}
    assert theirs.keys() == state.keys()
    assert all(np.array_equal(value.detach().numpy(), state[key]) for key, value in theirs.items())


def test_integers_are_not_cast(tmp_path: Path):
    weights.save_state_dict({"ids": np.arange(3), "w": np.ones(2)}, tmp_path / "a.safetensors", np.float16)
    read = weights.load_state_dict(tmp_path / "a.safetensors")
    assert (read["ids"].dtype, read["w"].dtype) == (np.dtype(np.int64), np.dtype(np.float32))


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


BAD_STATES = {
    "missing": (lambda s: s.pop("layers.10.weight"), ("tensor layers.10.weight is missing",)),
    "extra": (lambda s: s.update({"layers.12.weight": np.zeros((3, 2))}), ("unexpected tensor layers.12.weight",)),
    "shape": (
        lambda s: s.update({"conv.weight": np.zeros((5, 3, 3, 3), np.float32)}),
        ("tensor conv.weight", "(5, 3, 3, 3)", "(5, 2, 3, 3)"),
    ),
    "transposed": (lambda s: s.update({"layers.0.weight": np.zeros((2, 3))}), ("layers.0.weight", "(2, 3)", "(3, 2)")),
    "nan": (lambda s: s["norm.weight"].__setitem__(1, np.nan), ("tensor norm.weight holds NaN",)),
    "infinity": (lambda s: s["conv.bias"].__setitem__(0, np.inf), ("tensor conv.bias holds NaN or infinity",)),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_bad_tensor_is_one_line(name: str):
    damage, words = BAD_STATES[name]
    state = torch_state()
    damage(state)
    with pytest.raises(UserError) as error:
        weights.to_params(state, ABSTRACT, source="model/unet")
    one_line(error, "model/unet: ", *words)


@pytest.mark.parametrize("name", ["missing", "extra", "shape", "transposed"])
def test_headers_tell_before_a_tensor_is_read(name: str, tmp_path: Path):
    damage, words = BAD_STATES[name]
    state = torch_state()
    damage(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        weights.load_params(tmp_path, ABSTRACT, lambda path, leaf: pytest.fail(f"{path} was read"))
    one_line(error, str(tmp_path), *words)


def test_nan_is_told_at_its_tensor(tmp_path: Path):
    state = torch_state()
    state["norm.weight"] = state["norm.weight"].astype(np.float64)
    state["norm.weight"][1] = 1e300  # infinite in float32
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        weights.load_params(tmp_path, ABSTRACT)
    one_line(error, str(tmp_path / "model.safetensors"), "tensor norm.weight holds NaN or infinity")


def test_other_number_formats_are_refused(tmp_path: Path):
    """A file of eight-bit floats, written by hand: numpy has no such type."""
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    for load in (weights.load_state_dict, lambda folder: weights.load_params(folder, ABSTRACT)):
        with pytest.raises(UserError) as error:
            load(tmp_path)
        one_line(error, "model.safetensors: tensor w is stored as F8_E4M3", "float16")


def test_only_the_vae_attention_may_be_convolutions():
    state = torch_state()
    state["layers.3.weight"] = state["layers.3.weight"][:, :, None, None]
    with pytest.raises(UserError) as error:
        weights.to_params(state, ABSTRACT, source="here")
    one_line(error, "layers.3.weight has shape (3, 2, 1, 1)")


def test_both_names_of_one_tensor():
    network = clip.build(clip.ClipTextConfig("CLIPTextModel", 9, 4, 4, 1, 1, 5))
    state = random_state(network.abstract())
    state["final_layer_norm.bias"] = state["text_model.final_layer_norm.bias"]
    with pytest.raises(UserError) as error:
        weights.to_params(state, network.abstract(), source="clip")
    one_line(error, "final_layer_norm.bias", "keep one")


@pytest.mark.parametrize(
    "change", [lambda whole: whole + b"\0" * 7, lambda whole: whole * 2, lambda _: b"<!DOCTYPE html>" + b" " * 3000]
)
def test_bytes_behind_the_tensors_and_pages_of_a_web_server(change, tmp_path: Path):
    file = tmp_path / "model.safetensors"
    weights.save_state_dict(torch_state(), file)
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(UserError) as error:
        weights.load_state_dict(tmp_path)
    one_line(error, str(file), "fetch it again, or save it again with safetensors where other programs read it")


@pytest.mark.parametrize("kept", [4, 200, -1])
def test_truncated_file(kept: int, tmp_path: Path):
    file = tmp_path / "model.safetensors"
    weights.save_state_dict(torch_state(), file)
    file.write_bytes(file.read_bytes()[:kept])
    for load in (weights.load_state_dict, lambda folder: weights.load_params(folder, ABSTRACT)):
        with pytest.raises(UserError) as error:
            load(tmp_path)
        one_line(error, str(file), "not a whole safetensors file")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt", "pytorch_model.pth"])
def test_pickles_are_refused_by_name(name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(b"never read")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError) as error:
            weights.load_state_dict(path)
        one_line(error, str(tmp_path / name), "safetensors")


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../outside.safetensors"}}']
)
def test_bad_index(content: str, tmp_path: Path):
    (tmp_path / "outside.safetensors").write_bytes(b"")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError) as error:
        weights.load_state_dict(folder)
    one_line(error, "model.safetensors.index.json")


def test_nothing_there(tmp_path: Path):
    with pytest.raises(UserError) as error:
        weights.load_state_dict(tmp_path)
    one_line(error, str(tmp_path), "model.safetensors")
    with pytest.raises(UserError) as error:
        weights.load_state_dict(tmp_path / "absent")
    one_line(error, "absent", "no such")


def test_failed_write_leaves_the_old_file(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    weights.save_state_dict(torch_state(), file)
    before = file.read_bytes()
    with pytest.raises(UserError) as error:
        weights.save_state_dict({"big": np.float32([1e6])}, file, np.float16)
    one_line(error, "big", "float16")
    assert file.read_bytes() == before
    with pytest.raises(UserError) as error:
        weights.save_state_dict(torch_state(), file / "below.safetensors")
    one_line(error, "below.safetensors", "writable")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(("prefix", "kept"), [("text_model.", 2), ("", 2), ("text_model.", 1)])
def test_layers_that_a_text_tower_skips_are_left_unread(prefix: str, kept: int, tmp_path: Path):
    """Clip skip as diffusers' maintainers do it: fewer num_hidden_layers than the file has layers."""
    config = clip.ClipTextConfig(
        vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=3, num_attention_heads=1,
        max_position_embeddings=4,
    )  # fmt: skip
    whole = clip.build(config).init(jax.random.key(0))
    state = {key.replace("text_model.", prefix): value for key, value in weights.to_state_dict(whole).items()}
    weights.save_state_dict(state, tmp_path / "model.safetensors")
    fewer = clip.build(dataclasses.replace(config, num_hidden_layers=kept)).abstract()
    with pytest.warns(UserWarning, match=r"encoder\.layers\..*2 left unread: config\.json has fewer") as told:
        params = weights.load_params(tmp_path, fewer)
    assert len(told) == 1
    assert set(params["text_model"]["encoder"]["layers"]) == {str(layer) for layer in range(kept)}
    with pytest.raises(UserError, match="is missing"):
        weights.load_params(tmp_path, clip.build(dataclasses.replace(config, num_hidden_layers=4)).abstract())


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=r"model\.safetensors: a Git LFS pointer.*git lfs pull"):
        weights.load_state_dict(file)
