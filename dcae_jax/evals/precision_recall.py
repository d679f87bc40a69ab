"""Improved precision and recall (Kynkäänniemi et al. 2019), distances in blocks on the device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Float64

from dcae_jax.errors import UserError
from dcae_jax.evals.frechet import require_finite

_SIDE = 2048  # vectors of a block, the last one filled up: one program for any number of images


class PrecisionRecall(NamedTuple):
    """The share of samples inside the reference's manifold, of the reference inside theirs."""

    precision: float
    recall: float


def precision_recall(
    samples: Float[np.ndarray, "n c"], reference: Float[np.ndarray, "m c"], *, k: int = 3
) -> PrecisionRecall:
    """A vector is inside a manifold if the ball around one of its points holds it.

    A ball reaches to the k-th neighbour in the same set, the point itself not counted, and that
    distance is inside (ADM's evaluator, torch-fidelity).  Float32; never more than one block of
    distances is held.
    """
    least = min(len(samples), len(reference))
    if least <= k:
        raise UserError(
            f"precision and recall look at {k} neighbours of each image, but there are {least} "
            f"images; give {k + 1} or more on both sides"
        )
    require_finite(samples)
    require_finite(reference)
    centre = reference.mean(axis=0, dtype=np.float64)
    ours, theirs = (_blocks(x, centre) for x in (samples, reference))
    precision = _share(ours, theirs, _radii(theirs, k), len(samples))
    return PrecisionRecall(precision, _share(theirs, ours, _radii(ours, k), len(reference)))


class _Block(NamedTuple):
    """Vectors with their squared norms; infinite where there is none, so it is near nothing."""

    vectors: Float32[Array, "b c"]
    norms: Float32[Array, " b"]


def _blocks(vectors: Float[np.ndarray, "n c"], centre: Float64[np.ndarray, " c"]) -> list[_Block]:
    """Around 0, so that |x|^2 + |y|^2 - 2 x'y cancels as little as it can."""
    found = []
    for start in range(0, len(vectors), _SIDE):
        part = (vectors[start : start + _SIDE] - centre).astype(np.float32)
        norms = np.square(part.astype(np.float64)).sum(axis=1).astype(np.float32)
        empty = _SIDE - len(part)
        part = np.pad(part, ((0, empty), (0, 0)))
        norms = np.pad(norms, (0, empty), constant_values=np.inf)
        found.append(_Block(jnp.asarray(part), jnp.asarray(norms)))
    return found


def _radii(blocks: list[_Block], k: int) -> list[Float32[Array, " b"]]:
    """The squared distance of each vector to its k-th neighbour; negative where there is none."""
    found = []
    for i, rows in enumerate(blocks):
        nearest = jnp.full((_SIDE, k), jnp.inf)
        for j, columns in enumerate(blocks):
            nearest = _nearer(nearest, rows, columns, i == j)
        found.append(jnp.where(jnp.isfinite(rows.norms), nearest[:, -1], -1.0))
    return found


def _share(
    points: list[_Block], centres: list[_Block], radii: list[Float32[Array, " b"]], n: int
) -> float:
    """How many of the n points are in a ball."""
    found = []
    for rows in points:
        inside = jnp.zeros(_SIDE, bool)
        for columns, reach in zip(centres, radii, strict=True):
            inside = _or_inside(inside, rows, columns, reach)
        found.append(inside)
    return float(np.concatenate([np.asarray(part) for part in found])[:n].mean())


@jax.jit
def _nearer(
    nearest: Float32[Array, "b k"], rows: _Block, columns: _Block, same: Bool[Array, ""] | bool
) -> Float32[Array, "b k"]:
    """The k smallest squared distances so far, ascending; `same`: a vector does not meet itself."""
    squares = jnp.where(same & jnp.eye(_SIDE, dtype=bool), jnp.inf, _squares(rows, columns))
    k = nearest.shape[1]
    best = -jax.lax.top_k(-squares, k)[0]
    return jnp.sort(jnp.concatenate([nearest, best], axis=1), axis=1)[:, :k]


@jax.jit
def _or_inside(
    inside: Bool[Array, " b"], rows: _Block, columns: _Block, radii: Float32[Array, " b"]
) -> Bool[Array, " b"]:
    """Whether a row was or is in the ball around a column."""
    return inside | (_squares(rows, columns) <= radii).any(axis=1)


def _squares(rows: _Block, columns: _Block) -> Float32[Array, "b b"]:
    products = jnp.matmul(rows.vectors, columns.vectors.T, precision="highest")
    return rows.norms[:, None] + columns.norms - 2.0 * products
