"""The systems behind the page: a student and its teacher, compiled once, drawn with one image at a time and timed."""

from __future__ import annotations

import base64
import dataclasses
import io
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from PIL import Image

from d2g_jax.inputs.text import as_prompt
from d2g_jax.pipeline.conditioning import Conditioning, tokenize_prompts, warn_of_prompts
from d2g_jax.pipeline.draw import Programs, check_finite
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.play import pad
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.errors import UserError

_CACHED_PROMPTS = 64


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a drawing is asked to show: a prompt, and a place on the pad of a seed (`pad.noise_at`)."""

    prompt: str
    seed: int = 0
    x: float = 0.0
    y: float = 0.0

    @classmethod
    def read(cls, value: Any, max_prompt: int) -> Asked:
        """From a JSON object. Raises `UserError` for missing keys, other types and what is out of range."""
        if not isinstance(value, dict) or set(value) != {"prompt", "seed", "x", "y"}:
            raise UserError("expected an object with prompt, seed, x and y")
        prompt, seed, x, y = value["prompt"], value["seed"], value["x"], value["y"]
        if not isinstance(prompt, str) or len(prompt) > max_prompt:
            raise UserError(f"prompt: text of at most {max_prompt} characters")
        prompt = as_prompt(prompt, "prompt")
        if type(seed) is not int or not 0 <= seed < pad.SEEDS:
            raise UserError(f"seed: a whole number from 0 to {pad.SEEDS - 1}")
        for name, place in (("x", x), ("y", y)):
            if type(place) not in (int, float) or not -1.0 <= place <= 1.0:  # NaN fails too
                raise UserError(f"{name}: a number from -1 to 1")
        return cls(prompt, seed, float(x), float(y))


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One image and how long it took.

    Attributes:
      image: uint8 (H, W, 3).
      noise: float32 (C, h, w), what it was drawn from.
      milliseconds: of "text" (tokenizer and text towers; 0 when the prompt's encoding was at hand), "unet" and "vae",
        each waited for with `block_until_ready`.
      notes: what should be known of it, such as a prompt that was cut off.
    """

    image: np.ndarray
    noise: np.ndarray
    milliseconds: dict[str, float]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For the page: the image and a picture of the noise as data URLs of PNG files."""
        return {
            "image": data_url(self.image),
            "noise": data_url(pad.picture(self.noise)),
            "ms": {name: round(value, 3) for name, value in self.milliseconds.items()},
            "notes": list(self.notes),
        }


@dataclasses.dataclass(frozen=True)
class System:
    """One way from noise and prompt to an image: what it is called, and its compiled calls."""

    title: str
    pipeline: Pipeline
    programs: Programs


class Studio:
    """Systems by name, "student" and maybe "teacher", that draw for several threads, one image at a time.

    One at a time, because the milliseconds of two that share a device would be nobody's.

    Attributes:
      systems: by name.
      shape: (C, h, w) of the latents.
      size: (height, width) of the images in pixels.
    """

    def __init__(self, systems: Mapping[str, System], shape: tuple[int, int, int], mesh: jax.sharding.Mesh):
        self.systems = dict(systems)
        self.shape = shape
        factor = self.systems["student"].pipeline.vae.config.downscale
        self.size = (factor * shape[1], factor * shape[2])
        self._mesh = mesh
        self._lock = threading.Lock()
        # Systems that share their encoder share what it said.
        self._texts: OrderedDict[tuple[Any, str], tuple[Conditioning, tuple[str, ...]]] = OrderedDict()

    def draw(self, name: str, asked: Asked) -> Drawing:
        """The image of system `name`; whoever else draws is waited for.

        Raises `UserError` as `check_finite` does.
        """
        system, noise = self.systems[name], pad.noise_at(asked.seed, asked.x, asked.y, self.shape)
        with self._lock:
            start = time.perf_counter()
            key = (system.programs.encode, asked.prompt)
            known = key in self._texts
            if not known:
                self._texts[key] = self._encode(system, asked.prompt)
            self._texts.move_to_end(key)
            text, notes = self._texts[key]
            placed = jax.block_until_ready(meshes.place_batch(noise[None], self._mesh))
            encoded_at = time.perf_counter()
            latents = jax.block_until_ready(system.programs.solve(placed, text))
            solved_at = time.perf_counter()
            decoded = jax.block_until_ready(system.programs.decode(latents))
            end = time.perf_counter()
            latents, decoded = jax.device_get((latents, decoded))
        check_finite(latents, decoded, system.title, [asked.prompt])
        seconds = {"text": 0.0 if known else encoded_at - start, "unet": solved_at - encoded_at}
        seconds["vae"] = end - solved_at
        return Drawing(decoded.images[0], noise, {stage: 1e3 * value for stage, value in seconds.items()}, notes)

    def warm_up(self) -> dict[str, float]:
        """Compiles everything; seconds by system. What comes later has the same shapes and compiles nothing."""
        seconds = {}
        for name in self.systems:
            start = time.perf_counter()
            self.draw(name, Asked(""))
            seconds[name] = time.perf_counter() - start
        return seconds

    def _encode(self, system: System, prompt: str) -> tuple[Conditioning, tuple[str, ...]]:
        """The prompt's encoding and the warnings about it; makes room for it."""
        if len(self._texts) >= _CACHED_PROMPTS:
            self._texts.popitem(last=False)  # the one that was not asked for longest
        with warnings.catch_warnings(record=True) as caught:  # one prompt a key pressed: to the page, not the terminal
            warnings.simplefilter("always", UserWarning)
            warn_of_prompts(system.pipeline, [prompt])
        ids = tokenize_prompts(system.pipeline, [prompt])
        text = jax.block_until_ready(system.programs.encode(meshes.place_batch(ids, self._mesh)))
        notes = tuple(dict.fromkeys(str(one.message) for one in caught if one.category is UserWarning))
        return text, notes


def data_url(image: np.ndarray) -> str:
    """uint8 (H, W, 3) as a PNG file in a data URL; compressed lightly, which is ten times as fast."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
