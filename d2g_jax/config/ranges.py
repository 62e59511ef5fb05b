"""What range each number of a configuration is in: one line a setting, by its name or by its name and section."""

from __future__ import annotations

from numbers import Real

from ml_collections import ConfigDict

from d2g_jax.inputs.numbers import AMOUNT, COUNT, GUIDANCE, RATE, RECORD_SEED, SEED, SHARE, WEIGHT, Range
from d2g_jax.runtime.runs import flatten

RANGES: dict[str, Range] = {
    "seed": SEED,
    "pairs.seed": RECORD_SEED,
    "mesh.data": Range(-1, 2**31, whole=True),
    **dict.fromkeys(("fsdp", "cpu_devices"), COUNT),
    **dict.fromkeys(("batch_size", "steps", "samples", "epochs", "every", "overfit.targets", "triplets.size"), COUNT),
    "guidance_scale": GUIDANCE,
    "guidance_rescale": SHARE,
    "lease_seconds": WEIGHT,
    **dict.fromkeys(("weight", "l1_weight", "kl_weight", "weight_decay", "r1_gamma"), WEIGHT),
    **dict.fromkeys(("pseudo_huber_c", "gradient_clip", "ema_half_life_images", "time_power", "penalty_sigma"), RATE),
    **dict.fromkeys(("learning_rate", "new_learning_rate"), RATE),
    **dict.fromkeys(("betas", "regression_beta1", "b2", "momentum", "dropout", "ema", "decay"), SHARE),
    **dict.fromkeys(("mix_and_match", "caption_dropout", "images.held_out"), SHARE),
    **dict.fromkeys(("timestep", "start_images", "warmup_images", "held_out", "skip_nonfinite"), AMOUNT),
    **dict.fromkeys(("lora.rank", "lora_rank", "resize", "pool", "loss.size"), AMOUNT),
    "lora.alpha": RATE,
    **dict.fromkeys(("head_channels", "r1_interval", "train.images", "groups", "micro_batch", "r1_micro_batch"), COUNT),
    **dict.fromkeys(("compile_workers", "log_every", "sample_every", "checkpoint_every", "save_every"), COUNT),
    **dict.fromkeys(("keep_checkpoints", "size", "views", "widths", "convs", "hidden"), COUNT),
    **dict.fromkeys(("count", "records_per_shard", "pairs_per_prompt", "plain", "triplets", "caption_variants"), COUNT),
    **dict.fromkeys(("calibration.epochs", "classification.epochs", "classification.decay_epochs"), RATE),
    "calibration.decay_epochs": WEIGHT,
}
"""The longest ending of a setting's name that is here says its range; of a tuple that of each number."""


def range_of(name: str) -> Range | None:
    """The range of the setting `name`, sections joined by dots; None for one that has none."""
    parts = name.split(".")
    endings = (".".join(parts[first:]) for first in range(len(parts)))
    return next((RANGES[ending] for ending in endings if ending in RANGES), None)


def check_ranges(config: ConfigDict) -> None:
    """Raises `UserError` for a number out of its range; before a job has loaded or written anything."""
    for name, value in flatten(config.to_dict()).items():
        allowed = range_of(name)
        for number in value if isinstance(value, tuple | list) else (value,):
            if number is not None and allowed is not None:
                allowed.check(name, number)
            elif isinstance(number, Real) and not isinstance(number, bool):
                Range().check(name, number)
