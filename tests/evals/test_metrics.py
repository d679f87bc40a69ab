"""PSNR and SSIM against closed forms, torchmetrics (stored), scikit-image and a slow numpy SSIM."""

import importlib.util
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from dcae_jax.evals import metrics

ssim = jax.jit(metrics.ssim, static_argnames="border")
PARITY = Path(__file__).parents[1] / "parity"


def _pair(seed: int, shape: tuple[int, ...]) -> tuple[jax.Array, ...]:
    spec = importlib.util.spec_from_file_location("maker", PARITY / "make_lpips_fixtures.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    return tuple(jnp.asarray(v) for v in maker.images(seed, shape))


def test_quantisation_is_the_released_rule() -> None:
    y = np.concatenate([np.linspace(-1.3, 1.3, 4001), [-1, 0, 1]]).astype(np.float32)
    expected = np.trunc(np.clip(255 * (y.astype(np.float64) * 0.5 + 0.5) + 0.5, 0, 255))
    found = np.asarray(metrics.to_uint8(jnp.asarray(y)))
    # float32 rounding moves a value across a half level at most: nowhere on these points.
    np.testing.assert_array_equal(found, expected)
    assert metrics.to_uint8(jnp.array([-1.0, 0.0, 1.0])).tolist() == [0, 128, 255]
    assert metrics.to_uint8(jnp.array([jnp.nan, jnp.inf, -jnp.inf])).tolist() == [0, 255, 0]


def test_quantisation_undoes_the_loading_of_pixels() -> None:
    pixels = np.arange(256, dtype=np.uint8)
    x = jnp.asarray(pixels).astype(jnp.float32) / 127.5 - 1
    np.testing.assert_array_equal(metrics.to_uint8(x), pixels)
    assert metrics.to_uint8(x.astype(jnp.bfloat16)).dtype == jnp.uint8


def test_psnr_closed_forms() -> None:
    x = jnp.full((3, 16, 12, 3), 100, jnp.uint8)
    y = x.at[1].add(10)  # mse 100
    y = y.at[2, ::2].set(0)  # half of the pixels off by 100: mse 5000
    np.testing.assert_array_equal(metrics.mse(x, y), [0, 100, 5000])
    found = metrics.psnr(x, y)
    assert found[0] == math.inf
    np.testing.assert_allclose(
        found[1:], [10 * math.log10(255**2 / 100), 10 * math.log10(255**2 / 5000)], rtol=1e-6
    )
    assert metrics.psnr(jnp.zeros_like(x), jnp.full_like(x, 255))[0] == 0
    assert metrics.pooled_psnr(100 + 5000, 3) == pytest.approx(10 * math.log10(255**2 / 1700))
    assert metrics.pooled_psnr(0, 2) == math.inf
    with pytest.raises(ValueError, match="no image"):
        metrics.pooled_psnr(0, 0)


def test_mse_of_large_images_does_not_overflow() -> None:
    x = jnp.zeros((1, 1200, 900, 3), jnp.uint8)
    y = jnp.full_like(x, 255)
    # Sums of a row are exact; their mean is a float32: 6e-8.
    assert float(metrics.mse(x, y)[0]) == pytest.approx(255**2, rel=1e-6)


def test_ssim_agrees_with_torchmetrics() -> None:
    x, y = _pair(3, (3, 40, 56, 3))
    stored = np.load(PARITY / "ssim.npz")
    # Both work in float32; E[x^2] - E[x]^2 of levels up to 255 keeps 4e-3 of c2 = 58: 1e-5.
    np.testing.assert_allclose(ssim(x, y), stored["cropped"], atol=1e-5)
    np.testing.assert_allclose(ssim(x, y, border=True), stored["full"], atol=1e-5)
    assert abs(stored["cropped"] - stored["full"]).max() > 1e-3  # so the choice is really tested


def test_ssim_agrees_with_scikit_image() -> None:
    x, y = _pair(5, (2, 32, 48, 3))
    found = ssim(x, y)
    for i in range(2):
        expected = structural_similarity(
            np.asarray(x[i]),
            np.asarray(y[i]),
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
        )
        assert float(found[i]) == pytest.approx(expected, abs=2e-6)  # float64 against float32


def _slow_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """One window at a time, in float64."""
    one = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(one, one)[:, :, None] / one.sum() ** 2
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = (v[i : i + 11, j : j + 11].astype(np.float64) for v in (x, y))
            ma, mb = ((window * v).sum((0, 1)) for v in (a, b))
            va, vb = ((window * (v - m) ** 2).sum((0, 1)) for v, m in ((a, ma), (b, mb)))
            cov = (window * (a - ma) * (b - mb)).sum((0, 1))
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            values.append(
                (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
            )
    return float(np.mean(values))


def test_ssim_agrees_with_its_definition() -> None:
    x, y = _pair(6, (1, 16, 24, 3))
    assert float(ssim(x, y)[0]) == pytest.approx(
        _slow_ssim(*map(np.asarray, (x[0], y[0]))), abs=2e-6
    )


def test_ssim_closed_forms() -> None:
    x, _ = _pair(7, (2, 16, 16, 3))
    np.testing.assert_allclose(ssim(x, x), 1.0, atol=1e-6)
    a, b = (jnp.full((1, 16, 16, 3), level, jnp.uint8) for level in (50, 200))
    c1 = (0.01 * 255) ** 2
    expected = (2 * 50 * 200 + c1) / (50**2 + 200**2 + c1)  # constant images: luminance only
    # The weights add up to 1 + 1e-7 in float32: a variance of 1e-3 instead of 0, against c2 = 58.
    np.testing.assert_allclose(ssim(a, b), expected, rtol=5e-5)
    with pytest.raises(ValueError, match="11 px"):
        ssim(a[:, :8], b[:, :8])


def test_masked_rows_leave_no_trace() -> None:
    values = jnp.array([3.0, jnp.inf, 5.0, jnp.nan])
    assert metrics.masked_sum(values, jnp.array([1.0, 0.0, 1.0, 0.0])) == 8.0


def test_rows_are_independent_and_nothing_recompiles() -> None:
    x, y = _pair(8, (4, 24, 32, 3))
    both = jax.jit(lambda x, y: (metrics.psnr(x, y), metrics.ssim(x, y)))
    with jax.transfer_guard("disallow"):
        first, again = both(x, y), both(y, x)
    assert both._cache_size() == 1
    for a, b in zip(first, again, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)  # both are symmetric, to rounding
    shuffled = both(x[::-1], y[::-1])
    for a, b in zip(first, shuffled, strict=True):
        np.testing.assert_array_equal(a[::-1], b)
