"""Statistics of latents against numpy in float64 on the whole array, and closed forms."""

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from PIL import Image

from dcae_jax import sharding
from dcae_jax.config import MeshConfig
from dcae_jax.data import pipeline
from dcae_jax.data.pipeline import DataConfig, Transform
from dcae_jax.data.sources import FolderConfig
from dcae_jax.errors import UserError
from dcae_jax.evals import latent_stats
from dcae_jax.evals.latent_stats import Sums
from dcae_jax.tasks.autoencode import to_float


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    """13 images: no batch size below divides them."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(13):
        Image.fromarray(networks.picture(40, 50, i)).save(folder / f"{i:02d}.png")
    return DataConfig(
        source=FolderConfig(path=str(folder)), resolution=32, transform=Transform.center_crop,
        threads=1, flip=False, cache_mb=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def net():
    """Channel 0 is shifted a hundred deviations away: E[z^2] - E[z]^2 in f32 would lose all."""
    found = networks.in_memory()
    bias = found.variables["params"]["encoder"]["conv_out"]["bias"]
    found.variables["params"]["encoder"]["conv_out"]["bias"] = bias.at[0].set(30.0)
    return found


def latents(net, data: DataConfig, n: int) -> np.ndarray:
    """All latents at once, in float64."""
    with pipeline.eval_batches(data, batch=n, n=n) as batches:
        (batch,) = batches
    return np.asarray(net.encode(to_float(jnp.asarray(batch["image"]))), np.float64)


def check(found, z: np.ndarray) -> None:
    # f32 sums of rows of 8 pixels, float64 above.
    assert found.rms == pytest.approx(np.sqrt(np.mean(z**2)), rel=1e-6)
    assert found.scaling_factor == pytest.approx(1 / np.sqrt(np.mean(z**2)), rel=1e-6)
    scale = z.std(axis=(0, 1, 2))
    np.testing.assert_allclose(found.std, scale, rtol=1e-6)
    assert found.pixels == z[..., 0].size
    means = np.square(z).mean(axis=(1, 2, 3))  # the images are the independent draws
    error = means.std(ddof=1) / np.sqrt(len(z)) / (2 * np.sqrt(means.mean()))
    assert found.rms_error == pytest.approx(error, rel=1e-4)  # a difference of near numbers
    # A mean may be near zero: 1e-6 of what is added up.
    size = np.abs(z).mean(axis=(0, 1, 2))
    assert (np.abs(np.array(found.mean) - z.mean(axis=(0, 1, 2))) <= 1e-6 * size).all()


@pytest.mark.parametrize("devices", [1, 4, 8])
@pytest.mark.parametrize("n", [13, 7])
def test_numpy_finds_the_same_on_any_number_of_devices(data, net, devices, n) -> None:
    z = latents(net, data, n)
    assert abs(z[..., 0].mean()) > 50 * z[..., 0].std(), "the case that needs care"
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    seen = []

    def encode(images):
        return net.encode(to_float(images))

    found = latent_stats.measure(encode, data, mesh, n=n, batch=3, progress=seen.append)
    assert found.n == n and seen[-1] == n and seen == sorted(seen)
    check(found, z)


def test_padded_rows_do_not_count_whatever_is_in_them(data) -> None:
    """An encoder that is infinite where the image is black, as padded rows are."""

    def encode(images):
        x = to_float(images)
        return jnp.where((images == 0).all(), jnp.inf, x[:, ::4, ::4]) + jnp.where(
            (images == 0).all((1, 2, 3), keepdims=True), jnp.nan, 0.0
        )

    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:4])
    found = latent_stats.measure(encode, data, mesh, n=5, batch=4)
    with pipeline.eval_batches(data, batch=5, n=5) as batches:
        (batch,) = batches
    z = np.asarray(to_float(jnp.asarray(batch["image"])))[:, ::4, ::4].astype(np.float64)
    assert found.n == 5
    check(found, z)


def test_any_split_into_batches_gives_the_same() -> None:
    z = np.random.default_rng(0).normal(3, 2, (12, 5, 7, 4)).astype(np.float32)
    rows, deviations = map(np.asarray, latent_stats.row_sums(jnp.asarray(z)))
    for parts in ([12], [1] * 12, [5, 0, 7]):
        sums, start = Sums(), 0
        for count in parts:
            part = slice(start, start + count)
            sums.add(rows[part], deviations[part], 7)
            start += count
        check(sums.result(), z.astype(np.float64))


def test_closed_form() -> None:
    z = np.zeros((2, 3, 4, 2), np.float32)
    z[..., 0] = 3
    z[0, ..., 1], z[1, ..., 1] = 1, -1
    sums = Sums()
    sums.add(*map(np.asarray, latent_stats.row_sums(jnp.asarray(z))), 4)
    found = sums.result()
    assert found.mean == (3, 0) and found.std == (0, 1)
    assert found.rms == pytest.approx(np.sqrt((9 + 1) / 2), rel=1e-12)
    assert found.pixels == 24 and found.rms_error == 0  # both images have the same squares
    z = z[:1]
    sums = Sums()
    sums.add(*map(np.asarray, latent_stats.row_sums(jnp.asarray(z))), 4)
    assert sums.result().rms_error is None


def test_the_standard_error_is_how_far_draws_scatter() -> None:
    gen = np.random.default_rng(0)
    found = []
    for _ in range(200):
        scale = gen.uniform(0.5, 1.5, (40, 1, 1, 1))  # images differ more than their pixels
        z = (scale * gen.normal(size=(40, 4, 4, 2))).astype(np.float32)
        sums = Sums()
        sums.add(*map(np.asarray, latent_stats.row_sums(jnp.asarray(z))), 4)
        found.append(sums.result())
    scatter = np.std([each.rms for each in found])
    # 200 draws give their scatter to 1 / sqrt(400) = 5 %: three times that.
    assert np.mean([each.rms_error for each in found]) == pytest.approx(scatter, rel=0.15)


def test_what_cannot_be_measured_is_said() -> None:
    with pytest.raises(UserError, match="no image"):
        Sums().result()
    for value, match in ((np.nan, r"not finite in channels \[1\]"), (0.0, "all latents are zero")):
        sums = Sums()
        rows = np.zeros((1, 2, 2), np.float32)
        rows[0, 0, 1] = value
        sums.add(rows, np.zeros((1, 2, 2), np.float32), 4)
        with pytest.raises(UserError, match=match):
            sums.result()
