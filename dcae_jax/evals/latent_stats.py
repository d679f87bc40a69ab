"""RMS, means and standard deviations of the latents of a data set, in one pass.

The scaling factor of a latent diffusion model is 1 / RMS (diffusers' definition, which the released
DC-AE models follow).  Each row of a latent is summed on the device in f32, about its own mean, so
that nothing is lost where a channel's mean is large; all above is float64 on the host.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from dcae_jax import sharding
from dcae_jax.data import pipeline
from dcae_jax.data.pipeline import DataConfig
from dcae_jax.errors import UserError

Encode = Callable[[UInt8[Array, "b H W 3"]], Float[Array, "b h w f"]]


@dataclass(frozen=True)
class LatentStats:
    """Of all latent pixels of `n` images; deviations are about the mean, over all of them."""

    n: int
    pixels: int  # latent pixels
    mean: tuple[float, ...]  # per channel
    std: tuple[float, ...]
    rms: float
    rms_error: float | None  # standard error of the RMS, images drawn at random; None: one image

    @property
    def scaling_factor(self) -> float:
        """Latents times this have RMS 1."""
        return 1.0 / self.rms


class Sums:
    """What is added up, for any number of batches."""

    def __init__(self) -> None:
        self.images, self._pixels = 0, 0
        self._sum: np.ndarray | float = 0.0
        self._squares: np.ndarray | float = 0.0  # of row means, times the pixels of a row
        self._within: np.ndarray | float = 0.0  # squared deviations from the row means
        self._means: list[float] = []  # of each image's squared numbers

    def add(
        self, rows: Float[np.ndarray, "b h f"], deviations: Float[np.ndarray, "b h f"], width: int
    ) -> None:
        """`rows`: sums over the `width` pixels of each row; `deviations`: see `row_sums`."""
        rows, deviations = rows.astype(np.float64), deviations.astype(np.float64)
        self.images += rows.shape[0]
        self._pixels += rows.shape[0] * rows.shape[1] * width
        self._sum += rows.sum(axis=(0, 1))
        self._squares += np.square(rows).sum(axis=(0, 1)) / width
        self._within += deviations.sum(axis=(0, 1))
        energy = (np.square(rows) / width + deviations).sum(axis=(1, 2))
        self._means += (energy / (rows.shape[1] * width * rows.shape[2])).tolist()

    def result(self) -> LatentStats:
        """The statistics; UserError if a latent was not finite."""
        if not self.images:
            raise UserError("no image was measured; give at least one")
        mean = self._sum / self._pixels
        square = (self._within + self._squares) / self._pixels
        if not np.isfinite(square).all():
            bad = np.flatnonzero(~np.isfinite(square)).tolist()
            raise UserError(f"the latents are not finite in channels {bad}: are the weights whole?")
        variance = np.maximum(square - mean**2, 0.0)
        rms = float(np.sqrt(square.mean()))
        if not rms:
            raise UserError("all latents are zero: is the encoder trained?")
        return LatentStats(
            self.images, self._pixels, tuple(mean.tolist()), tuple(np.sqrt(variance).tolist()), rms,
            self._rms_error(rms),
        )  # fmt: skip

    def _rms_error(self, rms: float) -> float | None:
        """From the spread of the images: the pixels of one image are not independent."""
        if self.images < 2:
            return None
        return float(np.std(self._means, ddof=1) / np.sqrt(self.images) / (2 * rms))


def row_sums(
    latent: Float[Array, "b h w f"],
) -> tuple[Float[Array, "b h f"], Float[Array, "b h f"]]:
    """(sum over w, sum over w of squared distances to the row's mean) in f32."""
    latent = latent.astype(jnp.float32)
    total = jnp.sum(latent, axis=2)
    away = latent - (total / latent.shape[2])[:, :, None]
    return total, jnp.sum(away * away, axis=2)


def measure(
    encode: Encode, data: DataConfig, mesh: Mesh, *, n: int, batch: int,
    progress: Callable[[int], None] = lambda done: None,
) -> LatentStats:  # fmt: skip
    """The statistics of exactly `n` images on any mesh.

    `encode` gives the latents of uint8 images that lie on the mesh; `batch` is over all devices.
    """
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    batch = -(-batch // split) * split  # divisible by the devices; padded rows are not counted
    reduce = jax.jit(
        lambda latent, mask: (*row_sums(latent), mask), out_shardings=sharding.replicated(mesh)
    )
    sums, shard = Sums(), pipeline.Shard(*sharding.row_shard(mesh))
    with data.eval_batches(batch=batch, n=n, shard=shard) as batches:
        for local in batches:
            placed = sharding.put_batch({k: local[k] for k in ("image", "mask")}, mesh)
            with jax.set_mesh(mesh):
                latent = encode(placed["image"])
                rows, deviations, mask = jax.device_get(reduce(latent, placed["mask"]))
            sums.add(rows[mask > 0], deviations[mask > 0], latent.shape[2])
            progress(sums.images)
    return sums.result()
