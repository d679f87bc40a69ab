"""Scores against pytorch-fid, torch-fidelity and torchmetrics, of the same float32 inputs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data
import torch
import torchmetrics.functional.image as torchmetrics
from pytorch_fid.fid_score import calculate_frechet_distance
from sklearn.datasets import load_sample_image
from torch import nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.kid import KernelInceptionDistance

from dcae_jax.evals import metrics
from dcae_jax.evals.frechet import Moments, distance
from dcae_jax.evals.inception_score import Splits, inception_score
from dcae_jax.evals.kid import kid
from dcae_jax.evals.labels import random_labels
from dcae_jax.evals.precision_recall import precision_recall

# Asked for are 1e-3 for FID and KID, 1e-4 for IS.  Where both sides work in float64:
FLOAT64 = 1e-9
FID_RANK = 1e-6  # below full rank: theirs takes roots of products that rounding made differ from 0
KID_FLOAT32 = 1e-4  # theirs adds a million kernels of float32 features in float32
PIXELS = 1e-6  # ours are float32 in numbers of one image


def features(seed: int, n: int, dim: int, shift: float = 0.0) -> np.ndarray:
    """As of a ReLU and a mean over positions: not negative, correlated, of different scales."""
    gen = np.random.default_rng(seed)
    mixed = gen.gamma(0.7, 1.0, size=(n, dim)) @ (gen.normal(size=(dim, dim)) / dim**0.5)
    return np.abs(mixed * np.geomspace(1, 0.05, dim) + shift).astype(np.float32)


def moments(rows: np.ndarray) -> Moments:
    found = Moments.zeros(rows.shape[1])
    for part in np.array_split(rows, 7):
        found.add(part)
    return found


@pytest.mark.parametrize(("n", "dim", "limit"), [(3000, 256, FLOAT64), (100, 256, FID_RANK)])
def test_fid(compare, n, dim, limit) -> None:
    x, y = features(0, n, dim), features(1, n, dim, shift=0.05)
    a, b = (moments(v).gaussian() for v in (x, y))
    found = distance(a, b)
    stats = [fid_features_to_statistics(torch.from_numpy(v)) for v in (x, y)]
    fidelity = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    compare(
        "FID", f"{n} x {dim}", limit, **{"pytorch-fid": (found, calculate_frechet_distance(*a, *b))}
    )
    # Its means and covariances are sums of float32 numbers.
    compare("FID", f"{n} x {dim}", 1e-5, **{"torch-fidelity": (found, fidelity)})
    assert distance(a, moments(x[::-1]).gaussian()) == pytest.approx(0, abs=1e-12)


def test_kid(compare) -> None:
    x, y = features(2, 1500, 128), features(3, 1200, 128, shift=0.05)
    found = kid(x, y)
    tensors = [torch.from_numpy(v) for v in (x, y)]
    single = kid_features_to_metric(*tensors, verbose=False)
    double = kid_features_to_metric(*(v.double() for v in tensors), verbose=False)
    for result, limit, name in ((single, KID_FLOAT32, "float32"), (double, FLOAT64, "float64")):
        mean, std = (result[f"kernel_inception_distance_{k}"] for k in ("mean", "std"))
        where = f"torch-fidelity, {name}"
        compare("KID", where, limit, mean=(found.mean, mean), std=(found.std, std))


class Given(nn.Module):
    """An extractor of torchmetrics whose images are the features themselves."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


def test_kid_of_torchmetrics(compare) -> None:
    """It draws other subsets: one that is all there is."""
    x, y = features(4, 300, 64), features(5, 300, 64, shift=0.05)
    theirs = KernelInceptionDistance(feature=Given(), subsets=2, subset_size=300)
    theirs.update(torch.from_numpy(y).double(), real=True)
    theirs.update(torch.from_numpy(x).double(), real=False)
    mean, _ = theirs.compute()
    found = kid(x, y, subsets=2, size=300)
    compare("KID", "torchmetrics", FLOAT64, mean=(found.mean, mean.numpy()))


@pytest.mark.parametrize("n", [1000, 1003, 57])
def test_inception_score(compare, n) -> None:
    logits = np.random.default_rng(6).normal(0, 3, size=(n, 1008)).astype(np.float32)
    found = inception_score(logits)
    theirs = isc_features_to_metric(torch.from_numpy(logits))
    pairs = {k: (getattr(found, k), theirs[f"inception_score_{k}"]) for k in ("mean", "std")}
    compare("Inception Score", f"torch-fidelity, n = {n}", FLOAT64, **pairs)
    ordered = isc_features_to_metric(torch.from_numpy(logits), shuffle=False)
    found = inception_score(logits, Splits(parts=10))
    pairs = {"mean, as they are": (found.mean, ordered["inception_score_mean"])}
    compare("Inception Score", f"torch-fidelity, n = {n}", FLOAT64, **pairs)


