"""Randomness is folded from (seed, step, names); no generator state is kept anywhere."""

import zlib

import jax
from jaxtyping import Array, Int, PRNGKeyArray


def key(seed: int, step: int | Int[Array, ""] = 0, *names: str) -> PRNGKeyArray:
    """The key of one draw: a function of the run's seed, the step and what the draw is for."""
    k = jax.random.fold_in(jax.random.key(seed), step)
    for name in names:
        k = jax.random.fold_in(k, zlib.crc32(name.encode()))
    return k
