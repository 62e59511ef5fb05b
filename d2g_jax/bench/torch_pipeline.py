"""diffusers' modules for one of our pipelines, with its weights: what `d2g bench` compares with.

Nothing here imports torch before it is called, and torch is no dependency.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from d2g_jax.bench.measure import RIVALS, Bar
from d2g_jax.diffusion.schedule import Schedule
from d2g_jax.models.network import Network, Params
from d2g_jax.pipeline.conditioning import size_ids
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.pipeline.weights import to_state_dict


def missing(packages: Sequence[str] = RIVALS) -> str | None:
    """Why PyTorch's `packages` cannot run here on the device that JAX uses; None where they can."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        return f"{' and '.join(absent)} not installed"
    import torch

    backend = jax.default_backend()
    if backend == "cpu" or (backend == "gpu" and torch.cuda.is_available()):
        return None
    return f"this torch has no {backend}"


def left_out(pipeline: Pipeline) -> str | None:
    """Why a pipeline has no counterpart here; None where it has one."""
    return missing() if pipeline.classes is None else "left out: only teachers that are told text have a counterpart"


def alone_missing(pipeline: Pipeline) -> str | None:
    """As `left_out`, of what runs on one device only: it isn't held against several of ours."""
    several = jax.default_backend() != "cpu" and jax.device_count() > 1
    return left_out(pipeline) or ("it runs on one device, ours on several" if several else None)


def device() -> str:
    """torch's name of the device that JAX uses; also gives torch every core of a CPU, as XLA has."""
    import torch

    if jax.default_backend() != "cpu":
        return "cuda"
    torch.set_num_threads(os.cpu_count() or 1)  # its own default may leave hyperthreads idle
    return "cpu"


def compiles(asked: bool | None) -> bool:
    """Whether torch.compile is to have these modules: as asked; None: on GPUs alone."""
    return jax.default_backend() == "gpu" if asked is None else asked


def bar(what: str, faster: float | None, limits: Mapping[str, float], compiled: bool) -> Bar:
    """`what` is at least so many times as fast as diffusers' modules, by platform.

    On a GPU nobody would run those as they are: the bar has no figure there unless torch.compile has had them.
    """
    backend = jax.default_backend()
    limit = limits.get(backend, 1.0)
    rival = "diffusers with torch.compile(max-autotune)" if backend == "gpu" else "diffusers"
    comparable = faster if compiled or backend != "gpu" else None
    return Bar.at_least(f"{what} at least {limit} times as fast as {rival}", comparable, limit)


def compiler() -> Callable[[Any], Any]:
    """torch.compile; on GPUs with max-autotune."""
    import torch

    return functools.partial(torch.compile, mode="max-autotune" if device() == "cuda" else "default")


def peak(result: Any) -> dict[str, Any]:
    """For a row: the most memory that torch has held on a GPU since this was last asked, weights included."""
    import torch

    if device() != "cuda":
        return {}
    held = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return {"peak_bytes": held}


def module(network: Network, params: Params, dtype: str) -> Any:
    """diffusers' or transformers' module for a network of ours, with these weights, in `dtype`, on the device."""
    import diffusers
    import torch
    import transformers

    values, compute = network.config.to_json(), getattr(torch, dtype)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # of another project's code
        if "architectures" in values:
            (name,) = values.pop("architectures")
            made = getattr(transformers, name)(transformers.CLIPTextConfig(**values))
        else:
            made = getattr(diffusers, values["_class_name"]).from_config(values)
    state = to_state_dict(params)
    if not any(key.startswith("text_model.") for key in made.state_dict()):
        state = {key.removeprefix("text_model."): value for key, value in state.items()}
    tensors = {}
    for key in list(state):
        # A copy where JAX owns the buffer; of the others no second one is held.
        tensors[key] = torch.from_numpy(np.require(state.pop(key), np.float32, ["C", "W"])).to(device(), compute)
    made.load_state_dict(tensors, strict=True, assign=True)
    for name, buffer in list(made.named_buffers()):
        if buffer.is_meta:  # position_ids, which no state dict holds
            owner, _, attribute = name.rpartition(".")
            count = torch.arange(buffer.shape[-1], device=device()).expand(buffer.shape)
            made.get_submodule(owner).register_buffer(attribute, count, persistent=False)
    # NHWC is what tensor cores take; on a CPU oneDNN lays tensors out by itself
    return made.to(memory_format=torch.channels_last) if device() == "cuda" else made


def modules(pipeline: Pipeline, dtype: str) -> dict[str, Any]:
    """Of all networks of a pipeline, in evaluation."""
    return {name: module(net, pipeline.params[name], dtype).eval() for name, net in pipeline.networks.items()}


