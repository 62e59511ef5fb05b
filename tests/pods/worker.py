"""A process of its own with as many simulated devices as a test wants: `worker.py SPEC.json` (see `Spec`).

It makes G, D and R1 updates of one problem on one mesh and writes metrics and parameters, which tests compare between
processes of different meshes; also what its compiled programs move between devices.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# As in tests/conftest.py: compilation takes the time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("JAX_OPTIMIZATION_LEVEL", "O0")
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "train"))  # of its test_step: the tiny problem

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from d2g_jax.digits.config import get_config
from d2g_jax.runtime import distributed, sharding
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.errors import UserError
from d2g_jax.train.checkpoint import Checkpoints
from d2g_jax.train.programs import compile_programs, iteration
from d2g_jax.train.state import create_state

PROGRAMS = ("g_adversarial", "d", "r1")


@dataclasses.dataclass(frozen=True)
class Spec:
    """What one process is to do.

    Attributes:
      devices: simulated ones of this process; fsdp: of the mesh over those of all processes.
      problem: "tiny" (that of test_step.py) or "digits" (the demo's networks and losses, made-up pairs).
      size, groups: of the batch; micro_batch, r1_micro_batch: see accumulation.py.
      steps: iterations of all three updates.
      packed: whether the digits' networks are vectors (train.packed).
      out: where metrics and state go, .npz.
      collectives: where what the programs move goes, .json; empty for nowhere.
      checkpoints: a folder; `save` writes the last state there, `restore` starts from it.
    """

    devices: int
    fsdp: int = 1
    problem: str = "tiny"
    size: int = 80
    groups: int = 40
    micro_batch: int | None = None
    r1_micro_batch: int | None = None
    steps: int = 2
    packed: bool = False
    out: str = ""
    collectives: str = ""
    checkpoints: str = ""
    save: bool = False
    restore: bool = False


def config_of(spec: Spec) -> Any:
    """The digits' config with all three updates in every iteration."""
    config = get_config()
    config.train.update(batch_size=spec.size, groups=spec.groups, images=spec.size * 1000, packed=spec.packed)
    config.adversarial.update(start_images=0, warmup_images=0, r1_interval=1)
    return config


def digits(config: Any) -> tuple[Any, Any, Any, dict[str, np.ndarray]]:
    from d2g_jax.pipeline.folder import Pipeline
    from d2g_jax.train.setup import build, initial_state

    pipeline, size = Pipeline.load(config.pipeline), config.train.batch_size
    d, frozen = build(config, pipeline, SimpleNamespace(text_shapes={}, first_timestep=999, seed=5))
    state = initial_state(config, d, pipeline, meshes.make_mesh(devices=jax.local_devices()[:1]))
    d, state = smooth(d, state, 1e-3)
    rng = np.random.default_rng(0)
    height, width, channels = pipeline.latent_shape
    batch = {
        "id": np.arange(size, dtype=np.uint32),
        "input_ids": rng.integers(0, 14, (size, pipeline.token_length)).astype(np.int32),
        "latents": rng.standard_normal((size, channels, height, width)).astype(np.float16),
    }
    return d, frozen, state, batch


def smooth(d: Any, state: Any, rate: float) -> tuple[Any, Any]:
    """The same distillation by an Adam of large epsilon, with which meshes can be told from rounding.

    Adam divides a gradient by its own size: where that is all but zero, rounding decides the step. With their own,
    an ulp more in half of G's values moves the fourth step's gradient norms by 4e-5 on one and the same device.
    """
    adam = optax.adamw(rate, 0.9, 0.99, eps=0.1)
    d = dataclasses.replace(d, generator_optimizer=adam, discriminator_optimizer=adam)
    return d, create_state(state.generator, adam, state.discriminator, adam)


def tiny(config: Any) -> tuple[Any, Any, Any, dict[str, np.ndarray]]:
    from test_step import problem

    sharding._MIN_SHARDED_SIZE = 64  # its kernels are small
    d, frozen, state, batch = problem(config.train.batch_size, config.train.groups, packed=False)
    d, state = smooth(d, state, 1e-2)
    return d, frozen, state, batch


def run(spec: Spec) -> None:
    config = config_of(spec)
    # As on TPU slices, no process has one stretch of the mesh.
    mesh = meshes.make_mesh(fsdp=spec.fsdp, devices=[*jax.devices()[::2], *jax.devices()[1::2]])
    meshes.check_batch(mesh, spec.size, spec.groups, spec.micro_batch, spec.r1_micro_batch)
    d, frozen, state, batch = {"tiny": tiny, "digits": digits}[spec.problem](config)
    d = dataclasses.replace(d, micro_batch=spec.micro_batch, r1_micro_batch=spec.r1_micro_batch)
    frozen, state = meshes.place(frozen, mesh), meshes.place(state, mesh)
    mine = meshes.own_rows(mesh, spec.size)
    batch = meshes.place_batch({name: value[mine] for name, value in batch.items()}, mesh)
    if spec.restore:
        with Checkpoints(spec.checkpoints) as checkpoints:
            state = checkpoints.restore(state)
    programs = compile_programs(config, d, frozen, state, batch, mesh)
    if spec.collectives:
        from test_step import collectives

        found = {name: collectives(getattr(programs, name).as_text()) for name in PROGRAMS}
        Path(spec.collectives).write_text(json.dumps(found))
    metrics = {}
    for step in range(int(state.step), int(state.step) + spec.steps):
        state, values = iteration(config, programs, frozen, state, batch, step * spec.size)
        metrics |= {f"metrics/{step}{jax.tree_util.keystr(path)}": np.asarray(value) for path, value in leaves(values)}
    if spec.save:
        with Checkpoints(spec.checkpoints, 2) as checkpoints:
            checkpoints.save(state, {})
    whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))(state)
    if jax.process_index() == 0 and spec.out:
        arrays = {jax.tree_util.keystr(path): np.asarray(value) for path, value in leaves(whole)}
        np.savez(spec.out, **metrics, **arrays)


def leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


if __name__ == "__main__":
    try:
        spec = Spec(**json.loads(sys.argv[1]))
        meshes.use_cpu_devices(spec.devices)
        distributed.start({"spec": spec.problem})
        run(spec)
    except UserError as error:
        sys.exit(distributed.finish(2, str(error)))
    sys.exit(distributed.finish(0))
