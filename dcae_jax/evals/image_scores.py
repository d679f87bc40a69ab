"""PSNR and SSIM of one image of any size, in blocks: one program, little memory."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from dcae_jax.data.transforms import Pixels
from dcae_jax.evals import metrics

_BLOCK = 256  # windows along a side of a block
_SIDE = _BLOCK + metrics.WINDOW_SIDE - 1  # pixels that they look at


class Scores(NamedTuple):
    """Of one image; the definitions are those of `metrics`."""

    psnr: float  # dB, infinite for equal images
    ssim: float | None  # None below 11 px


def scores(original: Pixels, reconstruction: Pixels) -> Scores:
    """How near a reconstruction is to its original."""
    error = original.astype(np.int32) - reconstruction
    psnr = metrics.pooled_psnr(np.mean(np.square(error), dtype=np.float64), 1)
    return Scores(psnr, _ssim(original, reconstruction))


def _ssim(x: Pixels, y: Pixels) -> float | None:
    """`metrics.ssim`, as the sum over blocks of windows; blocks overlap as their windows do."""
    height, width = (side - metrics.WINDOW_SIDE + 1 for side in x.shape[:2])
    if min(height, width) < 1:
        return None
    total = 0.0
    for top in range(0, height, _BLOCK):
        for left in range(0, width, _BLOCK):
            place = (slice(top, top + _SIDE), slice(left, left + _SIDE))
            valid = np.array([height - top, width - left], np.int32)
            total += float(_block_sum(_filled(x[place]), _filled(y[place]), valid))
    return total / (height * width * x.shape[2])


def _filled(part: Pixels) -> UInt8[np.ndarray, "1 s s 3"]:
    rows, columns = (_SIDE - side for side in part.shape[:2])
    return np.pad(part, ((0, rows), (0, columns), (0, 0)))[None]


@jax.jit
def _block_sum(
    x: UInt8[Array, "1 s s 3"], y: UInt8[Array, "1 s s 3"], valid: Int32[Array, "2"]
) -> Float[Array, ""]:
    """Sum over the windows that lie inside the image: the first `valid` rows and columns."""
    similarity = metrics.ssim_map(x, y)
    place = jnp.arange(_BLOCK)
    inside = (place < valid[0])[:, None] & (place < valid[1])
    return jnp.sum(jnp.where(inside[..., None], similarity, 0.0))
