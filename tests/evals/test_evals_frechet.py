"""The Fréchet distance against closed forms and against scipy's matrix root; sums of rows."""

import numpy as np
import pytest
import scipy.linalg

from dcae_jax.errors import UserError
from dcae_jax.evals import frechet
from dcae_jax.evals.frechet import Gaussian, Moments


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
    thin, round_ = (Gaussian(np.zeros(2), np.diag([1.0, v])) for v in (1e-12, 1.0))
    assert frechet.distance(thin, round_) == pytest.approx((1 - 1e-6) ** 2, rel=1e-12)
    point = Gaussian(np.zeros(2), np.zeros((2, 2)))
    assert frechet.distance(a, point) == pytest.approx(5 + 13, rel=1e-12)


def test_singular_covariances_and_rotations():
    """Two lines in a plane: 2 (1 - cos of the angle between them); a rotation changes nothing."""
    line = Gaussian(np.zeros(2), np.diag([1.0, 0.0]))
    for angle in (0.3, np.pi / 2):
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        other = Gaussian(np.zeros(2), turn @ line.covariance @ turn.T)
        expected = 2 * (1 - np.cos(angle))
        assert frechet.distance(line, other) == pytest.approx(expected, abs=1e-14)
    a, b = random_gaussian(3, 8, rank=3), random_gaussian(4, 8, rank=5)
    turn = scipy.linalg.qr(np.random.default_rng(5).normal(size=(8, 8)))[0]
    turned = [Gaussian(turn @ g.mean, turn @ g.covariance @ turn.T) for g in (a, b)]
    assert frechet.distance(*turned) == pytest.approx(frechet.distance(a, b), rel=1e-12)


def features(seed: int, n: int, dim: int, shift: float = 0.0) -> np.ndarray:
    """Not negative, skewed, of very different scales: as features after a ReLU and a mean."""
    gen = np.random.default_rng(seed)
    mixed = gen.gamma(0.7, 1.0, size=(n, dim)) @ (gen.normal(size=(dim, dim)) / dim**0.5)
    return np.abs(mixed * np.geomspace(1, 1e-3, dim) + shift).astype(np.float32)


def moments(*parts: np.ndarray) -> Moments:
    found = Moments.zeros(parts[0].shape[1])
    for part in parts:
        found.add(part)
    return found


def test_a_set_is_at_no_distance_from_itself_however_few_its_images():
    """40 vectors of 120 numbers, in another order: 81 variances are 0, and rounding is not.

    With eigenvalues of A B, each of which counts with its root, it would be -3e-8.
    """
    x = features(0, 40, 120)
    a = moments(x).gaussian()
    b = moments(*np.split(x[::-1], [1, 8, 25])).gaussian()
    assert np.abs(a.covariance - b.covariance).max() > 0  # rounding did differ
    assert frechet.distance(a, a) == pytest.approx(0, abs=1e-13)
    assert frechet.distance(a, b) == pytest.approx(0, abs=1e-13)
    moved = Gaussian(a.mean + 0.25, a.covariance)
    assert frechet.distance(moved, b) == pytest.approx(120 * 0.25**2, rel=1e-12)


def test_gaussian_of_rows_is_numpys():
    rows = np.random.default_rng(0).normal(3.0, 2.0, size=(50, 6)).astype(np.float32)
    for ddof in (0, 1):
        found = frechet.gaussian(rows, ddof=ddof)
        assert found.covariance.dtype == np.float64
        np.testing.assert_allclose(found.mean, rows.astype(np.float64).mean(0), rtol=1e-12)
        expected = np.cov(rows.astype(np.float64).T, ddof=ddof)
        np.testing.assert_allclose(found.covariance, expected, rtol=1e-10)
        np.testing.assert_allclose(
            moments(rows).gaussian(ddof=ddof).covariance, expected, rtol=1e-10
        )
    assert not frechet.gaussian(rows[:1], ddof=0).covariance.any()
    for of_one in (frechet.gaussian, lambda x: moments(x).gaussian()):
        with pytest.raises(UserError, match="1 image"):
            of_one(rows[:1])


def test_moments_do_not_depend_on_batches_order_or_processes():
    x, y = features(1, 500, 40), features(2, 500, 40, shift=0.1)
    whole, other = moments(x).gaussian(), moments(y).gaussian()
    expected = frechet.distance(whole, other)
    assert expected > 0.1
    shuffled = np.random.default_rng(3).permutation(x)
    for size in (1, 7, 64):
        found = moments(*(shuffled[i : i + size] for i in range(0, 500, size)))
        assert found.n == 500
        np.testing.assert_allclose(found.gaussian().covariance, whole.covariance, atol=1e-13)
        assert frechet.distance(found.gaussian(), other) == pytest.approx(expected, abs=1e-10)
    first, second = moments(x[:123]), moments(x[123:])
    first.merge(second)
    assert first.n == 500 and second.n == 377
    np.testing.assert_allclose(first.outer, moments(x).outer, rtol=1e-13)
    np.testing.assert_allclose(first.total, moments(x).total, rtol=1e-13)


def test_bad_numbers_are_told():
    x = features(4, 8, 3)
    x[2, 1], x[5, 0] = np.nan, np.inf
    with pytest.raises(UserError, match="2 of 8 images have features that are not finite"):
        moments(x)
    good = random_gaussian(0, 3)
    with pytest.raises(UserError, match=r"eigenvalue -2 .*none can be negative"):
        frechet.distance(good, Gaussian(np.zeros(3), np.diag([1.0, 3.0, -2.0])))
    with pytest.raises(ValueError, match="Gaussians of 3 and 4 numbers"):
        frechet.distance(good, random_gaussian(0, 4))
    # A model that gives one image only: what is left is rounding, of both signs.
    one = moments(np.full((50, 5), 0.3, np.float32)).gaussian()
    assert frechet.distance(one, one) == pytest.approx(0, abs=1e-12)