class TorchText:
    """Text towers in PyTorch."""

    def __init__(self, pipeline: Pipeline, towers: list[Any]):
        """`towers`: the pipeline's modules, in evaluation."""
        self._towers, self._split = towers, pipeline.tokenizer.model_max_length
        self._time_ids = tuple(map(float, size_ids(pipeline)))

    def encode(self, input_ids: Any) -> tuple[Any, dict[str, Any] | None]:
        """Token ids (B, T L) to hidden states, and what SDXL adds to its time."""
        import torch

        if len(self._towers) == 1:
            return self._towers[0](input_ids=input_ids).last_hidden_state, None
        parts = input_ids[:, : self._split], input_ids[:, self._split :]
        outputs = [
            tower(input_ids=ids, output_hidden_states=True) for tower, ids in zip(self._towers, parts, strict=True)
        ]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        ids = torch.tensor([self._time_ids] * len(input_ids), device=hidden.device, dtype=hidden.dtype)
        return hidden, {"text_embeds": outputs[1].text_embeds, "time_ids": ids}


def to_x0(prediction_type: str, output: Any, noise: Any, alpha_bar: float) -> Any:
    """The rule of `diffusion.one_step` on float32 tensors."""
    signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    if prediction_type == "epsilon":
        return (noise - sigma * output) / signal
    return signal * noise - sigma * output if prediction_type == "v_prediction" else output


class TorchPipeline:
    """One-step sampling in PyTorch, by a pipeline's weights."""

    def __init__(self, pipeline: Pipeline, dtype: str, timestep: int, *, compiles: bool):
        """For a pipeline that `left_out` has nothing against.

        Args:
          dtype: of weights and arithmetic.
          timestep: of the one call.
          compiles: torch.compile of the towers, the UNet and the decoder, on GPUs with max-autotune.
        """
        import torch

        parts = modules(pipeline, dtype)
        if compiles:
            compiled = compiler()
            for name in (*pipeline.towers, "unet"):
                parts[name] = compiled(parts[name])
            parts["vae"].decode = compiled(parts["vae"].decode)
        schedule = Schedule.from_config(pipeline.scheduler)
        self._text = TorchText(pipeline, [parts[name] for name in pipeline.towers])
        self._unet, self._vae, self._compiled = parts["unet"], parts["vae"], compiles
        self._dtype, self._timestep = getattr(torch, dtype), timestep
        self._prediction_type, self._alpha_bar = schedule.prediction_type, float(schedule.alphas_cumprod[timestep])
        self._scaling_factor = pipeline.scaling_factor

    def solve(self, noise: Any, condition: tuple[Any, dict[str, Any] | None]) -> Any:
        """Noise (B, C, h, w) to float32 latents."""
        hidden, added = condition
        sample, t = noise.to(self._dtype), noise.new_full((len(noise),), self._timestep).long()
        output = self._unet(sample, t, encoder_hidden_states=hidden, added_cond_kwargs=added).sample.float()
        return to_x0(self._prediction_type, output, noise, self._alpha_bar)

    def decode(self, latents: Any) -> Any:
        """Latents to uint8 images (B, H, W, 3), rounded as diffusers does."""
        import torch

        images = self._vae.decode((latents / self._scaling_factor).to(self._dtype)).sample.float()
        return ((images * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)

    def calls(self, input_ids: np.ndarray, noise: np.ndarray) -> dict[str, Callable[[], Any]]:
        """Functions without arguments that end when their result is there: "text", "unet", "vae" and "all"."""
        import torch

        place = device()
        ids, drawn = torch.from_numpy(input_ids).long().to(place), torch.from_numpy(noise.copy()).to(place)

        def waited(call: Callable[[], Any]) -> Callable[[], Any]:
            def run() -> Any:
                if self._compiled and place == "cuda":
                    torch.compiler.cudagraph_mark_step_begin()
                with torch.inference_mode():
                    result = call()
                if place == "cuda":
                    torch.cuda.synchronize()
                return result

            return run

        def everything() -> Any:
            ids = torch.from_numpy(input_ids).long().to(place)
            return self.decode(self.solve(drawn, self._text.encode(ids))).cpu()

        with torch.inference_mode():
            condition = jax.tree.map(torch.clone, self._text.encode(ids))  # a compiled tower writes over its results
        return {
            "text": waited(lambda: self._text.encode(ids)),
            "unet": waited(lambda: self.solve(drawn, condition)),
            "vae": waited(lambda: self.decode(drawn)),  # latents of the right shape
            "all": waited(everything),
        }
