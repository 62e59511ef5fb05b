"""One diffusers folder or single file as one object, tokenizers, text towers, UNet, VAE, schedule; and back.

`StableDiffusionPipeline` (one text tower), `StableDiffusionXLPipeline` (two, of which the second is pooled), and the
teachers of `images.py`, which have neither text nor VAE.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from d2g_jax.diffusion.karras import TIME_SCALES
from d2g_jax.inputs import text
from d2g_jax.models import clip, denoisers, vae
from d2g_jax.models.image_unet_config import CLASSES, SONG, ImageUNetConfig
from d2g_jax.models.network import Network, Params
from d2g_jax.pipeline import images, single_file, weights
from d2g_jax.pipeline.hub import EXTRAS, NETWORKS, resolve
from d2g_jax.pipeline.tokenizers import json_bytes, load_tokenizer, read_component
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.atomic import write_bytes
from d2g_jax.runtime.errors import UserError

SD, SDXL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
RECTIFIED_FLOW = "RectifiedFlowPipeline"
"""InstaFlow's own class."""

_CLASSES = {
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "unet": ("UNet2DConditionModel", *CLASSES),
    "vae": ("AutoencoderKL",),
}
_SD_COMPONENTS = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")
_COMPONENTS = {
    SD: _SD_COMPONENTS,
    "LatentConsistencyModelPipeline": _SD_COMPONENTS,
    RECTIFIED_FLOW: _SD_COMPONENTS,
    SDXL: ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "unet", "vae", "scheduler"),
    **dict.fromkeys(images.PIPELINES, images.COMPONENTS),
}


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A loaded folder, or single file.

    Attributes:
      folder: where it was read from: a folder, or the file.
      index: `model_index.json`.
      tokenizer, tokenizer_2: transformers' `CLIPTokenizer`; the second for SDXL only, none for teachers of images.
      text_encoder, text_encoder_2, unet, vae: networks; each holds its config. Of a teacher of images the VAE is
        `models.pixels`, which does nothing, and there are no towers.
      params: trees under the names of the networks.
      scheduler: `scheduler_config.json`.
      scaling_factor: UNet latents = VAE latents x this.
      latent_shape: (h, w, C) of the model's native size.
    """

    folder: Path
    index: dict[str, Any]
    unet: Network
    vae: Network
    params: dict[str, Params]
    scheduler: dict[str, Any]
    tokenizer: Any = None
    tokenizer_2: Any = None
    text_encoder: Network | None = None
    text_encoder_2: Network | None = None

    @property
    def scaling_factor(self) -> float:
        return self.vae.config.scaling_factor

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return _latent_shape(self.unet.config)

    @property
    def tokenizers(self) -> tuple[Any, ...]:
        return tuple(one for one in (self.tokenizer, self.tokenizer_2) if one is not None)

    @property
    def classes(self) -> int | None:
        """How many classes a teacher of images is told, 0 for one that is told nothing; None where it is told text."""
        config = self.unet.config
        return (config.num_class_embeds or 0) if isinstance(config, ImageUNetConfig) else None

    @property
    def towers(self) -> dict[str, Network]:
        """The text towers under the names of their parameters."""
        both = {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}
        return {name: tower for name, tower in both.items() if tower is not None}

    @property
    def networks(self) -> dict[str, Network]:
        """All networks under the names of their parameters."""
        return {**self.towers, "unet": self.unet, "vae": self.vae}

    @property
    def text_params(self) -> dict[str, Params]:
        return {name: self.params[name] for name in self.towers}

    @property
    def token_length(self) -> int:
        """Tokens of one prompt, those of SDXL's second tokenizer behind those of the first; of a class one."""
        return 1 if self.classes is not None else sum(tokenizer.model_max_length for tokenizer in self.tokenizers)

    @property
    def zeros_for_empty_prompt(self) -> bool:
        """Whether an empty negative prompt means all zeros (SDXL) and not the encoding of the empty text."""
        return self.text_encoder_2 is not None and bool(self.index.get("force_zeros_for_empty_prompt", True))

    @classmethod
    def load(
        cls,
        folder: str | Path,
        dtype: jnp.dtype = jnp.float32,
        mesh: jax.sharding.Mesh | None = None,
        storage: jnp.dtype = jnp.float32,
        without: Collection[str] = (),
        unet: str | Path | None = None,
        prediction: str | None = None,
        tokenizer: str | Path | None = None,
    ) -> Pipeline:
        """Reads a diffusers folder, or a single file, leaf by leaf, so that the host never holds a second copy.

        Args:
          folder: in diffusers' layout, a safetensors file in the original one, or a hub id such as "owner/name".
          dtype: what the networks compute in.
          mesh: where each leaf goes, by the rules of `mesh.leaf_spec`; None is the default device.
          storage: dtype of kernels and embeddings; norms and biases stay float32. Half precision is for drawing only.
          without: networks whose weights are not read, because others take their place.
          unet: a safetensors file in either layout, or a folder with one, whose weights take the place of the model's
            own UNet; with a config.json beside them that config too.
          prediction: of a single file that does not say it, of `schedule.PREDICTION_TYPES`.
          tokenizer: a tokenizer folder in place of CLIP's own, of a single file.

        Raises:
          UserError: one line that names the file and key, for anything missing, unknown or inconsistent.
        """
        folder = resolve(folder)
        for name, said in (("prediction", prediction), ("tokenizer", tokenizer)):
            if said is not None and not folder.is_file():
                raise UserError(f"{folder}: no single file, and says its {name} itself; leave out {name}")
        with single_file.settings_folder(folder, prediction) as settings:
            index = _read_index(settings)
            of_images = index["_class_name"] in images.PIPELINES
            place = images.component if of_images else Path.__truediv__
            configs = {name: place(settings, name) / "config.json" for name in _components(index)}
            if unet is not None and (own := Path(unet, "config.json")).is_file():
                configs["unet"] = own
            networks = {
                name: _build(configs[name], name, index[name][1], dtype, upcast_vae=index["_class_name"] == SDXL)
                for name in _components(index)
                if name in NETWORKS
            }
            if isinstance(networks["unet"].config, ImageUNetConfig) != of_images:
                raise UserError(f"{configs['unet']}: its network is none of a {index['_class_name']}")
            if not of_images:
                _check_widths(configs["unet"], networks)
            seen, made = networks["unet"].config.in_channels, networks["unet"].config.out_channels
            if seen != made:
                raise UserError(f"{configs['unet']}: out_channels {made} is not in_channels {seen}; no teacher is so")
            tokenizers = {
                name: load_tokenizer(
                    Path(tokenizer or settings / name), networks[name.replace("tokenizer", "text_encoder")].config
                )
                for name in _components(index)
                if name.startswith("tokenizer")
            }
            file = place(settings, "scheduler") / "scheduler_config.json"
            scheduler = read_component(file)
            if of_images:
                scheduler = images.scheduler_of(scheduler)
            elif scheduler.get("_class_name") in TIME_SCALES:
                raise UserError(f"{file}: {scheduler['_class_name']} is no schedule of betas, which latents need here")
        if folder.is_file():
            readers = single_file.readers(folder, networks)
        else:
            readers = {name: _reader(place(folder, name), network) for name, network in networks.items()}
        if unet is not None:
            network = networks["unet"]
            readers["unet"] = single_file.unet_reader(Path(unet), network) or _reader(Path(unet), network)
        if of_images:
            networks["vae"], readers["vae"] = images.decoder(networks["unet"].config), lambda place: {}
        params = {name: read(placer(mesh, storage)) for name, read in readers.items() if name not in without}
        return cls(folder=folder, index=index, params=params, scheduler=scheduler, **networks, **tokenizers)


