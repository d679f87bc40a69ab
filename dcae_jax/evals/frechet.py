"""The Fréchet distance of two Gaussians, and how they are gathered; float64 on the host.

Covariances divide by n - `ddof`, as numpy names it: 1 wherever FID is computed (pytorch-fid,
torch-fidelity, ADM, DC-AE), 0 for the scores of small classes, where one row alone has one too.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Real

from dcae_jax.errors import UserError


class Gaussian(NamedTuple):
    """Mean and covariance."""

    mean: Float64[np.ndarray, " c"]
    covariance: Float64[np.ndarray, "c c"]


def gaussian(rows: Real[np.ndarray, "n c"], *, ddof: int = 1) -> Gaussian:
    """Of rows that are all there; in two passes."""
    _require(len(rows), ddof)
    rows = rows.astype(np.float64)
    mean = rows.mean(axis=0)
    away = rows - mean
    return Gaussian(mean, away.T @ away / (len(rows) - ddof))


@dataclass(slots=True)
class Moments:
    """Sums over rows that come one after another, or in several processes."""

    n: int
    total: Float64[np.ndarray, " c"]
    outer: Float64[np.ndarray, "c c"]

    @classmethod
    def zeros(cls, dim: int) -> "Moments":
        """Of no row."""
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    def add(self, features: Real[np.ndarray, "b c"]) -> None:
        """Counts further rows in; UserError if one of them is not finite."""
        require_finite(features)
        rows = features.astype(np.float64)
        self.n += len(rows)
        self.total += rows.sum(axis=0)
        self.outer += rows.T @ rows

    def merge(self, other: "Moments") -> None:
        """Counts the rows of `other` in."""
        self.n += other.n
        self.total += other.total
        self.outer += other.outer

    def gaussian(self, *, ddof: int = 1) -> Gaussian:
        """Of all rows; UserError if they are too few."""
        _require(self.n, ddof)
        mean = self.total / self.n
        return Gaussian(mean, (self.outer - self.n * np.outer(mean, mean)) / (self.n - ddof))


def _require(n: int, ddof: int) -> None:
    if n <= ddof:
        raise UserError(f"{n} image(s) have no covariance; give {ddof + 1} or more")


def require_finite(features: Real[np.ndarray, "n c"]) -> None:
    """UserError if there are features that are not finite."""
    bad = int((~np.isfinite(features).all(axis=1)).sum())
    if bad:
        raise UserError(
            f"{bad} of {len(features)} images have features that are not finite: look at these "
            "images (a diverged model?) and at the network that computed the features"
        )


def distance(a: Gaussian, b: Gaussian) -> float:
    """|mean difference|^2 + tr(A + B - 2 (A B)^(1/2)) (Dowson and Landau 1982).

    With A = L L', B = M M' the trace of the root is the sum of the singular values of L'M.  Roots
    are taken of A and of B only: where both are singular, their zeros, which rounding made 1e-16,
    count as 1e-16, and not as 1e-8 each as in a root of A B.  Equal ones may give -1e-13.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"Gaussians of {a.mean.size} and {b.mean.size} numbers")
    root = np.linalg.svd(_factor(a).T @ _factor(b), compute_uv=False).sum()
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * root
    return float(np.square(a.mean - b.mean).sum() + spread)


def _factor(of: Gaussian) -> Float64[np.ndarray, "c r"]:
    """L of L L' = covariance, without the columns that only rounding makes differ from zero."""
    values, vectors = np.linalg.eigh(of.covariance)
    # Sums in float32, as some references have them, leave 1e-7 of the second moment.
    if values[0] < -(1e-3 * values[-1] + 1e-6 * np.square(of.mean).sum()):
        raise UserError(
            f"a covariance has the eigenvalue {values[0]:.3g} (the largest is {values[-1]:.3g}), "
            "but none can be negative: its statistics are damaged, compute them anew"
        )
    kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])
