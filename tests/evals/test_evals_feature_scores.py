"""KID, Inception Score, precision and recall against closed forms and slow second versions."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from dcae_jax.errors import UserError
from dcae_jax.evals.inception_score import ADM, TORCH_FIDELITY, Splits, inception_score
from dcae_jax.evals.kid import kid
from dcae_jax.evals.precision_recall import _SIDE, precision_recall

IN_ORDER = Splits(size=80)


def features(seed: int, n: int, dim: int = 6, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).gamma(2.0, 0.5, size=(n, dim)).astype(np.float32) + shift


# --------------------------------------------------------------------------------------------- KID


def slow_discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    """One pair after another."""

    def mean(a, b, pairs):
        return np.mean([(float(a[i] @ b[j]) / a.shape[1] + 1) ** 3 for i, j in pairs])

    n = range(len(x))
    apart = [(i, j) for i in n for j in n if i != j]
    return mean(x, x, apart) + mean(y, y, apart) - 2 * mean(x, y, [(i, j) for i in n for j in n])


def test_kid_is_its_definition():
    """A subset as large as both sets is all of them, whatever is drawn."""
    x, y = features(0, 20).astype(np.float64), features(1, 20, shift=0.3).astype(np.float64)
    found = kid(x, y, subsets=3, size=20)
    assert found.mean == pytest.approx(slow_discrepancy(x, y), rel=1e-12)
    assert found.std < 1e-12
    one = kid(x, y, subsets=1, size=7, seed=5)
    gen = np.random.RandomState(5)
    chosen = [v[gen.choice(20, 7, replace=False)] for v in (x, y)]
    assert one.mean == pytest.approx(slow_discrepancy(*chosen), rel=1e-12)


def test_kid_of_equal_distributions_is_zero_on_the_average():
    found = kid(features(2, 4000), features(3, 4000), subsets=50, size=200)
    assert abs(found.mean) < 4 * found.std / np.sqrt(50)
    moved = kid(features(2, 4000), features(3, 4000, shift=0.2), subsets=50, size=200)
    assert moved.mean > 20 * moved.std / np.sqrt(50)


def test_kid_needs_as_many_images_as_a_subset_has():
    with pytest.raises(UserError, match="subsets of 1000 images, but there are 999"):
        kid(features(0, 1000), features(1, 999))
    bad = features(0, 30)
    bad[3] = np.nan
    with pytest.raises(UserError, match="1 of 30 images"):
        kid(features(1, 30), bad, size=10)


# ---------------------------------------------------------------------------------- Inception Score


def test_inception_score_closed_forms():
    """One class each, all k equally often: k.  Always the same answer: 1."""
    sure = 50.0 * np.eye(10, dtype=np.float32)[np.arange(800) % 10]
    found = inception_score(sure, IN_ORDER)
    assert found.mean == pytest.approx(10, rel=1e-9) and found.std < 1e-9
    assert 9 < inception_score(sure).mean < 9.9  # the 80 of a split are not balanced
    for one_class_a_split in (np.tile(sure[:1], (30, 1)), np.repeat(sure[:10], 80, axis=0)):
        found = inception_score(one_class_a_split, IN_ORDER)
        assert found.mean == pytest.approx(1, abs=1e-12)
    # What underflows in all images counts nothing; adding to all logits changes nothing.
    far = np.concatenate([sure, np.full((800, 1), -2000, np.float32)], axis=1)
    assert inception_score(far + 500, IN_ORDER).mean == pytest.approx(10, rel=1e-6)


def test_inception_score_is_its_definition():
    logits = np.random.default_rng(0).normal(0, 2, size=(103, 12)).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    p = (p / p.sum(1, keepdims=True))[np.random.RandomState(2020).permutation(103)]
    scores = []
    for i in range(10):
        part = p[i * 103 // 10 : (i + 1) * 103 // 10]
        mean = part.mean(0)
        scores.append(np.exp(np.mean([sum(q * np.log(q / mean)) for q in part])))
    found = inception_score(logits)
    assert found.mean == pytest.approx(np.mean(scores), rel=1e-12)
    assert found.std == pytest.approx(np.std(scores), rel=1e-9)
    assert inception_score(logits, ADM).std is None, "one split has no deviation"
    with pytest.raises(UserError, match="10 images or more, got 9"):
        inception_score(logits[:9])


def test_splits_of_both_evaluators():
    """torch-fidelity: ten shuffled parts; ADM: 5000 after 5000, the last with what is left."""
    parts = TORCH_FIDELITY.of(103)
    assert [len(p) for p in parts] == [10, 10, 10, 11, 10, 10, 11, 10, 10, 11]
    order = np.random.RandomState(2020).permutation(103)
    np.testing.assert_array_equal(np.concatenate(parts), order)
    assert [(p[0], p[-1]) for p in ADM.of(12_345)] == [(0, 4999), (5000, 9999), (10_000, 12_344)]
    assert (str(TORCH_FIDELITY), str(ADM)) == (
        "10 splits, shuffled by 2020", "splits of 5000, in order",
    )  # fmt: skip


# ----------------------------------------------------------------------------- precision and recall


def slow_precision_recall(samples: np.ndarray, reference: np.ndarray, k: int) -> tuple[float, ...]:
    """All distances in float64, sorted."""

    def inside(points, centres):
        radii = np.sort(cdist(centres, centres), axis=1)[:, k]
        return float((cdist(points, centres) <= radii).any(axis=1).mean())

    return inside(samples, reference), inside(reference, samples)


@pytest.mark.parametrize(("n", "m", "k"), [(150, 90, 3), (5, 200, 1), (40, 7, 2)])
def test_precision_and_recall_are_their_definition(n, m, k):
    x, y = features(4, n, 3), features(5, m, 3, shift=0.5)
    found = precision_recall(x, y, k=k)
    assert found == slow_precision_recall(x, y, k)
    assert 0 < found.precision < 1 and 0 < found.recall < 1


def test_precision_and_recall_over_several_blocks():
    """More vectors than a block has: the last block is filled up, and that changes nothing.

    Nearest neighbours stand at the same place of two blocks: only within a block is that the same
    vector.
    """
    half = features(6, _SIDE, 4)
    y = np.concatenate([half, half + features(7, _SIDE, 4) / 20])
    x = half[:1000] + features(8, 1000, 4) / 20
    x = np.concatenate([x, features(9, _SIDE - 991, 4, shift=0.2)])
    found = precision_recall(x, y, k=1)
    assert found == slow_precision_recall(x, y, 1)
    assert 0.1 < found.precision < 0.9 and 0.1 < found.recall < 0.9


def test_far_from_the_origin_distances_are_as_exact():
    x, y = features(8, 200, 5), features(9, 200, 5, shift=0.3)
    found = precision_recall(x.astype(np.float64) + 1000, y.astype(np.float64) + 1000)
    assert found == precision_recall(x, y)


def test_copies_are_inside():
    """Four copies of each image: the radius is 0, and only the same image is inside."""
    x = np.repeat(features(10, 50, 64), 4, axis=0)
    assert precision_recall(x, x) == (1, 1)
    half = np.concatenate([x[:100], features(11, 100, 64)])
    assert precision_recall(half, x) == (0.5, slow_precision_recall(half, x, 3)[1])
    far = precision_recall(x + 100, x)
    assert far == (0, 0)


def test_too_few_or_bad_features_are_told():
    with pytest.raises(UserError, match="3 neighbours of each image, but there are 3 images"):
        precision_recall(features(0, 3), features(1, 9))
    bad = features(0, 9)
    bad[4, 1] = np.inf
    with pytest.raises(UserError, match="1 of 9 images"):
        precision_recall(features(1, 9), bad)
