"""G and D trained as low-rank updates: the same first output, the teacher frozen, checkpoints of updates alone."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import saved
from test_step import problem
from tiny import get_config

from d2g_jax.models import lora
from d2g_jax.models.discriminator import BACKBONE
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime import runs
from d2g_jax.runtime.errors import UserError
from d2g_jax.sample.sampler import Sampler
from d2g_jax.train import setup, step
from d2g_jax.train.checkpoint import Checkpoints
from d2g_jax.train.packed import unpack
from d2g_jax.train.state import create_state


def low_rank(backbone_rank):
    """The problem of test_step.py with low-rank updates of G, and of D's backbone or with that frozen (0)."""
    d, frozen, state, batch = problem(packed=False)
    d = dataclasses.replace(d, generator_scale=0.5, discriminator_scale=1.0)
    frozen = dataclasses.replace(frozen, teacher=state.generator)
    new = {name: part for name, part in state.discriminator.items() if name != BACKBONE}
    whole = {**state.discriminator, BACKBONE: {n: state.generator[n] for n in state.discriminator[BACKBONE]}}
    if backbone_rank:
        new[BACKBONE] = lora.init(jax.random.key(1), whole[BACKBONE], backbone_rank, ("attention",))
    generator = lora.init(jax.random.key(0), state.generator, 2, ("attention", "convolutions"))
    first = create_state(generator, d.generator_optimizer, new, d.discriminator_optimizer)
    return d, frozen, first, batch, (state.generator, whole)


@pytest.mark.parametrize("backbone_rank", [0, 2])
def test_the_first_networks_are_the_whole_ones_bit_for_bit(backbone_rank):
    d, frozen, state, _, (generator, discriminator) = low_rank(backbone_rank)
    for ours, whole in (
        (step.generator(d, frozen, state.generator), generator),
        (step.discriminator(d, frozen, state.discriminator), discriminator),
    ):
        assert jax.tree.structure(ours) == jax.tree.structure(whole)
        assert all(map(jnp.array_equal, jax.tree.leaves(ours), jax.tree.leaves(whole)))


@pytest.mark.slow
def test_the_updates_alone_are_trained():
    """Both steps once: B moves, A does not yet (B was zero), the teacher is nowhere in the state."""
    d, frozen, state, batch, (generator, _) = low_rank(2)
    c = step.condition(d, frozen, batch)
    whole = jax.jit(lambda: d.unet.apply(generator, c.noise, jnp.full(len(c.noise), d.timestep), *c.text))()
    after, generated, metrics = jax.jit(functools.partial(step.g_step, d, True))(frozen, state, batch)
    first = step.one_step(lambda x, t: whole, d.schedule, d.timestep, c.noise)
    np.testing.assert_allclose(generated, first, atol=1e-6)
    assert float(metrics["gradient_generator"]) > 0
    before = lora.flat(state.generator)
    moved = {path: bool(jnp.any(leaf != before[path])) for path, leaf in lora.flat(after.generator).items()}
    assert all(moves for path, moves in moved.items() if path.endswith("/up"))
    after, _ = jax.jit(functools.partial(step.d_step, d))(frozen, after, batch, generated)
    before = lora.flat(state.discriminator)
    moved = {path: bool(jnp.any(leaf != before[path])) for path, leaf in lora.flat(after.discriminator).items()}
    assert moved.keys() == before.keys()
    assert all(moves for path, moves in moved.items() if path.endswith("/up"))
    assert jax.tree.structure(after.ema) == jax.tree.structure(state.generator)


def config_of(**changes):
    config = get_config().unlock()
    config.update_from_flattened_dict({"lora.rank": 2, "lora.targets": ("attention", "feed_forward"), **changes})
    return config


