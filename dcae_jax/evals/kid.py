"""The kernel Inception distance (Binkowski et al. 2018), float64 on the host."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64

from dcae_jax.errors import UserError
from dcae_jax.evals.frechet import require_finite


class Kid(NamedTuple):
    """Mean and standard deviation (divided by their number) over the subsets."""

    mean: float
    std: float


def kid(
    samples: Float[np.ndarray, "n c"], reference: Float[np.ndarray, "m c"], *,
    subsets: int = 100, size: int = 1000, seed: int = 2020,
) -> Kid:  # fmt: skip
    """Squared maximum mean discrepancy under the kernel (x'y / c + 1)^3, unbiased, of subsets.

    Subsets are drawn as torch-fidelity draws them, with its defaults: of the samples first, then of
    the reference, each without replacement.  An estimate may be negative.
    """
    least = min(len(samples), len(reference))
    if least < size:
        raise UserError(
            f"KID takes subsets of {size} images, but there are {least}; give more images, or "
            "leave KID out"
        )
    require_finite(samples)
    require_finite(reference)
    gen, found = np.random.RandomState(seed), np.empty(subsets)
    for i in range(subsets):
        x = samples[gen.choice(len(samples), size, replace=False)]
        y = reference[gen.choice(len(reference), size, replace=False)]
        found[i] = _discrepancy(x.astype(np.float64), y.astype(np.float64))
    return Kid(float(found.mean()), float(found.std()))


def _discrepancy(x: Float64[np.ndarray, "n c"], y: Float64[np.ndarray, "n c"]) -> float:
    """The unbiased estimate: no vector is compared with itself."""
    n = len(x)
    within = sum((k := _kernel(v, v)).sum() - np.trace(k) for v in (x, y))
    return within / (n * (n - 1)) - 2.0 * _kernel(x, y).mean()


def _kernel(
    x: Float64[np.ndarray, "n c"], y: Float64[np.ndarray, "m c"]
) -> Float64[np.ndarray, "n m"]:
    base = x @ y.T
    base /= x.shape[1]
    base += 1.0
    return base * base * base