def _reader(place: Path, network: Network) -> single_file.Read:
    return functools.partial(weights.load_params, place, network.abstract())


def load_vae(model: str | Path, dtype: jnp.dtype = jnp.float32) -> tuple[Path, Network, Params]:
    """(where it lies, the network, its parameters) of a pipeline's VAE; of a folder no other part need be there.

    Raises `UserError` for a model without a VAE and for weights that do not fit its config.
    """
    folder = resolve(model)
    if folder.is_file():
        pipeline = Pipeline.load(folder, dtype, without=set(NETWORKS) - {"vae"})
        return folder, vae.build(pipeline.vae.config, dtype), pipeline.params["vae"]
    file = folder / "vae" / "config.json"
    config = vae.VaeConfig.from_json(text.read_json(file, "give a pipeline with a VAE"), source=str(file))
    network = vae.build(config, dtype)
    return file.parent, network, weights.load_params(file.parent, network.abstract())


class Decoded(NamedTuple):
    """uint8 images (N, H, W, 3), and bool (N,): whether each was finite before, for black ones do not show it."""

    images: jax.Array
    finite: jax.Array


def decode(pipeline: Pipeline, params: Mapping[str, Params], latents: jax.Array) -> Decoded:
    """Scaled latents (N, h, w, C) as images; pure."""
    unscaled = vae.unscale_latents(pipeline.vae.config, latents)
    return quantise(pipeline.vae.apply(params["vae"], unscaled, method="decode"))


