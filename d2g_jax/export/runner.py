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


def check(meta, tokens, noise):
    """tokens and noise as the program takes them; ValueError for others, which would be drawn as black images."""
    tokens, noise = np.asarray(tokens), np.asarray(noise)
    wanted = {name: tuple(meta["inputs"][name]["shape"][1:]) for name in ("tokens", "noise")}
    if tokens.dtype.kind not in "iu" or tokens.ndim != 2 or tokens.shape[1:] != wanted["tokens"]:
        raise ValueError(f"tokens are {tokens.dtype} {tokens.shape}, not int32 (b, {wanted['tokens'][0]})")
    if noise.dtype.kind != "f" or noise.ndim != 4 or noise.shape[1:] != wanted["noise"]:
        raise ValueError(
            f"noise is {noise.dtype} {noise.shape}, not float32 (b, {', '.join(map(str, wanted['noise']))})"
        )
    if not len(tokens) == len(noise) > 0:
        raise ValueError(f"{len(tokens)} rows of tokens and {len(noise)} of noise; give as many of both, 1 or more")
    if not np.isfinite(noise).all():
        raise ValueError("noise holds values that are not finite; give standard normal noise")
    sizes = np.repeat(meta["vocabulary_sizes"], meta["token_lengths"])
    if wrong := tokens[(tokens < 0) | (tokens >= sizes)].tolist():
        raise ValueError(f"token {wrong[0]} is none of the tokenizer's; take the one in this zip")
    return tokens.astype(np.int32), noise.astype(np.float32)


def load(path):
    """A function: tokens int32 (b, L), noise float32 (b, C, h, w) -> images uint8 (b, H, W, 3).

    It raises ValueError for other tokens or noise, and for images that are not finite.
    """
    with zipfile.ZipFile(path) as archive:
        meta = json.loads(archive.read("meta.json"))
        program = jax.jit(export.deserialize(bytearray(archive.read("sampler.stablehlo"))).call)
        params = read_params(archive)

    def draw(tokens, noise):
        tokens, noise = check(meta, tokens, noise)
        size = len(tokens) if meta["batch"] == "any" else meta["batch"]
        parts = [slice(i, i + size) for i in range(0, len(tokens), size)]
        images, finite = zip(*[program(params, tokens[part], noise[part]) for part in parts], strict=True)
        if not np.concatenate(finite).all():
            raise ValueError("some images are not finite: the weights overflow; export with --dtype=float32")
        return np.concatenate(images)

    return draw


def read(path):
    """The array of a .npy file; ValueError that names a file of anything else."""
    try:
        return np.load(path)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: {error}") from error


def main(arguments):
    """Exit code 2 and one line for wrong arguments and files."""
    if len(arguments) != 4:
        print("usage: python run.py student.zip tokens.npy noise.npy images.npy", file=sys.stderr)
        return 2
    archive, tokens, noise, images = arguments
    try:
        np.save(images, load(archive)(read(tokens), read(noise)))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        print(f"run.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
