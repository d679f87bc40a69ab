"""Classes of samples: what torch draws, stored; `make parity` compares them live."""

import numpy as np
import pytest

from dcae_jax.evals.labels import balanced_labels, random_labels

# torch.randint(0, classes, (8,), generator=torch.Generator().manual_seed(seed)), PyTorch 2.13.0.
TORCH = {
    (1000, 0): [44, 239, 933, 760, 963, 379, 427, 503],
    (1000, 2020): [720, 976, 827, 622, 355, 211, 501, 259],
    (10, 7): [5, 2, 1, 6, 3, 7, 7, 9],
    (1, 3): [0, 0, 0, 0, 0, 0, 0, 0],
    (2**28 - 1, 5): [148147046, 236996814, 250105852, 80864970, 82545641, 220060795, 187307422,
                     180152408],
    (1000, 2**32 - 1): [371, 978, 476, 639, 820, 800, 942, 114],
}  # fmt: skip


@pytest.mark.parametrize(("classes", "seed"), TORCH)
def test_random_labels_are_those_of_torch(classes, seed):
    assert random_labels(8, classes, seed).tolist() == TORCH[classes, seed]


def test_random_labels_of_the_evaluation():
    """50,000 of 1000: the first do not depend on how many follow; each class about 50 times."""
    found = random_labels(50_000, 1000, 0)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found[:100], random_labels(100, 1000, 0))
    counts = np.bincount(found, minlength=1000)
    assert 20 <= counts.min() and counts.max() <= 85  # 50 +- 7, by 4.5 deviations
    assert (random_labels(100, 1000, 1) != found[:100]).any()
    for classes, seed in ((0, 0), (2**28, 0), (3, -1), (3, 2**32)):
        with pytest.raises(ValueError, match=f"{classes} classes"):
            random_labels(4, classes, seed)


def test_balanced_labels():
    assert balanced_labels(7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert set(np.bincount(balanced_labels(50_000, 1000))) == {50}
