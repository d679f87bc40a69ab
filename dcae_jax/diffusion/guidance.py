"""Guidance wraps a denoiser; samplers do not know of it."""

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dcae_jax.diffusion.process import Latents, Prediction, Times

Denoiser = Callable[[Latents, Times, Any], Prediction]  # (x_t, t, cond); see Process.denoiser
Denoise = Callable[[Latents, Times], Prediction]  # with cond bound: what samplers take


class Reference(enum.Enum):
    """What the prediction is pushed away from."""

    null_class = "null_class"  # classifier-free guidance (arXiv 2207.12598)
    weak_model = "weak_model"  # autoguidance (arXiv 2406.02507): a second denoiser, same classes


@dataclass(slots=True)
class GuidanceConfig:
    """reference + scale (prediction - reference).  scale = 1: off, and half of the cost."""

    scale: float = 1.0  # published: 1.3 (DiT-XL f32), 1.5; U-ViT's own configs write scale - 1
    reference: Reference = Reference.null_class
    # Guided where start <= t <= stop (arXiv 2404.07724); t = 0 is data.  Published: everywhere.
    start: float = 0.0
    stop: float = 1.0
    channels: int = 0  # the first so many are guided; 0: all (published); the original DiT: 3

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        found = []
        if not (math.isfinite(self.scale) and self.scale >= 0):
            found.append(f"guidance.scale = {self.scale} is not 0 or more; 1 is off, 1.5 is usual")
        if not 0.0 <= self.start < self.stop <= 1.0:
            found.append(
                f"guidance.start = {self.start} and stop = {self.stop} are no interval of times "
                "within [0, 1]; 0 and 1 guide everywhere"
            )
        if self.channels < 0:
            found.append(f"guidance.channels = {self.channels} is negative; 0 guides all of them")
        return found


def guided(
    cfg: GuidanceConfig, denoiser: Denoiser, cond: Any, null: Any, weak: Denoiser | None = None
) -> Denoise:
    """The denoiser with its conditions bound and guidance applied.

    `cond` and `null` are pytrees with a leading batch axis (`null_class` makes the latter).  The
    conditional and the unconditional half are one call on 2b examples; outside the interval, and
    with scale 1, there is one call on b.  `weak` is the second denoiser of autoguidance.
    """
    reference = Reference(cfg.reference)
    if (reference is Reference.weak_model) != (weak is not None):
        raise ValueError(f"guidance.reference = {reference.value}, second denoiser: {weak}")

    def plain(x: Latents, t: Times) -> Prediction:
        return denoiser(x, t, cond)

    def both(x: Latents, t: Times) -> tuple[Prediction, Prediction]:
        if weak is not None:
            return denoiser(x, t, cond), weak(x, t, cond)
        twice = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, null)
        found = denoiser(jnp.concatenate([x, x]), jnp.concatenate([t, t]), twice)
        n = x.shape[0]
        return jax.tree.map(lambda a: a[:n], found), jax.tree.map(lambda a: a[n:], found)

    def guide(x: Latents, t: Times) -> Prediction:
        return _push(cfg, *both(x, t), _inside(cfg, t))

    def within(x: Latents, t: Times) -> Prediction:
        return jax.lax.cond(jnp.any(_inside(cfg, t)), guide, plain, x, t)

    if cfg.scale == 1.0:
        return plain
    return guide if (cfg.start, cfg.stop) == (0.0, 1.0) else within


def null_class(cond: dict[str, Array], classes: int) -> dict[str, Array]:
    """Conditions without a class: the label becomes `classes`, the index after the last one."""
    return cond | {"label": jnp.full_like(cond["label"], classes)}


def _inside(cfg: GuidanceConfig, t: Times) -> Bool[Array, " b"]:
    return (cfg.start <= t) & (t <= cfg.stop)


def _push(
    cfg: GuidanceConfig, found: Prediction, reference: Prediction, inside: Bool[Array, " b"]
) -> Prediction:
    """x0, eps and v are linear in each other at one (x_t, t): guiding one guides all."""
    scale = jnp.where(inside, cfg.scale, 1.0)[:, None, None, None]

    def one(a: Float[Array, "b h w c"], b: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        pushed = b + scale * (a - b)
        if not cfg.channels:
            return pushed
        return jnp.concatenate([pushed[..., : cfg.channels], a[..., cfg.channels :]], axis=-1)

    # The learned variance stays that of the conditional half, as in DiT.
    return Prediction(
        one(found.x0, reference.x0), one(found.eps, reference.eps), found.variance_mix
    )
