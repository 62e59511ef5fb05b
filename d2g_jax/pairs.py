"""The pair job: prompts -> the teacher's ODE solutions -> TFRecord shards.

Record i is a pure function of (config, i): its prompt is line i // pairs_per_prompt of the prompt file (read again from
the top when the file is exhausted), its noise is drawn from (seed, i). A shard is the unit of work; a rerun makes only
the shards that are missing.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from d2g_jax import mesh as meshes
from d2g_jax import noise, records
from d2g_jax.diffusion import Schedule, ddim, guided
from d2g_jax.errors import UserError
from d2g_jax.pipeline import Pipeline, tokenize
from d2g_jax.progress import Progress

FOLDER = Path("pairs", "1.0.0")
"""Where the job writes below its workdir."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The lines of a prompt file, and how often each is drawn."""

    lines: tuple[str, ...]
    pairs_per_prompt: int

    def __getitem__(self, record_id: int) -> str:
        return self.lines[record_id // self.pairs_per_prompt % len(self.lines)]

    def digest(self) -> str:
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()


def read_prompts(file: str | Path, pairs_per_prompt: int = 1) -> Prompts:
    """One prompt per line, UTF-8. Raises `UserError` for a missing, empty or undecodable file or an empty line."""
    if not file:
        raise UserError("pairs.prompts is empty; give a text file with one prompt per line")
    if pairs_per_prompt < 1:
        raise UserError(f"pairs.pairs_per_prompt={pairs_per_prompt}; it must be at least 1")
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read ({error.strerror}); give a text file with one prompt per line"
        ) from error
    if not lines:
        raise UserError(f"{file}: no prompts in it; give one prompt per line")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise UserError(f"{file}: line {number} is empty; remove it or write a prompt there")
    return Prompts(tuple(lines), pairs_per_prompt)


