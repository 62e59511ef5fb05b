"""The conditional GAN objective: three losses, gradient penalties exact or by differences, mix-and-match.

Logits come as one dense map per head. Every loss is a mean over locations, then over heads, then over samples, so that
its weight does not depend on how many heads there are (paper.md section 8, row 11).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Logits = Sequence[jax.Array]
"""One float32 map (B, h_i, w_i) per head."""
LOSSES = ("non_saturating", "hinge", "relativistic")


@dataclasses.dataclass(frozen=True)
class Penalty:
    """What holds D's slope at its inputs down.

    Attributes:
      exact: by second derivatives, in a lazy update of its own; otherwise by differences within D's own update.
      fake: of the generated latents too.
    """

    exact: bool
    fake: bool


PENALTIES = {
    "r1": Penalty(exact=True, fake=False),
    "r1_r2": Penalty(exact=True, fake=True),
    "approximate_r1": Penalty(exact=False, fake=False),
    "approximate_r1_r2": Penalty(exact=False, fake=True),
}


def _per_sample(maps: Logits, function: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Mean over heads of the mean over locations of function(logits): (B,)."""
    return jnp.mean(jnp.stack([jnp.mean(function(m), axis=(1, 2)) for m in maps]), axis=0)


def realness(maps: Logits) -> jax.Array:
    """Mean logit of each sample (B,): above zero means taken for real."""
    return _per_sample(maps, lambda logits: logits)


def _pairwise(real: Logits, fake: Logits) -> Logits:
    """Real minus fake logit of the same record, location by location."""
    return [r - f for r, f in zip(real, fake, strict=True)]


def generator_loss(loss: str, fake: Logits, real: Logits | None) -> jax.Array:
    """(B,): -log D(G) in softplus form, -D(G), or softplus(D(real) - D(G)), which alone looks at `real`.

    Those of arXiv 1406.2661, 1705.02894 and 1807.00734.
    """
    if loss == "relativistic":
        return _per_sample(_pairwise(real, fake), jax.nn.softplus)
    return _per_sample(fake, lambda logits: -logits if loss == "hinge" else jax.nn.softplus(-logits))


def discriminator_loss(loss: str, real: Logits, fake: Logits) -> jax.Array:
    """(B,): -log D(real) - log(1 - D(fake)) in softplus form, max(0, 1 - D(real)) + max(0, 1 + D(fake)), or
    softplus(D(fake) - D(real))."""
    if loss == "relativistic":
        return _per_sample(_pairwise(real, fake), lambda gap: jax.nn.softplus(-gap))
    cost = (lambda logits: jax.nn.relu(1.0 + logits)) if loss == "hinge" else jax.nn.softplus
    return _per_sample(real, lambda logits: cost(-logits)) + _per_sample(fake, cost)


def slopes(near: Logits, moved: Logits, sigma: float) -> jax.Array:
    """(B,): the squared difference of realness over sigma^2, for inputs that normal noise of that size has moved.

    For a small sigma its mean over the noise is the penalty of `r1`, ||d realness / d input||^2, so that one weight
    serves both (the difference of arXiv 2501.08316, section 4.3, which leaves the division to its weight).
    """
    return jnp.square((realness(moved) - realness(near)) / sigma)


def r1(
    realness_of: Callable[[Any, jax.Array], jax.Array], params: Any, latents: jax.Array, weight: float
) -> tuple[Any, jax.Array]:
    """The gradient of `weight` times the penalties' sum by `params`, and the penalty of each sample (N,).

    The penalty is ||g||^2, g = d realness / d latents, summed over pixels and channels (arXiv 1801.04406, eq. 9).
    `realness_of(params, latents)` maps latents (N, h, w, C) to (N,) without mixing samples. It is differentiated twice:
    build the discriminator with attention="twice".
    """
    realness = lambda params, latents: jnp.sum(realness_of(params, latents))  # noqa: E731
    latents = latents.astype(jnp.float32)
    slope = jax.grad(realness, argnums=1)(params, latents)

    def along_slope(params: Any) -> jax.Array:
        """g . slope, whose gradient is half the penalties' at g = slope.

        Backwards over a derivative in one direction: the activations of two forward passes, where backwards over
        backwards keeps those of a backward pass too.
        """
        return jax.jvp(lambda x: realness(params, x), (latents,), (slope,))[1]

    gradient = jax.grad(lambda params: 2.0 * weight * along_slope(params))(params)
    return gradient, jnp.sum(jnp.square(slope), axis=(1, 2, 3))


def first_of_each_group(x: jax.Array, groups: int) -> jax.Array:
    """One sample per logical group: (B, ...) to (groups, ...).

    Reshaped, not strided: `x[::k]` would gather the batch from all devices.
    """
    return x.reshape(groups, -1, *x.shape[1:])[:, 0]


def roll_in_groups(x: jax.Array, groups: int) -> jax.Array:
    """Each sample's value becomes that of its neighbour in the same group; nothing crosses a group's border."""
    return jnp.roll(x.reshape(groups, -1, *x.shape[1:]), 1, axis=1).reshape(x.shape)


def mix_and_match(
    key: jax.Array,
    portion: float,
    groups: int,
    generated: jax.Array,
    latents: jax.Array,
    noise: jax.Array,
    text: Any,
    input_ids: jax.Array,
    *,
    z_conditioning: bool = True,
) -> tuple[jax.Array, jax.Array, Any, dict[str, jax.Array]]:
    """Turns a portion of the fake triples into real latents with the wrong condition; their label stays fake.

    Of the replaced samples one half gets a neighbour's real latent (keeping z and c), a quarter keeps its own real
    latent under a neighbour's text, a quarter under a neighbour's noise (paper.md section 8, row 12). Neighbours are
    taken inside a logical group. A sample whose neighbour has the same caption is left alone where the swap would not
    make it wrong. A discriminator that sees no noise gets no foreign noise, and no latent of the same caption.

    Args:
      key: a typed PRNG key.
      portion: share of samples replaced, 0 to 1.
      groups: logical groups of the batch.
      generated, latents, noise: (B, h, w, C); generated is G(noise, text), latents the teacher's.
      text: a tree of arrays (B, ...): what the networks take from the caption.
      input_ids: (B, L), to tell equal captions.
      z_conditioning: whether the discriminator sees the noise.

    Returns:
      (latents, noise, text) of the discriminator's fake half, and by name of what was swapped ("latents", "noise",
      "text") which samples they are, bool (B,).
    """
    draw = jax.random.uniform(key, (generated.shape[0],))
    same_caption = jnp.all(input_ids == roll_in_groups(input_ids, groups), axis=-1)
    swap_latents = (draw < 0.5 * portion) & (z_conditioning | ~same_caption)
    swap_text = (draw >= 0.5 * portion) & (draw < 0.75 * portion) & ~same_caption
    swap_noise = (draw >= 0.75 * portion) & (draw < portion) & z_conditioning
    column = lambda mask, like: mask.reshape(-1, *[1] * (like.ndim - 1))  # noqa: E731
    mixed = jnp.where(column(swap_text | swap_noise, latents), latents, generated)
    mixed = jnp.where(column(swap_latents, latents), roll_in_groups(latents, groups), mixed)
    noise = jnp.where(column(swap_noise, noise), roll_in_groups(noise, groups), noise)
    text = jax.tree.map(lambda x: jnp.where(column(swap_text, x), roll_in_groups(x, groups), x), text)
    return mixed, noise, text, {"latents": swap_latents, "noise": swap_noise, "text": swap_text}
