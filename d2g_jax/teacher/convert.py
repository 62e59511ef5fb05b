"""Teachers of others -> a folder that `Pipeline.load` reads, on the machine of whoever has the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from d2g_jax.inputs.places import check_new_folder
from d2g_jax.inputs.torch_files import read_torch
from d2g_jax.models import denoisers
from d2g_jax.pipeline.folder import save_pipeline
from d2g_jax.pipeline.weights import to_params
from d2g_jax.runtime.errors import UserError
from d2g_jax.teacher import edm

SCHEDULER = {
    "_class_name": "EDMEulerScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",  # what diffusers calls EDM's preconditioning
    "rho": 7.0,
    "sigma_data": 0.5,
    "sigma_max": 80.0,
    "sigma_min": 0.002,
    "sigma_schedule": "karras",
}
_PLAIN = (
    "a pickle of NVIDIA's holds code, which is never run here; with their repository on the path write its tensors: "
    "torch.save(pickle.load(open(FILE, 'rb'))['ema'].state_dict(), 'teacher.pt')"
)


def convert(source: Path, out: Path) -> Path:
    """Writes the pipeline folder `out` from an EDM network's plain state dict (.pt), or OpenAI's Flax msgpack.

    Raises `UserError` for a pickle with anything but tensors in it, a file that is damaged or of another network, and
    an `out` that is not empty.
    """
    check_new_folder(out)
    if source.suffix == ".pkl":
        raise UserError(f"{source}: {_PLAIN}")
    try:
        if source.suffix in (".pt", ".pth"):
            config, state = edm.from_nvidia(read_torch(source), source)
        else:
            config, state = edm.from_openai(_read_msgpack(source), source)
    except KeyError as error:
        raise UserError(
            f"{source}: {error} is missing, which tells how large the network is; fetch it again"
        ) from error
    params = to_params(state, denoisers.build(config).abstract(), source=source)
    save_pipeline(out, {"unet": config, "scheduler": SCHEDULER}, {"unet": params}, {}, np.float32)
    return out


def _read_msgpack(file: Path) -> dict:
    from flax import serialization

    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    try:
        tree = serialization.msgpack_restore(data)
    except Exception as error:  # what a damaged file raises is anybody's guess
        raise UserError(f"{file}: neither a .pt of tensors nor Flax's msgpack; give one of the two") from error
    return tree if isinstance(tree, dict) else {}
