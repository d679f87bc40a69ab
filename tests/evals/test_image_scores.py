"""Scores of one image of any size: those of the evaluator and of scikit-image."""

import jax.numpy as jnp
import networks
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dcae_jax.evals import image_scores, metrics


def pair(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    x = networks.picture(height, width)
    noise = np.random.default_rng(1).normal(0, 12, x.shape)
    return x, np.clip(x + noise, 0, 255).astype(np.uint8)


# One block, one window, exactly a block of windows, and several with a rest.
@pytest.mark.parametrize("size", [(40, 33), (11, 11), (266, 20), (267, 300), (290, 600)])
def test_psnr_and_ssim_are_those_of_scikit_image_and_of_the_evaluator(size) -> None:
    x, y = pair(*size)
    found = image_scores.scores(x, y)
    # Sums of integers: the same but for the rounding of a logarithm.
    assert found.psnr == pytest.approx(peak_signal_noise_ratio(x, y), rel=1e-12)
    expected = structural_similarity(
        x, y, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        data_range=255,
    )  # fmt: skip
    # f32 against float64: as for metrics.ssim itself (test_metrics).
    assert found.ssim == pytest.approx(expected, abs=2e-5)
    whole = metrics.ssim(jnp.asarray(x)[None], jnp.asarray(y)[None])[0]
    assert found.ssim == pytest.approx(float(whole), abs=2e-6)  # sums in another order


def test_equal_and_tiny_images() -> None:
    x, y = pair(10, 50)
    assert image_scores.scores(x, x).psnr == np.inf
    assert image_scores.scores(x, y).ssim is None
    x, _ = pair(20, 20)
    assert image_scores.scores(x, x).ssim == pytest.approx(1, abs=1e-6)
