"""Bicubic and PCA: properties that only the right formulas have."""

import numpy as np
import pytest
from PIL import Image

from dcae_jax.errors import UserError
from dcae_jax.evals import baselines


def _images(n: int, h: int, w: int, seed: int = 0) -> np.ndarray:
    """Smooth random images with some noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (n, h // 8 + 2, w // 8 + 2, 3)).astype(np.uint8)
    big = [np.asarray(Image.fromarray(c).resize((w, h), Image.Resampling.BILINEAR)) for c in coarse]
    noisy = np.stack(big) + rng.normal(0, 6, (n, h, w, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def _error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean((a.astype(np.float64) - b) ** 2))


def test_blocks_and_back() -> None:
    images = _images(2, 16, 24)
    blocks = baselines.to_blocks(images, 8)
    assert blocks.shape == (2 * 2 * 3, 8 * 8 * 3)
    np.testing.assert_array_equal(blocks[4].reshape(8, 8, 3), images[0, 8:16, 8:16])
    np.testing.assert_array_equal(baselines.from_blocks(blocks, images.shape, 8), images)


def test_bicubic_of_a_constant_is_that_constant() -> None:
    images = np.zeros((2, 64, 32, 3), np.uint8) + np.array([3, 128, 255], np.uint8)
    np.testing.assert_array_equal(baselines.bicubic(images, 32), images)


def test_bicubic_is_pillows_own_up_to_the_rounding_of_the_small_image() -> None:
    images = _images(1, 64, 64)
    small = Image.fromarray(images[0]).resize((8, 8), Image.Resampling.BICUBIC)
    expected = np.asarray(small.resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
    found = baselines.bicubic(images, 8)[0].astype(int)
    # Pillow rounds the small image to bytes: half a level, times the overshoot of the kernel.
    assert np.abs(found - expected).max() <= 2
    assert _error(found, images[0]) <= _error(expected, images[0]) + 0.1


def test_bicubic_keeps_three_numbers_a_block() -> None:
    """Factor 1 is the identity; a larger factor loses more."""
    images = _images(1, 64, 64)
    np.testing.assert_array_equal(baselines.bicubic(images, 1), images)
    errors = [_error(baselines.bicubic(images, f), images) for f in (2, 8, 32)]
    assert errors[0] < errors[1] < errors[2]


def test_pca_with_all_components_is_the_identity() -> None:
    images = _images(8, 32, 32)
    pca = baselines.fit_pca(baselines.to_blocks(images, 4), 48)
    np.testing.assert_allclose(pca.components @ pca.components.T, np.eye(48), atol=1e-5)
    np.testing.assert_array_equal(baselines.reconstruct(pca, images, 4), images)


def test_pca_is_that_of_the_svd() -> None:
    blocks = baselines.to_blocks(_images(6, 32, 32), 4)
    pca = baselines.fit_pca(blocks, 5)
    centred = blocks - blocks.mean(axis=0, dtype=np.float64)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(pca.mean, blocks.mean(axis=0), rtol=1e-5)
    overlap = np.abs(np.sum(pca.components * directions[:5], axis=1))
    np.testing.assert_allclose(overlap, 1, atol=1e-4)  # float32 products, neighbouring variances


def test_pca_beats_every_other_projection_of_its_rate() -> None:
    images = _images(6, 32, 32)
    blocks = baselines.to_blocks(images, 4)
    pca = baselines.fit_pca(blocks, 3)
    best = _error(baselines.reconstruct(pca, images, 4), images)
    rng = np.random.default_rng(1)
    for _ in range(20):
        basis, _ = np.linalg.qr(rng.normal(size=(48, 3)))
        other = pca._replace(components=basis.T.astype(np.float32))
        assert best < _error(baselines.reconstruct(other, images, 4), images)
    mean_only = baselines.reconstruct(pca.first(0), images, 4)
    assert best < _error(mean_only, images)
    # A small rotation of the best basis is worse as well.
    turned = pca.components + 0.1 * rng.normal(size=pca.components.shape)
    basis, _ = np.linalg.qr(turned.T)
    other = pca._replace(components=basis.T.astype(np.float32))
    assert best < _error(baselines.reconstruct(other, images, 4), images)


def test_the_first_components_are_a_smaller_pca() -> None:
    images = _images(6, 32, 32)
    blocks = baselines.to_blocks(images, 4)
    large, small = baselines.fit_pca(blocks, 8), baselines.fit_pca(blocks, 3)
    np.testing.assert_array_equal(
        baselines.reconstruct(large.first(3), images, 4), baselines.reconstruct(small, images, 4)
    )
    with pytest.raises(ValueError, match="8 fitted"):
        large.first(9)


def test_chunks_are_one_array() -> None:
    blocks = baselines.to_blocks(_images(6, 32, 32), 4)
    whole = baselines.fit_pca(blocks, 4)
    parts = baselines.fit_pca(iter(np.array_split(blocks, 5)), 4)
    np.testing.assert_allclose(parts.mean, whole.mean, rtol=1e-6)
    overlap = np.abs(np.sum(parts.components * whole.components, axis=1))
    np.testing.assert_allclose(overlap, 1, atol=1e-5)


def test_fewer_blocks_than_dimensions() -> None:
    images = _images(1, 16, 16)  # 4 blocks of 192 numbers: they span 3 directions
    pca = baselines.fit_pca(baselines.to_blocks(images, 8), 10)
    assert pca.components.shape == (3, 192)
    np.testing.assert_array_equal(baselines.reconstruct(pca, images, 8), images)


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(UserError, match="multiple of 32"):
        baselines.bicubic(_images(1, 48, 64), 32)
    with pytest.raises(UserError, match="at least one block"):
        baselines.fit_pca(iter(()), 3)
    blocks = baselines.to_blocks(_images(4, 32, 32), 4)
    with pytest.raises(UserError, match="48 or fewer"):
        baselines.fit_pca(blocks, 49)
    with pytest.raises(ValueError, match="blocks of 48"):
        baselines.reconstruct(baselines.fit_pca(blocks, 2), _images(1, 16, 16), 8)


def test_pca_of_few_blocks_is_that_of_the_covariance() -> None:
    """Fewer blocks than dimensions take another way to the same components, up to their signs."""
    blocks = baselines.to_blocks(_images(4, 32, 32), 8)
    assert len(blocks) == 64 < blocks.shape[1] == 192
    few, usual = baselines.fit_pca(blocks, 20), baselines.fit_pca(iter([blocks]), 20)
    np.testing.assert_allclose(few.mean, usual.mean, atol=1e-4)  # f32 sums of 64 grey levels
    # Subspaces, since neighbouring eigenvalues lie close; f32 products of values up to 128.
    for k in (1, 5, 20):
        a, b = few.first(k).components, usual.first(k).components
        np.testing.assert_allclose(np.linalg.svd(a @ b.T)[1], 1.0, atol=1e-3)


def test_pca_of_equal_blocks_has_no_components() -> None:
    blocks = np.repeat(baselines.to_blocks(_images(1, 8, 8), 8), 6, axis=0)
    assert len(baselines.fit_pca(blocks, 3).components) == 0
