"""Draws with a zip file of `d2g export --to=stablehlo`; needs jax, numpy and flatbuffers, and nothing else.

    python run.py student.zip tokens.npy noise.npy images.npy

meta.json in the zip says what tokens and noise are. images.npy is uint8 (b, H, W, 3).
"""

import json
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


def read_params(archive):
    """The tensors of params.safetensors: a header's length, the header in JSON, the bytes of all tensors."""
    with archive.open("params.safetensors") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        params = {}
        for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = tensor["data_offsets"]
            values = np.frombuffer(file.read(end - start), DTYPES[tensor["dtype"]])
            params[name] = jax.device_put(values.reshape(tensor["shape"]))
    return params


def load(path):
    """A function: tokens int32 (b, L), noise float32 (b, C, h, w) -> images uint8 (b, H, W, 3)."""
    with zipfile.ZipFile(path) as archive:
        meta = json.loads(archive.read("meta.json"))
        program = jax.jit(export.deserialize(bytearray(archive.read("sampler.stablehlo"))).call)
        params = read_params(archive)

    def draw(tokens, noise):
        size = len(tokens) if meta["batch"] == "any" else meta["batch"]
        parts = [slice(i, i + size) for i in range(0, len(tokens), size)]
        return np.concatenate([program(params, tokens[part], noise[part]) for part in parts])

    return draw


if __name__ == "__main__":
    archive, tokens, noise, images = sys.argv[1:]
    np.save(images, load(archive)(np.load(tokens), np.load(noise)))
