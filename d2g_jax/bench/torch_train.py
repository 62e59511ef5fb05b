"""G's step with MSE in PyTorch, for `d2g bench train`: the part of the iteration that has a plain counterpart.

The same work as our `g_regression` with `loss.name=mse`: frozen text towers, one UNet call and its backward pass, the
rule for x_0, MSE, clipping, AdamW, the running average; from the same weights, text and noise. The discriminator, R1
and E-LatentLPIPS have none in any published code, and are not compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from d2g_jax.bench import torch_pipeline
from d2g_jax.bench.measure import Candidate
from d2g_jax.bench.training import Run, Training
from d2g_jax.diffusion import noise
from d2g_jax.models import clip
from d2g_jax.plan.architectures import abstract_pipeline
from d2g_jax.train.packed import unpack
from d2g_jax.train.state import ema_decay


def candidate(
    name: str,
    run: Run,
    training: Training | None,
    data: dict[str, np.ndarray] | None,
    refused: str | None,
    *,
    compiles: bool,
) -> Candidate:
    """PyTorch's step for the run's config, from the weights that `training` has now.

    Call it before `training` has made a step: then the first losses of both sides are the same. On GPUs weights are
    float32 and arithmetic `train.dtype` by autocast, as ours; `compiles`: torch.compile of the UNet.
    """
    dtype = run.config.train.dtype
    reason = refused or torch_pipeline.alone_missing(abstract_pipeline(run.config.pipeline))
    if training is None or data is None or reason:
        return Candidate(name, dtype, None, not_run=reason)
    step = _build(run, training, data, compiles=compiles)
    size = run.config.train.batch_size
    return Candidate(name, dtype, step, describe=lambda loss: {"images": size, "loss": float(loss)})


def _build(run: Run, training: Training, data: dict[str, np.ndarray], *, compiles: bool) -> Callable[[], Any]:
    import torch

    config, d, device = run.config, run.shapes.d, torch_pipeline.device()
    pipeline = abstract_pipeline(config.pipeline)
    g, t = config.optimizer.generator, config.train
    compute = getattr(torch, t.dtype)
    unet = torch_pipeline.module(pipeline.unet, unpack(training.state.generator), "float32").train()
    if t.remat != "none":
        unet.enable_gradient_checkpointing()
    network = torch.compile(unet) if compiles else unet
    towers = [
        torch_pipeline.module(clip.build(tower.config), training.towers[key], "float32").eval()
        for key, tower in pipeline.towers.items()
    ]
    text = torch_pipeline.TorchText(pipeline, towers)
    parameters = list(unet.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(
        parameters, g.learning_rate, tuple(g.betas), weight_decay=g.weight_decay, fused=device == "cuda"
    )
    alpha_bar = float(d.schedule.alphas_cumprod[d.timestep])
    drawn = np.asarray(noise.record_noise(d.noise_seed, data["id"], data["latents"].shape[1:]))
    place = lambda x: torch.from_numpy(np.array(x)).to(device)  # noqa: E731
    ids, noises, targets = place(data["input_ids"]).long(), place(drawn), place(data["latents"]).float()
    decay = float(ema_decay(jnp.asarray(t.batch_size), t.batch_size, t.ema_half_life_images))
    part = min(t.micro_batch or t.batch_size, t.batch_size)

    def loss_of(chosen: slice, hidden: Any, added: dict[str, Any] | None) -> Any:
        x = noises[chosen]
        own = None if added is None else {key: value[chosen] for key, value in added.items()}
        times = torch.full((len(x),), d.timestep, device=device)
        with torch.autocast(device, compute, enabled=compute != torch.float32):
            output = network(x, times, encoder_hidden_states=hidden[chosen], added_cond_kwargs=own).sample.float()
        generated = torch_pipeline.to_x0(d.schedule.prediction_type, output, x, alpha_bar)
        return (generated - targets[chosen]).square().mean((1, 2, 3)).sum() / t.batch_size

    def step() -> Any:
        with torch.no_grad():
            hidden, added = text.encode(ids)
        total = torch.zeros((), device=device)
        for first in range(0, t.batch_size, part):
            loss = loss_of(slice(first, first + part), hidden, added)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, g.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - decay)
        if device == "cuda":
            torch.cuda.synchronize()
        return total

    return step