def quantise(images: jax.Array) -> Decoded:
    """`to_uint8` with a look at what it hides."""
    return Decoded(to_uint8(images), jnp.isfinite(images).all(axis=(1, 2, 3)))


def to_uint8(images: jax.Array) -> jax.Array:
    """[-1, 1] -> uint8, rounded as diffusers' `VaeImageProcessor` does."""
    unit = jnp.clip(images.astype(jnp.float32) * 0.5 + 0.5, 0.0, 1.0)
    return jnp.round(unit * 255.0).astype(jnp.uint8)


def save_pipeline(
    folder: str | Path,
    configs: Mapping[str, Any],
    params: Mapping[str, Params],
    tokenizers: Mapping[str, Mapping[str, bytes]],
    dtype: Any = np.float16,
) -> None:
    """Writes a folder that `Pipeline.load` reads, and diffusers' `from_pretrained` unless its UNet is EDM's SongUNet.

    `configs` holds the config objects `text_encoder` (`text_encoder_2`), `unet`, `vae` and the dict `scheduler`;
    `params` the trees of the same names; `tokenizers` file contents under `tokenizer` (`tokenizer_2`). With
    `text_encoder_2` it is an SDXL folder, with `unet` and `scheduler` alone that of a teacher of images.
    `model_index.json` comes last: a folder without it was not finished. Raises `UserError` as `save_state_dict` does.
    """
    folder, of_images, sdxl = Path(folder), "vae" not in configs, "text_encoder_2" in configs
    if of_images:
        index: dict[str, Any] = {"_class_name": images.pipeline_of(configs["scheduler"])}
    else:
        index = {"_class_name": SDXL if sdxl else SD, **{name: [None, None] for name in EXTRAS}}
        index |= {"force_zeros_for_empty_prompt": True} if sdxl else {"requires_safety_checker": False}
    try:
        (folder / "model_index.json").unlink(missing_ok=True)
        for name in _components(index):
            if name == "scheduler":
                index[name] = ["diffusers", configs[name]["_class_name"]]
                write_bytes(folder / name / "scheduler_config.json", json_bytes(configs[name]))
            elif name.startswith("tokenizer"):
                index[name] = ["transformers", "CLIPTokenizer"]
                for file, content in tokenizers[name].items():
                    write_bytes(folder / name / file, content)
            else:
                index[name] = _save_network(folder / name, name, configs[name], params[name], dtype)
        write_bytes(folder / "model_index.json", json_bytes(index if of_images else dict(sorted(index.items()))))
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; give a writable place") from error


def _save_network(folder: Path, name: str, config: Any, params: Params, dtype: Any) -> list[str]:
    fields, stem = config.to_json(), "diffusion_pytorch_model"
    if name.startswith("text_encoder"):
        library, class_name, stem = "transformers", config.architecture, "model"
    else:
        class_name = fields["_class_name"]
        library = "d2g_jax" if class_name == SONG else "diffusers"
    write_bytes(folder / "config.json", json_bytes(fields))
    weights.save_state_dict(weights.to_state_dict(params), folder / f"{stem}.safetensors", dtype)
    return [library, class_name]


