"""Closed-form autoencoders to stand beside a trained one: bicubic resampling and PCA of blocks.

Both code each block of `factor` x `factor` pixels on its own.  Bicubic keeps 3 numbers a block; PCA
keeps k, and is the best linear autoencoder of that rate on the pixels it was fitted to.  Numbers
are not quantised in the code, pixels are rounded once at the end, as for a trained autoencoder.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import scipy.linalg
from jaxtyping import Float, Float32, Float64, UInt8
from PIL import Image

from dcae_jax.errors import UserError


class Pca(NamedTuple):
    """Mean block and principal directions (rows, largest variance first), in grey levels 0..255."""

    mean: Float32[np.ndarray, " d"]
    components: Float32[np.ndarray, "k d"]

    def first(self, k: int) -> "Pca":
        """The PCA with only its first k components."""
        if not 0 <= k <= len(self.components):
            raise ValueError(f"{k} components asked for, {len(self.components)} fitted")
        return Pca(self.mean, self.components[:k])


def bicubic(images: UInt8[np.ndarray, "n h w 3"], factor: int) -> UInt8[np.ndarray, "n h w 3"]:
    """Each image resampled to 1/factor and back (Pillow's bicubic: antialiased on the way down)."""
    _check(images.shape, factor)
    _, h, w, _ = images.shape
    out = np.empty(images.shape, np.uint8)
    for n, channel in np.ndindex(len(images), 3):
        plane = Image.fromarray(images[n, :, :, channel].astype(np.float32))
        small = plane.resize((w // factor, h // factor), Image.Resampling.BICUBIC)
        out[n, :, :, channel] = _quantise(
            np.asarray(small.resize((w, h), Image.Resampling.BICUBIC))
        )
    return out


def to_blocks(images: UInt8[np.ndarray, "n h w 3"], factor: int) -> UInt8[np.ndarray, "m d"]:
    """All factor x factor blocks of the images, each flattened to factor^2 * 3 numbers."""
    _check(images.shape, factor)
    n, h, w, _ = images.shape
    split = images.reshape(n, h // factor, factor, w // factor, factor, 3)
    return split.transpose(0, 1, 3, 2, 4, 5).reshape(-1, factor * factor * 3)


def from_blocks(
    blocks: UInt8[np.ndarray, "m d"], shape: tuple[int, int, int, int], factor: int
) -> UInt8[np.ndarray, "n h w 3"]:
    """The images of `shape` whose blocks `to_blocks` gave."""
    n, h, w, _ = shape
    split = blocks.reshape(n, h // factor, w // factor, factor, factor, 3)
    return split.transpose(0, 1, 3, 2, 4, 5).reshape(shape)


def fit_pca(blocks: UInt8[np.ndarray, "m d"] | Iterable[UInt8[np.ndarray, "_ d"]], k: int) -> Pca:
    """The k leading principal components of `blocks`: an array, or chunks of one.

    Costs d^2 memory twice in float64 (75 MB each for 32 x 32 blocks), 0.1 ms a block and some
    seconds for the eigenvectors.  An array of fewer blocks than dimensions (64 x 64 blocks have
    12,288) costs their number squared instead.  Fewer blocks than k + 1 give fewer components: as
    many as the blocks span.
    """
    if isinstance(blocks, np.ndarray) and 0 < len(blocks) < blocks.shape[1]:
        return _fit_few(blocks, k)
    chunks = [blocks] if isinstance(blocks, np.ndarray) else blocks
    count, total, scatter = 0, None, None
    for chunk in chunks:
        if total is None:
            d = chunk.shape[1]
            total, scatter = np.zeros(d), np.zeros((d, d))
        for part in np.array_split(chunk, max(1, len(chunk) // 4096)):
            # Mid-grey first: then float32 products, summed in float64, keep 6 digits.
            x = part.astype(np.float32) - 127.5
            count += len(x)
            total += x.sum(axis=0, dtype=np.float64)
            scatter += x.T @ x
    if count == 0:
        raise UserError("PCA needs at least one block; the training images gave none")
    mean = total / count
    covariance = scatter / count - np.outer(mean, mean)
    components = _leading(covariance, min(k, count - 1))
    return Pca((mean + 127.5).astype(np.float32), components.astype(np.float32))


def _fit_few(blocks: UInt8[np.ndarray, "m d"], k: int) -> Pca:
    """The same through the m x m matrix of inner products, which shares its eigenvalues."""
    x = blocks.astype(np.float32) - 127.5
    mean = x.mean(axis=0, dtype=np.float64).astype(np.float32)
    x -= mean
    directions = _leading((x @ x.T).astype(np.float64), min(k, len(x) - 1)).astype(np.float32) @ x
    lengths = np.linalg.norm(directions, axis=1, keepdims=True)
    # Blocks that span less than k dimensions: what is left is rounding noise, not a direction.
    spanned = lengths[:, 0] > 1e-4 * lengths.max(initial=0.0)
    return Pca(mean + np.float32(127.5), directions[spanned] / lengths[spanned])


def _leading(matrix: Float64[np.ndarray, "d d"], k: int) -> Float64[np.ndarray, "k d"]:
    d = len(matrix)
    if k == 0:
        return np.zeros((0, d))
    if k > d:
        raise UserError(f"PCA of {d} dimensions has no {k} components; ask for {d} or fewer")
    _, vectors = scipy.linalg.eigh(matrix, subset_by_index=(d - k, d - 1), check_finite=False)
    return vectors[:, ::-1].T


def reconstruct(
    pca: Pca, images: UInt8[np.ndarray, "n h w 3"], factor: int
) -> UInt8[np.ndarray, "n h w 3"]:
    """Each block projected on the components and back, rounded to 0..255."""
    blocks = to_blocks(images, factor)
    if blocks.shape[1] != len(pca.mean):
        raise ValueError(f"fitted on blocks of {len(pca.mean)} numbers, got {blocks.shape[1]}")
    out = np.empty_like(blocks)
    for start in range(0, len(blocks), 4096):
        x = blocks[start : start + 4096].astype(np.float32) - pca.mean
        out[start : start + 4096] = _quantise(x @ pca.components.T @ pca.components + pca.mean)
    return from_blocks(out, images.shape, factor)


def _quantise(x: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Rounds half up and clamps, as `metrics.to_uint8`."""
    return np.clip(x + 0.5, 0, 255).astype(np.uint8)


def _check(shape: tuple[int, ...], factor: int) -> None:
    if shape[1] % factor or shape[2] % factor:
        raise UserError(
            f"images of {shape[1]} x {shape[2]} px do not divide into blocks of {factor} px; "
            f"use a size that is a multiple of {factor}"
        )
