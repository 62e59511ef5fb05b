"""What made the pairs: written before the first shard, compared by every rerun, checked before training."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2g_jax.diffusion import noise, schedule
from d2g_jax.inputs.numbers import RECORD_SEED
from d2g_jax.records.files import read_json, write_json
from d2g_jax.records.schema import DATASET, LATENT_DTYPES, VERSION, PairSchema
from d2g_jax.runtime import buckets
from d2g_jax.runtime.errors import UserError

FILE = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What made a folder of pairs. Record i is a pure function of these, of the prompts and of i.

    `config_hash` covers every setting that changes a record, the prompts too; two manifests that differ in any field
    belong in two folders.
    """

    teacher: str  # name of the pipeline folder, for people
    teacher_hash: str  # of its weights and configs, for machines
    solver: str  # "ddim"
    num_inference_steps: int
    guidance_scale: float
    prediction_type: str
    first_timestep: int  # at which the teacher saw the noise
    scheduler: dict[str, Any]  # the teacher's scheduler_config.json
    noise_implementation: str  # d2g_jax.diffusion.noise.IMPLEMENTATION
    seed: int  # of the noise
    scaling_factor: float  # latents on disk are multiplied by it
    latent_shape: tuple[int, int, int]  # (C, h, w)
    token_length: int
    latent_dtype: str  # of stored text embeddings too
    store_noise: bool
    text_shapes: dict[str, Any]  # stored text embeddings, name to shape; empty: the towers run in training
    num_prompts: int  # of the source
    num_distinct_prompts: int  # among them; duplicates are allowed
    num_records: int
    num_shards: int
    config_hash: str

    def schema(self) -> PairSchema:
        """What a record of this folder holds."""
        text = tuple((name, tuple(shape)) for name, shape in self.text_shapes.items())
        return PairSchema(self.latent_shape, self.token_length, self.latent_dtype, self.store_noise, text)

    def write(self, folder: Path) -> None:
        """Writes `manifest.json`, unless the folder has the same one already.

        Raises `UserError` when the folder holds pairs that were made otherwise, and on values that no pair can have.
        """
        if not self.is_of(folder):
            write_json(folder / FILE, self)

    def is_of(self, folder: Path) -> bool:
        """Whether a folder has this very manifest; False when it has none and no shards. Raises as `write` does."""
        _check_values(self, folder / FILE)
        has_shards = any(folder.glob("*.tfrecord-*"))  # looked for first: another worker may be beginning just now
        if (folder / FILE).exists():
            self.check_same(folder)
            return True
        if has_shards:
            raise UserError(f"{folder}: holds shards but no {FILE}; choose another folder")
        return False

    def check_same(self, folder: Path) -> None:
        """Raises `UserError` that names the first field in which the manifest of `folder` differs."""
        old = Manifest.read(folder)
        for field in dataclasses.fields(Manifest):
            if field.name in ("teacher", "scheduler"):  # for people: teacher_hash covers what is read of them
                continue
            before, now = getattr(old, field.name), getattr(self, field.name)
            if before != now:
                raise UserError(
                    f"{folder}: holds pairs of another run ({field.name} is {before!r}, this run has {now!r}); "
                    "choose another folder"
                )

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder. Raises `UserError` when there is none, or one with unknown or missing fields."""
        folder = buckets.as_path(folder)
        if not (folder / FILE).is_file():
            raise UserError(f"{folder}: not a folder of pairs, {FILE} is missing; expected .../{DATASET}/{VERSION}")
        manifest = read_json(folder / FILE, cls)
        _check_values(manifest, folder / FILE)
        return manifest


def config_hash(settings: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of settings as canonical JSON."""
    return hashlib.sha256(json.dumps(dict(settings), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_fits(
    manifest: Manifest,
    *,
    source: str | Path,
    latent_shape: tuple[int, int, int],
    token_length: int,
    scaling_factor: float,
    scheduler: Mapping[str, Any],
    teacher_hash: str,
) -> None:
    """Refuses pairs that do not belong to a teacher.

    Args:
        source: the pairs folder, for the message.
        latent_shape: (C, h, w) of the teacher.
        scheduler: the teacher's scheduler_config.json; an absent key counts as diffusers' default.
        teacher_hash: of its weights, which must be the very ones that made the pairs.

    Raises:
        UserError: names the first field that differs and both values.
    """
    teacher = {"latent_shape": latent_shape, "token_length": token_length, "scaling_factor": scaling_factor}
    teacher |= {"noise_implementation": noise.IMPLEMENTATION}
    pairs = {name: getattr(manifest, name) for name in teacher}
    for fields, config in ((pairs, manifest.scheduler), (teacher, scheduler)):
        fields |= {f"scheduler.{key}": value for key, value in schedule.read_of(config).items()}
    pairs["teacher_hash"], teacher["teacher_hash"] = manifest.teacher_hash, teacher_hash  # last: it says least
    for name, value in pairs.items():
        if value != teacher.get(name):
            raise UserError(
                f"{source}: pairs do not fit the teacher: {name} is {value!r}, the teacher has {teacher.get(name)!r}; "
                f"make pairs with this teacher or train from {manifest.teacher!r}"
            )


def _check_values(manifest: Manifest, path: Path) -> None:
    if manifest.latent_dtype not in LATENT_DTYPES:
        raise UserError(f"{path}: latent_dtype = {manifest.latent_dtype!r}, expected one of {', '.join(LATENT_DTYPES)}")
    for name in ("seed", "num_records"):  # both enter the noise as 32-bit integers
        RECORD_SEED.check(f"{path}: {name}", getattr(manifest, name))
    if not 1 <= manifest.num_shards <= min(manifest.num_records, 99999):
        raise UserError(f"{path}: num_shards = {manifest.num_shards}, expected 1 to num_records and at most 99999")
    for name, shape in manifest.text_shapes.items():
        if not isinstance(shape, list) or not shape or not all(type(side) is int and side > 0 for side in shape):
            raise UserError(f"{path}: text_shapes.{name} = {shape!r} is no shape")
    if manifest.token_length < 1 or min(manifest.latent_shape) < 1:
        raise UserError(f"{path}: token_length and every side of latent_shape must be at least 1")