def _read_index(folder: Path) -> dict[str, Any]:
    """`model_index.json`, checked: a known pipeline class and known classes of its components."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a diffusers pipeline folder")
    file = folder / "model_index.json"
    index = read_component(file)
    if index.get("_class_name") not in _COMPONENTS:
        known = ", ".join((SD, SDXL, *images.PIPELINES))
        raise UserError(f"{file}: _class_name {index.get('_class_name')!r} is unknown; expected one of {known}")
    known = _components(index)
    for name, value in index.items():
        if not isinstance(value, list) or name in EXTRAS or value == [None, None]:
            continue
        if len(value) != 2:
            raise UserError(f"{file}: {name} must be [library, class], not {value!r}")
        if name not in known:
            raise UserError(f"{file}: component {name} is unknown to {index['_class_name']}; expected {known}")
        if name in _CLASSES and value[1] not in _CLASSES[name]:
            raise UserError(f"{file}: {name} of class {value[1]!r} is unknown; expected {' or '.join(_CLASSES[name])}")
    for name in known:
        if not isinstance(index.get(name), list) or index[name] == [None, None]:
            raise UserError(f"{file}: component {name} is missing; {index['_class_name']} needs it")
        if not (folder / name).is_dir() and index["_class_name"] not in images.PIPELINES:
            raise UserError(f"{folder / name}: folder is missing; {file.name} names it")
    return index


def placer(mesh: jax.sharding.Mesh | None, storage: jnp.dtype) -> Callable[[tuple[str, ...], np.ndarray], jax.Array]:
    """Where a loaded leaf goes, and in which dtype."""

    def put(path: tuple[str, ...], leaf: np.ndarray) -> jax.Array:
        leaf = leaf.astype(storage) if path[-1] in ("kernel", "embedding") else leaf
        if mesh is None:
            return jnp.asarray(leaf)
        spec = meshes.leaf_spec("/".join(path), leaf.shape, mesh.shape["fsdp"])
        return jax.make_array_from_callback(leaf.shape, NamedSharding(mesh, spec), lambda index: leaf[index])

    return put


def _components(index: Mapping[str, Any]) -> tuple[str, ...]:
    return _COMPONENTS[index["_class_name"]]


def _build(source: Path, name: str, class_name: str, dtype: jnp.dtype, *, upcast_vae: bool) -> Network:
    values = read_component(source)
    if name == "unet":
        return denoisers.build(denoisers.read_unet_config(values, source=str(source)), dtype)
    if name == "vae":
        config = vae.VaeConfig.from_json(values, source=str(source))
        overflows = upcast_vae and config.force_upcast and dtype == jnp.float16
        return vae.build(config, jnp.float32 if overflows else dtype)
    # model_index.json decides the class, as in diffusers: the config may name the model it was cut out of
    return clip.build(
        clip.ClipTextConfig.from_json({**values, "architectures": [class_name]}, source=str(source)), dtype
    )


def _check_widths(source: Path, networks: Mapping[str, Network]) -> None:
    """`source` is the UNet's config."""
    unet_config, vae_config = networks["unet"].config, networks["vae"].config
    towers = [network.config for name, network in networks.items() if name.startswith("text_encoder")]
    width, expected = sum(config.hidden_size for config in towers), unet_config.cross_attention_dim
    if width != expected:
        raise UserError(f"{source}: cross_attention_dim {expected} does not fit the text tower's width {width}")
    if "text_encoder_2" in networks:
        width = networks["text_encoder_2"].config.projection_dim + 6 * (unet_config.addition_time_embed_dim or 0)
        key, expected = "projection_class_embeddings_input_dim", unet_config.projection_class_embeddings_input_dim
        if width != expected:
            raise UserError(f"{source}: {key} {expected} does not fit the pooled text and six ids, {width}")
    if unet_config.in_channels != vae_config.latent_channels:
        raise UserError(
            f"{source}: in_channels {unet_config.in_channels} does not fit the VAE's "
            f"latent_channels {vae_config.latent_channels}"
        )
    if unet_config.sample_size is None:
        raise UserError(f"{source}: sample_size is missing; set it to the latents' height and width")


def _latent_shape(config: Any) -> tuple[int, int, int]:
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return height, width, config.in_channels
