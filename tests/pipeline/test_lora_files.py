"""LoRA files: written and read bit for bit, loaded by diffusers to the same networks, refused by name."""

import json

import numpy as np
import pytest

from d2g_jax.__main__ import main
from d2g_jax.models import lora
from d2g_jax.models.unet_config import UNetConfig
from d2g_jax.pipeline import lora_files, weights
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.pipeline.original_keys import original_places
from d2g_jax.pipeline.single_file import kind_settings
from d2g_jax.runtime.errors import UserError


def updates(pipeline, targets=("all",), rank=2, networks=("unet", "text_encoder")):
    """Random updates that change what is drawn."""
    rng, found = np.random.default_rng(0), {}
    for network in networks:
        shapes = lora.flat(getattr(pipeline, network).abstract())
        found[network] = {
            path: {
                "down": rng.standard_normal((*shapes[path].shape[:-1], rank)).astype(np.float32) * 0.3,
                "up": rng.standard_normal((rank, shapes[path].shape[-1])).astype(np.float32) * 0.3,
            }
            for path in lora.target_paths(shapes, targets)
        }
    return found


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for network in ours:
        assert ours[network].keys() == theirs[network].keys()
        for path, parts in ours[network].items():
            for name in parts:
                np.testing.assert_array_equal(parts[name], theirs[network][path][name])


@pytest.mark.parametrize("form", lora_files.FORMS)
@pytest.mark.parametrize("folder", ["tiny_sd", "tiny_sdxl"])
def test_what_is_written_is_read_again_bit_for_bit(folder, form, request, tmp_path):
    pipeline = Pipeline.load(request.getfixturevalue(folder))
    given = updates(pipeline, networks=("unet", *pipeline.towers))
    lora_files.write(given, tmp_path / "lora.safetensors", form, pipeline)
    same(lora_files.read(tmp_path / "lora.safetensors", pipeline), given)


@pytest.mark.parametrize(("form", "targets"), [("diffusers", ("all",)), ("kohya", ("attention", "feed_forward"))])
def test_diffusers_puts_it_on_as_we_do(form, targets, tiny_sd, tmp_path):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    pipeline, file = Pipeline.load(tiny_sd), tmp_path / "lora.safetensors"
    networks = ("unet", "text_encoder") if form == "diffusers" else ("unet",)
    given = updates(pipeline, targets, networks=("unet",))
    if len(networks) == 2:
        given |= updates(pipeline, networks=("text_encoder",))
        given["text_encoder"] = {path: u for path, u in given["text_encoder"].items() if "self_attn" in path}
    lora_files.write(given, file, form, pipeline)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    plain = {name: {k: v.clone() for k, v in getattr(theirs, name).state_dict().items()} for name in networks}
    theirs.load_lora_weights(tmp_path, weight_name=file.name)
    theirs.fuse_lora(lora_scale=0.7)
    theirs.unload_lora_weights()
    ours = lora_files.put_on(pipeline, [lora_files.Worn.parse(f"{file}:0.7")])
    for name in networks:
        mine = weights.to_state_dict(ours.params[name])
        changed = 0
        for key, value in getattr(theirs, name).state_dict().items():
            if (mine_key := key if key in mine else f"text_model.{key}") in mine:
                assert np.abs(mine[mine_key] - value.numpy()).max() <= 1e-5, key
                changed += not torch.equal(value, plain[name][key])
        assert changed == len(given[name])


def test_alpha_scale_and_order(tiny_sd, tmp_path):
    pipeline = Pipeline.load(tiny_sd)
    (path, parts), *_ = updates(pipeline, ("attention",), networks=("unet",))["unet"].items()
    file, name = tmp_path / "lora.safetensors", "lora_unet_" + path.removesuffix("/kernel").replace("/", "_")
    lora_files.write({"unet": {path: parts}}, file, "kohya", pipeline)
    state = weights.load_state_dict(file)
    state[f"{name}.alpha"] = np.full((), 1.0, np.float32)  # of rank 2
    weights.save_state_dict(state, file)
    worn = [lora_files.Worn.parse(text) for text in (f"{file}:0.5", str(file))]
    merged = lora.flat(lora_files.put_on(pipeline, worn).params["unet"])[path]
    plain = np.asarray(lora.flat(pipeline.params["unet"])[path])
    np.testing.assert_allclose(merged, plain + 0.75 * parts["down"] @ parts["up"], atol=1e-6)


def test_alpha_in_what_diffusers_says_beside_the_tensors(tiny_sd, tmp_path):
    from safetensors.numpy import load_file, save_file

    pipeline, file = Pipeline.load(tiny_sd), tmp_path / "lora.safetensors"
    given = updates(pipeline, ("attention",), networks=("unet",))
    lora_files.write(given, file, "diffusers", pipeline)
    for fields, message in (
        ({"unet.r": 2, "unet.lora_alpha": 1}, None),
        ({"unet.r": 2, "unet.lora_alpha": 1, "unet.use_dora": True}, "unet.use_dora, which is not read"),
        ({"unet.lora_alpha": 1}, "lora_adapter_metadata cannot be read"),
    ):
        save_file(load_file(file), file, metadata={"lora_adapter_metadata": json.dumps(fields)})
        if message:
            with pytest.raises(UserError, match=message):
                lora_files.read(file, pipeline)
            continue
        halved = {path: {**parts, "up": parts["up"] / 2} for path, parts in given["unet"].items()}
        same(lora_files.read(file, pipeline), {"unet": halved})


