"""run.py of a StableHLO export: what it refuses, with a program of one line in place of a student."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from safetensors.numpy import save

from d2g_jax.export import runner

VOCABULARY = 7


def program(params: dict[str, jax.Array], tokens: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images (b, 2, 2, 3) uint8, and whether they were finite before."""
    value = params["scale"] * noise.mean((1, 2, 3)) + tokens[:, 0]
    images = jnp.broadcast_to(value[:, None, None, None], (noise.shape[0], 2, 2, 3))
    return jnp.clip(images, 0, 255).astype(jnp.uint8), jnp.isfinite(images).all((1, 2, 3))


@pytest.fixture(scope="module", params=["any", 2])
def archive(request, tmp_path_factory) -> Path:
    """A student of 2 tokens and noise (b, 1, 2, 2), of any batch or of two rows."""
    rows = "b" if request.param == "any" else str(request.param)
    scope = export.SymbolicScope()
    tokens, noise = (export.symbolic_shape(f"{rows}, {row}", scope=scope) for row in ("2", "1, 2, 2"))
    shapes = [
        {"scale": jax.ShapeDtypeStruct((), jnp.float32)},
        jax.ShapeDtypeStruct(tokens, jnp.int32),
        jax.ShapeDtypeStruct(noise, jnp.float32),
    ]
    meta = {
        "inputs": {"tokens": {"shape": ["any", 2]}, "noise": {"shape": ["any", 1, 2, 2]}},
        "vocabulary_sizes": [VOCABULARY],
        "token_lengths": [2],
        "batch": request.param,
    }
    file = tmp_path_factory.mktemp("export") / "student.zip"
    with zipfile.ZipFile(file, "w") as content:
        content.writestr("meta.json", json.dumps(meta))
        content.writestr("sampler.stablehlo", bytes(export.export(jax.jit(program))(*shapes).serialize()))
        content.writestr("params.safetensors", save({"scale": np.array(1e30, np.float32)}))
    return file


def run(archive: Path, folder: Path, tokens: np.ndarray, noise: np.ndarray) -> int:
    np.save(folder / "tokens.npy", tokens)
    np.save(folder / "noise.npy", noise)
    return runner.main([str(archive), *(str(folder / f"{name}.npy") for name in ("tokens", "noise", "images"))])


def test_it_draws(archive, tmp_path):
    tokens, noise = np.full((4, 2), 3, np.int64), np.zeros((4, 1, 2, 2), np.float64)
    assert run(archive, tmp_path, tokens, noise) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "images.npy"), np.full((4, 2, 2, 3), 3, np.uint8))


@pytest.mark.parametrize(
    ("tokens", "noise", "message"),
    [
        ([[1, VOCABULARY]], np.zeros((1, 1, 2, 2)), f"token {VOCABULARY} is none of the tokenizer's"),
        ([[-1, 0]], np.zeros((1, 1, 2, 2)), "token -1 is none of the tokenizer's"),
        ([[1, 2]], np.zeros((2, 1, 2, 2)), "1 rows of tokens and 2 of noise; give as many of both"),
        (np.zeros((0, 2), int), np.zeros((0, 1, 2, 2)), "0 rows of tokens and 0 of noise"),
        ([[1.0, 2.0]], np.zeros((1, 1, 2, 2)), "tokens are float64 (1, 2), not int32 (b, 2)"),
        ([[1, 2]], np.zeros((1, 2, 2, 1)), "noise is float64 (1, 2, 2, 1), not float32 (b, 1, 2, 2)"),
        ([[1, 2]], np.full((1, 1, 2, 2), np.nan), "noise holds values that are not finite"),
        ([[1, 2], [1, 2]], np.full((2, 1, 2, 2), 1e20), "some images are not finite: the weights overflow"),
    ],
)
def test_what_would_be_black_images_is_refused(archive, tokens, noise, message, tmp_path, capsys):
    assert run(archive, tmp_path, np.asarray(tokens), noise) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"run.py: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "images.npy").exists()


@pytest.mark.parametrize("arguments", [[], ["student.zip"], ["a", "b", "c", "d", "e"]])
def test_other_arguments_are_told_the_usage(arguments, capsys):
    assert runner.main(arguments) == 2
    assert capsys.readouterr().err == "usage: python run.py student.zip tokens.npy noise.npy images.npy\n"


@pytest.mark.parametrize("content", [None, b"", b"no zip", "a zip of other files"])
def test_an_archive_that_is_none(content, tmp_path, capsys):
    file = tmp_path / "student.zip"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("notes.txt", content)
    assert run(file, tmp_path, np.zeros((1, 2), int), np.zeros((1, 1, 2, 2))) == 2
    error = capsys.readouterr().err
    assert error.startswith("run.py: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"text", b"\x93NUMPY\x01"])
def test_an_array_that_is_none_is_named(content, archive, tmp_path, capsys):
    (tmp_path / "tokens.npy").write_bytes(content)
    (tmp_path / "noise.npy").write_bytes(content)
    names = [str(tmp_path / f"{name}.npy") for name in ("tokens", "noise", "images")]
    assert runner.main([str(archive), *names]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"run.py: {names[0]}: ")
    assert error.count("\n") == 1
