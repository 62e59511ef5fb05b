"""One zip file that draws without this package: a StableHLO program, its weights, a description and a runner.

The weights are the program's arguments and not constants in it, because what jax.export serialises stops at 2 GiB.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from d2g_jax.diffusion.schedule import Schedule, one_step
from d2g_jax.export import folders
from d2g_jax.models.lora import flat, nested
from d2g_jax.models.platform import ANY, compiling_for
from d2g_jax.pipeline.conditioning import encode_text, size_ids
from d2g_jax.pipeline.folder import Pipeline, decode
from d2g_jax.pipeline.hub import NETWORKS
from d2g_jax.runtime.atomic import replacing
from d2g_jax.sample import exported

PLATFORMS = ("cuda", "tpu", "cpu")
"""What a program is for; the last knows no products of float16 matrices."""

_SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_UNUSED = ("vae/encoder/", "vae/quant_conv/")
"""Drawing only decodes."""

_FIXED_BATCH = 1
_NOT_SYMBOLIC = (jax.errors.InconclusiveDimensionOperation, NotImplementedError, TypeError)
"""What jax raises where a batch of unknown size cannot be traced."""


def write(pipeline: Pipeline, timestep: int, out: Path, dtype: str, latent_shape: tuple[int, int, int]) -> None:
    """Writes the zip; `latent_shape` is (C, h, w) of the noise that the program takes."""
    params = flat(exported.store(pipeline.params, jnp.dtype(dtype)))
    params = {name: leaf for name, leaf in params.items() if not name.startswith(_UNUSED)}
    with folders.source_of(pipeline) as source:
        # networks that compute in dtype, whatever the sampler's compute in
        computing = Pipeline.load(source, jnp.dtype(dtype), without=NETWORKS)
        platforms = PLATFORMS[:-1] if dtype == "float16" else PLATFORMS
        program, fixed_because = trace(computing, timestep, params, latent_shape, platforms)
        meta = _meta(pipeline, timestep, dtype, latent_shape, program, fixed_because)
        names = folders.file_names(source)
        tokenizers = [n for part in ("tokenizer", "tokenizer_2") for n in folders.settings_files(names, part)]
        with replacing(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("run.py", Path(__file__).with_name("runner.py").read_bytes())
            archive.writestr("meta.json", json.dumps(meta, indent=2) + "\n")
            archive.writestr("sampler.stablehlo", program.serialize())
            _write_safetensors(archive, "params.safetensors", params)
            for name in (*tokenizers, *folders.license_files(names)):
                archive.write(source / name, name)


def trace(
    pipeline: Pipeline,
    timestep: int,
    params: Mapping[str, Any],
    latent_shape: tuple[int, int, int],
    platforms: Sequence[str] = PLATFORMS,
) -> tuple[export.Exported, str | None]:
    """(params, tokens int32 (b, L), noise float32 (b, C, h, w)) -> `folder.Decoded` as a tuple, for `platforms`.

    b is any number, or `_FIXED_BATCH` where jax cannot trace that; the second result is then the reason.
    """
    schedule, factor = Schedule.from_config(pipeline.scheduler), pipeline.vae.config.downscale
    sizes = size_ids(pipeline, (factor * latent_shape[1], factor * latent_shape[2]))

    @jax.jit
    def draw(params: dict[str, jax.Array], tokens: jax.Array, noise: jax.Array) -> tuple[jax.Array, ...]:
        trees = _trees(pipeline, params)
        condition = encode_text(pipeline, trees, tokens, sizes)

        def call(latents: jax.Array, t: jax.Array) -> jax.Array:
            return pipeline.unet.apply(trees["unet"], latents, jnp.broadcast_to(t, latents.shape[:1]), *condition)

        return tuple(decode(pipeline, trees, one_step(call, schedule, timestep, jnp.transpose(noise, (0, 2, 3, 1)))))

    def traced(batch: Any) -> export.Exported:
        shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in params.items()}
        tokens = jax.ShapeDtypeStruct((batch, pipeline.token_length), jnp.int32)
        noise = jax.ShapeDtypeStruct((batch, *latent_shape), jnp.float32)
        with compiling_for(ANY):
            return export.export(draw, platforms=platforms)(shapes, tokens, noise)

    try:
        return traced(*export.symbolic_shape("b")), None
    except _NOT_SYMBOLIC as error:  # an error of another origin comes again
        return traced(_FIXED_BATCH), str(error).strip().splitlines()[0]


def _trees(pipeline: Pipeline, given: Mapping[str, jax.Array]) -> dict[str, Any]:
    """The inverse of `flat`; leaves that drawing does not use are zeros, and the compiler drops them."""
    leaves = flat({name: network.abstract() for name, network in pipeline.networks.items()})
    unused = {name: jnp.zeros(x.shape, x.dtype) for name, x in leaves.items() if name.startswith(_UNUSED)}
    return nested({**given, **unused})


def _meta(
    pipeline: Pipeline,
    timestep: int,
    dtype: str,
    latent_shape: tuple[int, int, int],
    program: export.Exported,
    fixed_because: str | None,
) -> dict[str, Any]:
    batch = "any" if fixed_because is None else _FIXED_BATCH
    images, _ = program.out_avals
    lengths = [tokenizer.model_max_length for tokenizer in pipeline.tokenizers]
    return {
        **exported.describe(pipeline, timestep, "stablehlo", dtype),
        "batch": batch,
        "batch_fixed_because": fixed_because,
        "token_lengths": lengths,
        "vocabulary_sizes": [tower.config.vocab_size for tower in pipeline.towers.values()],
        "inputs": {
            "params": "the tensors of params.safetensors under their names",
            "tokens": {
                "dtype": "int32",
                "shape": [batch, sum(lengths)],
                "is": "padded ids of one tokenizer after the other",
            },
            "noise": {"dtype": "float32", "shape": [batch, *latent_shape], "is": "standard normal, NCHW"},
        },
        "output": {
            "dtype": "uint8",
            "shape": [batch, *images.shape[1:]],
            "is": "images, NHWC; behind them a bool an image: finite",
        },
        "platforms": list(program.platforms),
        "calling_convention_version": program.calling_convention_version,
    }


def _write_safetensors(archive: zipfile.ZipFile, name: str, tensors: Mapping[str, Any]) -> None:
    """The safetensors format written leaf by leaf: the host holds one leaf, and there is no second copy on the disk."""
    header, end = {}, 0
    for key, leaf in tensors.items():
        start, end = end, end + leaf.size * leaf.dtype.itemsize
        header[key] = {"dtype": _SAFETENSORS[leaf.dtype.name], "shape": list(leaf.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with archive.open(name, "w", force_zip64=True) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for leaf in tensors.values():
            file.write(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