MANIFEST = SimpleNamespace(first_timestep=999, seed=0, text_shapes={})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("changes", "backbone"),
    [({}, "whole"), ({"discriminator.lora_rank": 3}, 3), ({"discriminator.backbone": "frozen"}, 0)],
)
def test_what_a_config_makes(changes, backbone, dtype):
    config = config_of(**{"train.dtype": dtype, "lora.alpha": 1.0, **changes})
    pipeline = Pipeline.load(config.pipeline)
    d, frozen = setup.build(config, pipeline, MANIFEST)
    state = setup.first_state(config, d, pipeline.params["unet"])
    assert (d.generator_scale, d.discriminator_scale) == (0.5, None if backbone == "whole" else 1.0)
    assert {leaf.shape[-1] for path, leaf in lora.flat(unpack(state.generator)).items() if path.endswith("down")} == {2}
    assert {str(leaf.dtype) for path, leaf in lora.flat(frozen.teacher).items() if path.endswith("kernel")} == {dtype}
    held = lora.flat(unpack(state.discriminator))
    ranks = {len(leaf) for path, leaf in held.items() if path.startswith(BACKBONE) and path.endswith("up")}
    assert ranks == ({backbone} if backbone in (3,) else set())
    assert any(path.startswith(BACKBONE) for path in held) == bool(backbone)
    networks = step.generator(d, frozen, state.generator), step.discriminator(d, frozen, state.discriminator)
    for params, network in zip(networks, (d.unet, d.discriminator), strict=True):
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, network.abstract())
    moments = [leaf for leaf in jax.tree.leaves(state.generator_optimizer) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * sum(leaf.size for leaf in jax.tree.leaves(state.generator))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("changes", [{"discriminator.lora_rank": 3}, {"discriminator.backbone": "frozen"}])
def test_a_frozen_backbone_of_d_is_not_g_s_to_give_away(changes, dtype):
    """The steps take the state's arrays for their results (they donate them): what is frozen must be other arrays."""
    config = config_of(**{"train.dtype": dtype, "lora.rank": 0, **changes})
    pipeline = Pipeline.load(config.pipeline)
    d, frozen = setup.build(config, pipeline, MANIFEST)
    state = setup.initial_state(config, d, pipeline, meshes.make_mesh(1, 1, jax.devices()[:1]))
    assert d.generator_scale is None
    of = lambda tree: {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}  # noqa: E731
    assert frozen.teacher
    assert not of(meshes.place(frozen, meshes.make_mesh(1, 1, jax.devices()[:1])).teacher) & of(state.generator)
    for ours, theirs in zip(*map(jax.tree.leaves, (frozen.teacher, unpack(state.generator))), strict=True):
        np.testing.assert_array_equal(ours, theirs.astype(ours.dtype))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"discriminator.backbone": "cold"}, "^discriminator.backbone='cold'; choose one of trained, frozen$"),
        ({"discriminator.backbone": "frozen", "discriminator.lora_rank": 2}, "^discriminator.lora_rank=2 updates a"),
        ({"lora.rank": 1000}, "^lora.rank=1000: .* choose a lower rank$"),
        ({"lora.targets": ("attn",)}, "^lora.targets: 'attn' is unknown; choose of attention"),
    ],
)
def test_settings_that_are_refused(changes, message):
    config = config_of(**changes)
    pipeline = Pipeline.load(config.pipeline)
    with pytest.raises(UserError, match=message):
        setup.first_state(config, setup.build(config, pipeline, MANIFEST)[0], pipeline.params["unet"])


@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False])
def test_a_checkpoint_holds_the_updates_and_a_sampler_the_student(packed, tmp_path):
    """Its shapes say that nothing else is saved; another rank does not take it up."""
    config = config_of(**{"adversarial.weight": 0.0, "train.packed": packed})
    pipeline = Pipeline.load(config.pipeline)
    d, _ = setup.build(config, pipeline, MANIFEST)
    teacher = pipeline.params["unet"]
    state = setup.first_state(config, d, teacher)
    average = jax.tree.map(lambda leaf: leaf + 0.25, state.ema)
    state = dataclasses.replace(state, ema=average)
    metadata = {"config": runs.to_json(config), "pipeline": config.pipeline, "timestep": 999}
    with Checkpoints(tmp_path / "checkpoints", 1) as checkpoints:
        checkpoints.save(state, metadata)
        checkpoints.wait()
        whole = saved.trees(checkpoints.folder)
        other = {"lora.rank": 3, "adversarial.weight": 0.0, "train.packed": packed}
        other = setup.first_state(config_of(**other), d, teacher)
        with pytest.raises(UserError, match="not a checkpoint of this config's networks"):
            checkpoints.restore(meshes.place(other, meshes.make_mesh()))
    assert jax.tree.structure(whole["ema"]) == jax.tree.structure(whole["state"]["generator"])
    assert packed or jax.tree.structure(whole["ema"]) == jax.tree.structure(average)
    assert [leaf.shape for leaf in jax.tree.leaves(whole["ema"])] == [leaf.shape for leaf in jax.tree.leaves(average)]
    sampler, average = Sampler.load(tmp_path, meshes.make_mesh()), unpack(average)
    expected = lora.merge(teacher, average)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), sampler.pipeline.params["unet"], expected)
    assert all(map(jnp.array_equal, jax.tree.leaves(sampler.lora), jax.tree.leaves(average)))
