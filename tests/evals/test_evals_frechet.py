"""The Fréchet distance against closed forms and against scipy's matrix root."""

import numpy as np
import pytest
import scipy.linalg

from dcae_jax.evals import frechet
from dcae_jax.evals.frechet import Gaussian


def random_gaussian(seed: int, dim: int, rank: int | None = None) -> Gaussian:
    gen = np.random.default_rng(seed)
    factor = gen.normal(size=(dim, rank or dim))
    return Gaussian(gen.normal(size=dim), factor @ factor.T / dim)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_agrees_with_the_formula_by_scipy(seed):
    a, b = random_gaussian(seed, 12), random_gaussian(seed + 10, 12)
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root)
    # float64; the root of a product that is not symmetric loses a few digits.
    assert frechet.distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet.distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_closed_forms():
    """Diagonal covariances: squared differences of means and of deviations."""
    a = Gaussian(np.array([1.0, 2.0]), np.diag([4.0, 9.0]))
    b = Gaussian(np.array([4.0, -2.0]), np.diag([1.0, 25.0]))
    assert frechet.distance(a, b) == pytest.approx(9 + 16 + 1 + 4, rel=1e-12)
    assert frechet.distance(a, a) == pytest.approx(0, abs=1e-12)
    point = Gaussian(np.zeros(2), np.zeros((2, 2)))
    assert frechet.distance(a, point) == pytest.approx(5 + 13, rel=1e-12)


def test_singular_covariances_and_rotations():
    """Two lines in a plane: 2 (1 - cos of the angle between them); a rotation changes nothing."""
    line = Gaussian(np.zeros(2), np.diag([1.0, 0.0]))
    for angle in (0.3, np.pi / 2):
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        other = Gaussian(np.zeros(2), turn @ line.covariance @ turn.T)
        expected = 2 * (1 - np.cos(angle))
        # The root of a zero that rounding made 1e-17 is 3e-9.
        assert frechet.distance(line, other) == pytest.approx(expected, abs=1e-7)
    a, b = random_gaussian(3, 8, rank=3), random_gaussian(4, 8, rank=5)
    turn = scipy.linalg.qr(np.random.default_rng(5).normal(size=(8, 8)))[0]
    turned = [Gaussian(turn @ g.mean, turn @ g.covariance @ turn.T) for g in (a, b)]
    assert frechet.distance(*turned) == pytest.approx(frechet.distance(a, b), rel=1e-6)


def test_gaussian_of_rows_is_numpys():
    rows = np.random.default_rng(0).normal(3.0, 2.0, size=(50, 6)).astype(np.float32)
    found = frechet.gaussian(rows, ddof=0)
    assert found.covariance.dtype == np.float64
    np.testing.assert_allclose(found.mean, rows.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        found.covariance, np.cov(rows.astype(np.float64).T, bias=True), rtol=1e-10
    )
    assert not frechet.gaussian(rows[:1], ddof=0).covariance.any()
