"""PSNR, SSIM, MS-SSIM against closed forms, torchmetrics (stored), scikit-image and numpy."""

import importlib.util
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import correlate1d
from skimage.metrics import structural_similarity

from dcae_jax.evals import metrics

ssim = jax.jit(metrics.ssim, static_argnames="border")
ms_ssim = jax.jit(metrics.ms_ssim)
# The mean over windows in float32, each of which is good to about as much.
FLOAT32 = 2e-7
EQUAL = 1e-6  # a sum of equal values: their rounding errors are equal too and add up
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
    # Theirs in float32: E[x^2] - E[x]^2 of levels up to 255 keeps 4e-3 of c2 = 58: 1e-5.
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
        assert float(found[i]) == pytest.approx(expected, abs=FLOAT32)


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
        _slow_ssim(*map(np.asarray, (x[0], y[0]))), abs=FLOAT32
    )


def test_ssim_closed_forms() -> None:
    x, _ = _pair(7, (2, 16, 16, 3))
    np.testing.assert_array_equal(ssim(x, x), 1.0)
    a, b = (jnp.full((1, 16, 16, 3), level, jnp.uint8) for level in (50, 200))
    c1 = (0.01 * 255) ** 2
    expected = (2 * 50 * 200 + c1) / (50**2 + 200**2 + c1)  # constant images: luminance only
    np.testing.assert_allclose(ssim(a, b), expected, rtol=EQUAL)
    with pytest.raises(ValueError, match="11 px"):
        ssim(a[:, :8], b[:, :8])


def test_ssim_is_exact_where_images_are_flat() -> None:
    """On white, E[x^2] - E[x]^2 in float32 would be off by 3e-5."""
    x = np.full((1, 24, 40, 3), 255, np.uint8)
    y = x - np.random.default_rng(0).integers(0, 4, x.shape, dtype=np.uint8)
    assert float(ssim(x, y)[0]) == pytest.approx(_slow_ssim(x[0], y[0]), abs=FLOAT32)


def _similarity(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(luminance, contrast) of the windows around all pixels, mirrored at the border; float64."""
    one = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)

    def mean(v: np.ndarray) -> np.ndarray:
        for axis in (0, 1):
            v = correlate1d(v, one / one.sum(), axis=axis, mode="mirror")
        return v

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    return (2 * ma * mb + c1) / (ma**2 + mb**2 + c1), (2 * cov + c2) / (va + vb + c2)


def _slow_ms_ssim(x: np.ndarray, y: np.ndarray) -> float:
    a, b, found = x.astype(np.float64), y.astype(np.float64), 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        luminance, contrast = _similarity(a, b)
        inner = contrast[5:-5, 5:-5].mean() if scale < 4 else (luminance * contrast).mean()
        found *= max(inner, 0.0) ** weight
        h, w = (side // 2 for side in a.shape[:2])
        a, b = (v[: 2 * h, : 2 * w].reshape(h, 2, w, 2, 3).mean((1, 3)) for v in (a, b))
    return float(found)


def test_ms_ssim_agrees_with_its_definition() -> None:
    x, y = (v[:, :177, :190] for v in _pair(9, (2, 184, 192, 3)))  # 177 -> 88 -> 44 -> 22 -> 11
    found = ms_ssim(x, y)
    expected = [_slow_ms_ssim(*map(np.asarray, pair)) for pair in zip(x, y, strict=True)]
    # Five factors; a power multiplies the relative error by its weight, and these add up to 1.
    np.testing.assert_allclose(found, expected, rtol=2 * FLOAT32)
    assert np.abs(found - ssim(x, y)).max() > 1e-2


def test_ms_ssim_closed_forms() -> None:
    x = _pair(10, (2, 184, 192, 3))[0][:, :177, :190]
    np.testing.assert_array_equal(ms_ssim(x, x), 1.0)
    a, b = (jnp.full_like(x, level) for level in (50, 200))
    c1 = (0.01 * 255) ** 2
    luminance = (2 * 50 * 200 + c1) / (50**2 + 200**2 + c1)  # of the last scale alone
    np.testing.assert_allclose(ms_ssim(a, b), luminance**0.1333, rtol=EQUAL)
    assert not ms_ssim(x, 255 - x).any(), (
        "where structure is reversed, it is 0, not a complex power"
    )
    with pytest.raises(ValueError, match="176 px"):
        ms_ssim(x[:, :, :175], x[:, :, :175])


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
        np.testing.assert_array_equal(a, b)  # both are symmetric
    shuffled = both(x[::-1], y[::-1])
    for a, b in zip(first, shuffled, strict=True):
        np.testing.assert_array_equal(a[::-1], b)
