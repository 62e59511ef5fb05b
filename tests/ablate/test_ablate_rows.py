"""The rows as data: the chain is cumulative, and each row really is another network, step or loss."""

import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from d2g_jax.ablate.rows import ABLATIONS
from d2g_jax.ablate.students import check_config, images_per_second, last_phase, student_config
from d2g_jax.config.configuration import read_config
from d2g_jax.digits.config import get_config
from d2g_jax.losses.lpips import DecodedLPIPS
from d2g_jax.losses.perceptual import LatentLPIPS
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.runs import flatten
from d2g_jax.train import setup
from d2g_jax.train.programs import Programs, iteration
from d2g_jax.train.state import create_state
from d2g_jax.train.step import d_step

DISCRIMINATOR, LOSSES, LORA, ADVERSARY = map(ABLATIONS.__getitem__, ("discriminator", "losses", "lora", "adversary"))

SEED = 7


@functools.cache
def pipeline():
    return Pipeline.load(get_config().pipeline)


@functools.cache
def built(ablation, number):
    """(config, static half, frozen parameters) of a row."""
    config = student_config(get_config(), ablation.rows[number], SEED)
    manifest = SimpleNamespace(first_timestep=999, seed=0, text_shapes={})
    return config, *setup.build(config, pipeline(), manifest)


def test_the_chain_takes_one_thing_less_away_at_every_row():
    changes = [set(row.changes) for row in DISCRIMINATOR.rows]
    assert all(after < before for before, after in itertools.pairwise(changes))
    assert changes[0] == set(DISCRIMINATOR.switches)
    assert changes[-1] == set()


@pytest.mark.parametrize("name", ["digits", "sd15", "sd21", "sdxl"])
@pytest.mark.parametrize("ablation", [LOSSES, DISCRIMINATOR, LORA, ADVERSARY], ids=lambda a: a.name)
def test_rows_change_what_they_say_and_nothing_else(name, ablation, request):
    config = read_config(request.config.rootpath / "configs" / f"{name}.py")
    check_config(config, ablation)
    own = {"name", "seed", "train.keep_checkpoints", "train.keep_best"}
    before, students = flatten(config.to_dict()), []
    for row in ablation.rows:
        after = flatten(student_config(config, row, SEED).to_dict())
        assert {key for key in before if before[key] != after[key]} - own <= {key for key, _ in row.changes}
        assert all(after[key] == value for key, value in row.changes)
        assert after["seed"] == SEED
        students.append({key: value for key, value in after.items() if key not in own})
    assert all(a != b for a, b in itertools.combinations(students, 2))
    assert before == flatten(config.to_dict())


def test_what_the_discriminator_of_each_row_is_made_of():
    networks = [built(DISCRIMINATOR, number)[1].discriminator for number in range(6)]
    assert networks[0] is None
    parts = [{name: len(network.abstract().get(name, {})) for name in PARTS} for network in networks[1:]]
    levels = len(pipeline().unet.config.block_out_channels)
    plain, full = {"unet": 1, "noise_in": 0, "latent_in": 0, "heads": 1}, {"latent_in": levels - 1, "heads": 3 * levels}
    plain["unet"] = len(networks[1].abstract()["unet"])
    with_z = plain | {"noise_in": 1}
    assert parts == [plain, with_z, with_z, with_z | full, with_z | full]


PARTS = ("unet", "noise_in", "latent_in", "heads")