def test_names_of_the_original_layout():
    """As ComfyUI and kohya have SDXL's."""
    unet = UNetConfig.from_json(kind_settings("sdxl")["unet"], source="sdxl")
    for module, name in (
        ("down_blocks.0.resnets.1.conv1", "input_blocks.2.0.in_layers.2"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        ),
        ("down_blocks.2.attentions.1.proj_in", "input_blocks.8.1.proj_in"),
        ("mid_block.attentions.0.proj_in", "middle_block.1.proj_in"),
        ("mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
        ("up_blocks.0.attentions.2.proj_out", "output_blocks.2.1.proj_out"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        ("up_blocks.2.resnets.0.conv_shortcut", "output_blocks.6.0.skip_connection"),
    ):
        key = f"{module}.weight"
        assert original_places(unet, [key], "")[key].key == f"{name}.weight"


def test_old_names_of_an_attention_processor(tiny_sd, tmp_path):
    pipeline, file = Pipeline.load(tiny_sd), tmp_path / "lora.safetensors"
    given = updates(pipeline, ("attention",), networks=("unet",))
    lora_files.write(given, file, "diffusers", pipeline)
    old = {}
    for key, value in weights.load_state_dict(file).items():
        key = key.replace("to_out.0", "to_out").replace("lora_A", "down").replace("lora_B", "up")
        module, _, rest = key.rpartition(".to_")
        projection, _, ending = rest.partition(".")
        old[f"{module}.processor.to_{projection}_lora.{ending}"] = value
    weights.save_state_dict(old, file)
    same(lora_files.read(file, pipeline), given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, k: {**s, "unet.conv_inn.lora_A.weight": s[k]}, r"unet\.conv_inn\.lora_A\.weight is unknown"),
        (lambda s, k: {**s, k.replace("lora_A", "hada_w1_a"): s[k]}, r"hada_w1_a\.weight is unknown; .*no LoHa"),
        (lambda s, k: {n: v for n, v in s.items() if n != k}, "has no down tensor"),
        (lambda s, k: {**s, k: np.zeros((2, 7), np.float32)}, r"has \(2, 7\) and .*give a LoRA of the same base model"),
        (lambda s, k: {**s, k: s[k] * np.nan}, "is empty or holds NaN or infinity"),
        (lambda s, k: {}, "holds no tensors"),
    ],
)
def test_files_that_are_refused(change, message, tiny_sd, tmp_path):
    pipeline, file = Pipeline.load(tiny_sd), tmp_path / "lora.safetensors"
    lora_files.write(updates(pipeline, ("attention",), networks=("unet",)), file, "diffusers", pipeline)
    state = weights.load_state_dict(file)
    weights.save_state_dict(change(state, next(key for key in state if "lora_A" in key)), file)
    with pytest.raises(UserError, match=f"^{file}: .*{message}"):
        lora_files.read(file, pipeline)


def test_words_of_the_flag(tmp_path):
    file = tmp_path / "a:b.safetensors"
    file.touch()
    (tmp_path / lora_files.FOLDERS_FILE).touch()
    assert lora_files.Worn.parse(str(file)) == lora_files.Worn(file, 1.0)
    assert lora_files.Worn.parse(f"{file}:-0.5") == lora_files.Worn(file, -0.5)
    assert lora_files.Worn.parse(f"{tmp_path}:2") == lora_files.Worn(tmp_path / lora_files.FOLDERS_FILE, 2.0)
    for text, message in (
        (f"{file}:much", "the scale 'much' is no finite number; give one such as 0.8"),
        (f"{file}:inf", "the scale 'inf' is no finite number"),
        (f"{tmp_path}/c.safetensors", "is no file; give FILE.safetensors or FILE.safetensors:SCALE"),
    ):
        with pytest.raises(UserError, match=message):
            lora_files.Worn.parse(text)
    ckpt = tmp_path / "style.ckpt"
    ckpt.touch()
    with pytest.raises(UserError, match="pickle files are refused"):
        weights.load_state_dict(ckpt)


@pytest.mark.parametrize("job", [("sample", "--prompt=a cat"), ("export", "--to=diffusers")])
def test_a_file_that_is_not_there_ends_a_command_before_any_work(job, tmp_path, capsys):
    """The model is not there either: the LoRA is looked for first."""
    flags = [
        f"--model={tmp_path / 'model'}",
        f"--out={tmp_path / 'out'}",
        f"--lora={tmp_path / 'style.safetensors'}:0.5",
    ]
    assert main([*job, *flags]) == 2
    assert capsys.readouterr().err.count("style.safetensors is no file") == 1
    assert not list(tmp_path.iterdir())