@pytest.mark.parametrize(("n", "m", "dim"), [(3000, 2500, 256), (300, 2100, 16)])
def test_precision_and_recall(compare, n, m, dim) -> None:
    """The very same vectors are inside: shares of thousands in float32 agree in each of them."""
    x, y = features(7, n, dim), features(8, m, dim, shift=0.1)
    found = precision_recall(x, y)
    theirs = prc_features_to_metric(torch.from_numpy(x), torch.from_numpy(y), verbose=False)
    assert 0.02 < found.precision < 0.98 and 0.02 < found.recall < 0.98
    pairs = {key: (getattr(found, key), theirs[key]) for key in found._fields}
    compare("k-NN", f"torch-fidelity, {n} and {m} x {dim}", 1e-7, **pairs)


def pictures() -> tuple[np.ndarray, np.ndarray]:
    """(three photographs and two flat images, what became of them), uint8 of 177 x 184 px."""
    gen = np.random.default_rng(9)
    photographs = [load_sample_image("china.jpg"), load_sample_image("flower.jpg")]
    x = [v[100:277, 100:284] for v in (*photographs, skimage.data.astronaut())]
    white = np.full_like(x[0], 255)
    white[50:90, 60:100] = gen.integers(0, 256, (40, 40, 3))
    x = np.stack([*x, white, white // 255 * 3])
    noise = gen.normal(0, np.array([3, 20, 60, 4, 2])[:, None, None, None], x.shape)
    return x, np.clip(np.round(x + noise), 0, 255).astype(np.uint8)


def nchw(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def inner_ssim(y: torch.Tensor, x: torch.Tensor) -> np.ndarray:
    """Windows inside the image alone: torchmetrics before 1.5."""
    given = {"data_range": 255.0, "return_full_image": True}
    _, full = torchmetrics.structural_similarity_index_measure(y, x, **given)
    return full[..., 5:-5, 5:-5].mean((1, 2, 3)).numpy()


def test_scores_of_pairs(compare) -> None:
    """torchmetrics in float64; in float32, as it is used, it loses digits where images are flat."""
    x, y = pictures()
    given = {"data_range": 255.0, "reduction": "none"}
    of = {
        "psnr": metrics.psnr, "ssim, inner windows": metrics.ssim,
        "ssim, all pixels": partial(metrics.ssim, border=True), "ms-ssim": metrics.ms_ssim,
    }  # fmt: skip
    ours = {k: jax.jit(score)(jnp.asarray(x), jnp.asarray(y)) for k, score in of.items()}
    photographs, flat = slice(0, 3), slice(3, 5)
    for dtype, chosen, limit, what in (
        (torch.float64, slice(0, 5), PIXELS, "float64"),
        (torch.float32, photographs, 1e-5, "float32, photographs"),
        (torch.float32, flat, 1e-3, "float32, flat"),
    ):
        a, b = (nchw(v[chosen]).to(dtype) for v in (y, x))
        theirs = {
            "psnr": torchmetrics.peak_signal_noise_ratio(a, b, dim=(1, 2, 3), **given),
            "ssim, inner windows": inner_ssim(a, b),
            "ssim, all pixels": torchmetrics.structural_similarity_index_measure(a, b, **given),
            "ms-ssim": torchmetrics.multiscale_structural_similarity_index_measure(a, b, **given),
        }
        pairs = {key: (ours[key][chosen], np.asarray(theirs[key])) for key in ours}
        compare("pairs of images", f"torchmetrics, {what}", limit, **pairs)


@pytest.mark.parametrize("seed", [0, 1, 2020, 2**31, 2**32 - 1])
def test_classes_are_drawn_as_torch_draws_them(seed) -> None:
    for n, classes in ((1, 1000), (15, 1000), (16, 10), (50_000, 1000), (1000, 1), (99, 2**28 - 1)):
        generator = torch.Generator().manual_seed(seed)
        expected = torch.randint(0, classes, (n,), generator=generator)
        np.testing.assert_array_equal(random_labels(n, classes, seed), expected.numpy())