def updates_of(config, d, _):
    """The names of the updates of an iteration at the end of training."""
    made = []

    def step(name, *results):
        def run(frozen, state, batch, *generated):
            made.append(name)
            return (state, *results, {})

        return run

    state = create_state({}, SimpleNamespace(init=lambda params: {}))
    programs = Programs(
        step("regression", None), step("adversarial", None), step("d"), d.discriminator_r1 and step("r1")
    )
    interval = config.train.batch_size * config.adversarial.r1_interval
    iteration(config, programs, None, state, {}, config.train.images // interval * interval)
    return made


def test_the_updates_of_each_row():
    assert [updates_of(*built(DISCRIMINATOR, number)) for number in range(6)] == [
        ["regression"],
        ["adversarial", "d"],
        ["adversarial", "d"],
        ["adversarial", "d", "r1"],
        ["adversarial", "d", "r1"],
        ["adversarial", "d", "r1"],
    ]
    assert {tuple(updates_of(*built(LOSSES, number))) for number in range(5)} == {("regression",)}


def test_approximate_penalties_have_no_second_network():
    exact = [built(ADVERSARY, number)[1] for number in range(len(ADVERSARY.rows))]
    lacking = {row.name for row, d in zip(ADVERSARY.rows, exact, strict=True) if d.discriminator_r1 is None}
    assert lacking == {"relativistic_ar1", "relativistic_ar1_ar2", "ar1", "ar1_ar2"}


def test_only_the_last_row_shows_d_mismatched_triples():
    metrics = []
    for number in (4, 5):
        config, d, frozen = built(DISCRIMINATOR, number)
        batch = {
            "id": jax.ShapeDtypeStruct((config.train.batch_size,), jnp.uint32),
            "input_ids": jax.ShapeDtypeStruct((config.train.batch_size, pipeline().token_length), jnp.int32),
            "latents": jax.ShapeDtypeStruct((config.train.batch_size, 4, 8, 8), jnp.float16),
        }
        generated = jax.ShapeDtypeStruct((config.train.batch_size, 8, 8, 4), jnp.float32)

        def run(batch, generated, d=d, frozen=frozen):
            adversary = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), d.discriminator.abstract())
            state = create_state({}, SimpleNamespace(init=lambda params: {}), adversary, d.discriminator_optimizer)
            return d_step(d, frozen, state, batch, generated)[1]

        metrics.append(set(jax.eval_shape(run, batch, generated)))
    assert metrics[1] - metrics[0] == {"logit_gap_latents", "logit_gap_noise", "logit_gap_text"}
    assert metrics[0] < metrics[1]


def test_every_loss_is_another_function():
    kinds = [type(built(LOSSES, number)[2].metric) for number in range(5)]
    assert kinds == [type(None), type(None), DecodedLPIPS, LatentLPIPS, LatentLPIPS]
    a, b = jax.random.normal(jax.random.key(0), (2, 2, 8, 8, 4))
    values = []
    for number in range(5):
        _, d, frozen = built(LOSSES, number)
        loss = jax.jit(d.regression)
        values += [loss(frozen.metric, jax.random.key(key), a, b) for key in (1, 2)]
        assert values[-1].shape == (2,)
        assert (values[-1] > 0).all()
    same = [bool(jnp.array_equal(one, other)) for one, other in zip(values[::2], values[1::2], strict=True)]
    assert same == [True, True, True, True, False]  # only the ensemble draws
    assert len({float(value[0]) for value in values}) == 6


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("discriminator", {"adversarial.weight": 0.0}, "adversarial.weight is 0.0 .* '[+] diffusion D' would be that"),
        ("discriminator", {"adversarial.r1_gamma": 0.0}, "--config.adversarial.r1_gamma another value"),
        ("discriminator", {"adversarial.mix_and_match": 0.0}, "'[+] mix-and-match' would be that before it"),
        ("discriminator", {"discriminator.z_conditioning": False}, "'[+] z conditioning'"),
        ("discriminator", {"discriminator.multiscale_heads": False}, "'[+] multi-scale'"),
        ("discriminator", {"train.images": 2048}, "train.images=2048: .* '[+] diffusion D' begins after 2048"),
        ("discriminator", {"train.log_every": 2048}, "train.log_every=2048: .* give at most 1024"),
    ],
)
def test_configs_whose_rows_would_not_differ_are_refused(name, changes, message):
    config = get_config()
    check_config(config, DISCRIMINATOR)
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        check_config(config, DISCRIMINATOR)
    check_config(config, LOSSES)  # which has no discriminator


@pytest.mark.parametrize("images", [0, -8])
@pytest.mark.parametrize("ablation", [LOSSES, DISCRIMINATOR], ids=lambda ablation: ablation.name)
def test_students_of_no_images_are_refused(ablation, images):
    config = get_config()
    config.train.images = images
    with pytest.raises(UserError, match=f"^train.images={images}: the students would not be trained; give 1 or more$"):
        check_config(config, ablation)


def test_throughput_is_that_of_the_last_phase():
    seconds = [1.0, 2.0, 6.0, 8.0, 20.0, 22.0]  # 100 images each; at 500 a picture was drawn
    lines = [{"images": 100 * i, "seconds": s} for i, s in enumerate(seconds, start=1)]
    assert images_per_second(lines, 0) == 50.0
    assert images_per_second(lines, 200) == pytest.approx((25.0 + 50.0) / 2)
    assert images_per_second(lines[:1], 0) == 100.0
    assert last_phase(built(DISCRIMINATOR, 5)[0]) == 1536 + 512
    assert last_phase(built(DISCRIMINATOR, 0)[0]) == 0
