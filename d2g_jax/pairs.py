"""The pair job: prompts -> the teacher's ODE solutions -> TFRecord shards.

Record i is a pure function of (config, i): its prompt is line i // pairs_per_prompt of the prompt file (read again from
the top when the file is exhausted), its noise is drawn from (seed, i). A shard is the unit of work; a rerun makes only
the shards that are missing.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from d2g_jax import mesh as meshes
from d2g_jax import noise, records, solvers
from d2g_jax.conditioning import tokenize_prompts
from d2g_jax.draw import Programs, Solution, draw, teacher_programs
from d2g_jax.errors import UserError
from d2g_jax.pipeline import Pipeline
from d2g_jax.progress import Progress

FOLDER = Path("pairs", "1.0.0")
"""Where the job writes below its workdir."""

_WHAT_MAKES_A_PAIR = (
    "count", "pairs_per_prompt", "records_per_shard", "steps", "solver", "guidance_scale", "guidance_rescale",
    "negative_prompt", "seed", "dtype",
)  # fmt: skip


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


def solution(config: ml_collections.ConfigDict) -> Solution:
    """How the teacher is solved, from `config.pairs`."""
    return Solution(
        steps=config.steps,
        guidance_scale=config.guidance_scale,
        guidance_rescale=config.guidance_rescale,
        negative_prompt=config.negative_prompt,
        solver=config.solver,
    )


def make_manifest(config: ml_collections.ConfigDict, pipeline: Pipeline, prompts: Prompts) -> records.Manifest:
    """What the pairs of this config are; raises `UserError` for settings out of range."""
    pairs = config.pairs
    solved = solution(pairs)
    schedule = solved.schedule(pipeline)
    if pairs.count < 1 or pairs.records_per_shard < 1:
        raise UserError(
            f"pairs.count={pairs.count}, pairs.records_per_shard={pairs.records_per_shard}: both start at 1"
        )
    if not 0.0 <= pairs.guidance_scale <= 100.0:
        raise UserError(f"pairs.guidance_scale={pairs.guidance_scale} is out of range; 0 to 100")
    height, width, channels = pipeline.latent_shape
    settings = {
        **{name: pairs[name] for name in _WHAT_MAKES_A_PAIR},
        "prompts": prompts.digest(),
        "teacher": folder_hash(pipeline.folder),
    }
    return records.Manifest(
        teacher=pipeline.folder.name,
        teacher_hash=settings["teacher"],
        solver=pairs.solver,
        num_inference_steps=pairs.steps,
        guidance_scale=pairs.guidance_scale,
        prediction_type=schedule.prediction_type,
        first_timestep=solvers.first_timestep(pairs.solver, schedule, pairs.steps),
        scheduler=pipeline.scheduler,
        noise_implementation=noise.IMPLEMENTATION,
        seed=pairs.seed,
        scaling_factor=pipeline.scaling_factor,
        latent_shape=(channels, height, width),
        token_length=pipeline.token_length,
        latent_dtype="float16",
        store_noise=False,
        num_records=pairs.count,
        num_shards=-(-pairs.count // pairs.records_per_shard),
        config_hash=records.config_hash(settings),
    )


def make_pairs(config: ml_collections.ConfigDict, workdir: Path) -> Path:
    """Makes what is missing of `workdir`/pairs/1.0.0 and returns that folder.

    Raises `UserError` when the folder holds pairs of another config, or cannot be written.
    """
    pairs = config.pairs
    mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp)
    pipeline = Pipeline.load(config.pipeline, jnp.dtype(pairs.dtype), mesh)
    prompts = read_prompts(pairs.prompts, pairs.pairs_per_prompt)
    manifest = make_manifest(config, pipeline, prompts)
    folder = Path(workdir) / FOLDER
    manifest.write(folder)
    missing = records.missing_shards(folder, manifest)
    if missing:
        devices = meshes.batch_shards(mesh)
        if pairs.batch_size < 1 or pairs.batch_size % devices:
            raise UserError(f"pairs.batch_size={pairs.batch_size} is not a multiple of the {devices} devices")
        programs = teacher_programs(pipeline, mesh, solution(pairs))
        shards = {i: records.shard_range(i, manifest.num_shards, manifest.num_records) for i in missing}
        with Progress("pairs", sum(len(ids) for ids in shards.values()), "img") as progress:
            for shard, ids in shards.items():
                solved = _shard_records(pipeline, prompts, manifest, programs, mesh, ids, pairs.batch_size)
                records.write_shard(folder, manifest, shard, progress.over(solved))
    records.write_metadata(folder, manifest)
    return folder


def _shard_records(
    pipeline: Pipeline,
    prompts: Prompts,
    manifest: records.Manifest,
    programs: Programs,
    mesh: jax.sharding.Mesh,
    ids: range,
    batch_size: int,
) -> Iterator[dict[str, Any]]:
    """The records of one shard in order, solved as they are asked for."""
    texts = [prompts[i] for i in ids]
    input_ids = tokenize_prompts(pipeline, texts)
    bits = np.asarray(noise.record_bits(manifest.seed, jnp.asarray(ids), manifest.latent_shape))
    drawn = np.asarray(noise.from_bits(bits))
    batches = draw(programs, mesh, drawn, input_ids, batch_size, images=False)
    latents = (x for batch in batches for x in batch.latents)
    for row, (record_id, solution) in enumerate(zip(ids, latents, strict=True)):
        yield {
            "id": record_id,
            "prompt": texts[row],
            "input_ids": input_ids[row],
            "noise_seed": manifest.seed,
            "noise_hash": noise.bits_hash(bits[row]),
            "latents": solution.astype(np.float16),
        }