def folder_hash(folder: Path) -> str:
    """SHA-256 over the names and bytes of a pipeline folder's configs, tokenizer and weights."""
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".txt", ".safetensors") and p.is_file()):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def make_manifest(config: ml_collections.ConfigDict, pipeline: Pipeline, prompts: Prompts) -> records.Manifest:
    """What the pairs of this config are; raises `UserError` for settings out of range."""
    pairs = config.pairs
    schedule = Schedule.from_config(pipeline.scheduler)
    if pairs.count < 1 or pairs.records_per_shard < 1:
        raise UserError(
            f"pairs.count={pairs.count}, pairs.records_per_shard={pairs.records_per_shard}: both start at 1"
        )
    if not 0.0 <= pairs.guidance_scale <= 100.0:
        raise UserError(f"pairs.guidance_scale={pairs.guidance_scale} is out of range; 0 to 100")
    height, width, channels = pipeline.latent_shape
    settings = {
        **{name: pairs[name] for name in ("count", "steps", "guidance_scale", "negative_prompt", "seed", "dtype")},
        "pairs_per_prompt": pairs.pairs_per_prompt,
        "records_per_shard": pairs.records_per_shard,
        "prompts": prompts.digest(),
        "teacher": folder_hash(pipeline.folder),
    }
    return records.Manifest(
        teacher=pipeline.folder.name,
        teacher_hash=settings["teacher"],
        solver="ddim",
        num_inference_steps=pairs.steps,
        guidance_scale=pairs.guidance_scale,
        prediction_type=schedule.prediction_type,
        first_timestep=schedule.first_timestep(pairs.steps),
        scheduler=pipeline.scheduler,
        noise_implementation=noise.IMPLEMENTATION,
        seed=pairs.seed,
        scaling_factor=pipeline.scaling_factor,
        latent_shape=(channels, height, width),
        token_length=pipeline.tokenizer.model_max_length,
        latent_dtype="float16",
        store_noise=False,
        num_records=pairs.count,
        num_shards=-(-pairs.count // pairs.records_per_shard),
        config_hash=records.config_hash(settings),
    )


Solver = Callable[[jax.Array, jax.Array], jax.Array]
"""(noise (B, C, h, w), input_ids (B, L)) -> float32 scaled latents (B, C, h, w)."""


def make_solver(
    pipeline: Pipeline, mesh: jax.sharding.Mesh, *, steps: int, guidance_scale: float, negative_prompt: str = ""
) -> Solver:
    """The teacher as one compiled program over the mesh: text tower, guided DDIM, all in one call per batch."""
    schedule = Schedule.from_config(pipeline.scheduler)
    schedule.timesteps(steps)  # an impossible number of steps is refused here, before anything compiles
    params = meshes.place({name: pipeline.params[name] for name in ("text_encoder", "unet")}, mesh)
    negative_ids = jnp.asarray(tokenize(pipeline.tokenizer, [negative_prompt]))

    @jax.jit
    def solve(params: Any, drawn: jax.Array, input_ids: jax.Array) -> jax.Array:
        encode = lambda ids: pipeline.text_encoder.apply(params["text_encoder"], ids).last_hidden_state  # noqa: E731
        text = encode(input_ids)
        negative = jnp.broadcast_to(encode(negative_ids), text.shape)
        unet = functools.partial(pipeline.unet.apply, params["unet"])
        denoise = guided(unet, text, negative, guidance_scale)
        latents = ddim(denoise, schedule, steps, jnp.transpose(drawn, (0, 2, 3, 1)))
        return jnp.transpose(latents, (0, 3, 1, 2))

    return lambda drawn, input_ids: solve(params, drawn, input_ids)


def solve_in_batches(
    solver: Solver, mesh: jax.sharding.Mesh, drawn: np.ndarray, input_ids: np.ndarray, batch_size: int
) -> Iterator[np.ndarray]:
    """Latents (<= batch_size, C, h, w) batch by batch; the last one is padded on the device and cut on the host."""
    for start in range(0, len(drawn), batch_size):
        part = slice(start, start + batch_size)
        count = len(drawn[part])
        pad = lambda x, n=batch_size - count: np.concatenate([x, np.repeat(x[-1:], n, axis=0)])  # noqa: E731
        batch = meshes.place_batch({"noise": pad(drawn[part]), "ids": pad(input_ids[part])}, mesh)
        yield jax.device_get(solver(batch["noise"], batch["ids"]))[:count]


def make_pairs(config: ml_collections.ConfigDict, workdir: Path) -> Path:
    """Makes what is missing of `workdir`/pairs/1.0.0 and returns that folder.

    Raises `UserError` when the folder holds pairs of another config, or cannot be written.
    """
    dtype = jnp.dtype(config.pairs.dtype)
    pipeline = Pipeline.load(config.pipeline, dtype)
    prompts = read_prompts(config.pairs.prompts, config.pairs.pairs_per_prompt)
    manifest = make_manifest(config, pipeline, prompts)
    folder = Path(workdir) / FOLDER
    manifest.write(folder)
    missing = records.missing_shards(folder, manifest)
    if missing:
        mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp)
        devices = meshes.batch_shards(mesh)
        if config.pairs.batch_size % devices:
            raise UserError(f"pairs.batch_size={config.pairs.batch_size} is not a multiple of the {devices} devices")
        pairs = config.pairs
        solver = make_solver(
            pipeline,
            mesh,
            steps=pairs.steps,
            guidance_scale=pairs.guidance_scale,
            negative_prompt=pairs.negative_prompt,
        )
        shards = {i: records.shard_range(i, manifest.num_shards, manifest.num_records) for i in missing}
        with Progress("pairs", sum(len(ids) for ids in shards.values()), "img") as progress:
            for shard, ids in shards.items():
                solved = _shard_records(pipeline, prompts, manifest, solver, mesh, ids, pairs.batch_size)
                records.write_shard(folder, manifest, shard, progress.over(solved))
    records.write_metadata(folder, manifest)
    return folder


def _shard_records(
    pipeline: Pipeline,
    prompts: Prompts,
    manifest: records.Manifest,
    solver: Solver,
    mesh: jax.sharding.Mesh,
    ids: range,
    batch_size: int,
) -> Iterator[dict[str, Any]]:
    """The records of one shard in order, solved as they are asked for."""
    texts = [prompts[i] for i in ids]
    input_ids = tokenize(pipeline.tokenizer, texts)
    bits = np.asarray(noise.record_bits(manifest.seed, jnp.asarray(ids), manifest.latent_shape))
    drawn = np.asarray(noise.from_bits(bits))
    latents = (x for part in solve_in_batches(solver, mesh, drawn, input_ids, batch_size) for x in part)
    for row, (record_id, solution) in enumerate(zip(ids, latents, strict=True)):
        yield {
            "id": record_id,
            "prompt": texts[row],
            "input_ids": input_ids[row],
            "noise_seed": manifest.seed,
            "noise_hash": noise.bits_hash(bits[row]),
            "latents": solution.astype(np.float16),
        }
