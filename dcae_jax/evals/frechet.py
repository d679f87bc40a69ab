"""The Fréchet distance of two Gaussians, float64 on the host."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Real


class Gaussian(NamedTuple):
    """Mean and covariance."""

    mean: Float64[np.ndarray, " c"]
    covariance: Float64[np.ndarray, "c c"]


def gaussian(rows: Real[np.ndarray, "n c"]) -> Gaussian:
    """Of the rows; the covariance is theirs (divided by n), so that one row alone has one too."""
    rows = rows.astype(np.float64)
    mean = rows.mean(axis=0)
    away = rows - mean
    return Gaussian(mean, away.T @ away / len(rows))


def distance(a: Gaussian, b: Gaussian) -> float:
    """|mean difference|^2 + tr(A + B - 2 (A B)^(1/2)) (Dowson and Landau 1982).

    (A B)^(1/2) has the trace of the root of the symmetric A^(1/2) B A^(1/2), whose eigenvalues are
    real also where a covariance is singular.
    """
    root = _root(a.covariance)
    cross = np.linalg.eigvalsh(root @ b.covariance @ root)
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    spread = traces - 2 * np.sqrt(np.maximum(cross, 0)).sum()
    return float(np.square(a.mean - b.mean).sum() + spread)


def _root(matrix: Float[np.ndarray, "c c"]) -> Float64[np.ndarray, "c c"]:
    """The symmetric root; eigenvalues that rounding made negative count as 0."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
