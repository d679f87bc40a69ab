"""PSNR and SSIM per image, on 8-bit pixels, as the released evaluation code defines them.

Everything here runs inside jit and gives one number an image, so that padded rows can be left out
exactly: sum over the real rows with `masked_sum`, add up on the host, divide at the end.
"""

import math
from typing import SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

PEAK = 255.0
_C1 = (0.01 * PEAK) ** 2
_C2 = (0.03 * PEAK) ** 2
WINDOW_SIDE = 11  # 3.5 sigma for sigma = 1.5 on both sides
_RADIUS = WINDOW_SIDE // 2
_WINDOW = np.exp(-0.5 * (np.arange(-_RADIUS, _RADIUS + 1) / 1.5) ** 2)
_WINDOW = (_WINDOW / _WINDOW.sum()).astype(np.float32)


def to_uint8(x: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """Pixels in [-1, 1] to 0..255: scaled in float32, rounded half up, clamped.

    The one rule for reconstructions, inputs and saved pictures (DC-AE's evaluation: u8 =
    trunc(clamp(255 (0.5 y + 0.5) + 0.5, 0, 255))).  NaN becomes 0.
    """
    scaled = 255.0 * (x.astype(jnp.float32) * 0.5 + 0.5) + 0.5
    return jnp.clip(jnp.nan_to_num(scaled, nan=0.0), 0.0, 255.0).astype(jnp.uint8)


def mse(x: UInt8[Array, "b h w c"], y: UInt8[Array, "b h w c"]) -> Float[Array, " b"]:
    """Mean squared error of each image in squared grey levels; exact sums per row of pixels."""
    difference = x.astype(jnp.int32) - y.astype(jnp.int32)
    rows = jnp.sum(difference * difference, axis=(2, 3))  # below 2^31 for 11,000 px of width
    return jnp.mean(rows.astype(jnp.float32), axis=1) / (x.shape[2] * x.shape[3])


def psnr(x: UInt8[Array, "b h w c"], y: UInt8[Array, "b h w c"]) -> Float[Array, " b"]:
    """Peak signal-to-noise ratio of each image in dB, peak 255; infinite for equal images."""
    return 10.0 * jnp.log10(PEAK**2 / mse(x, y))


def pooled_psnr(mse_sum: SupportsFloat, images: SupportsFloat) -> float:
    """PSNR in dB of the mean squared error over all images (of one size), on the host.

    `mse_sum` is the sum of `mse` over `images` images.  Unlike the mean of `psnr`, which is what
    papers print, one easy image cannot dominate it.
    """
    mse_sum, images = float(mse_sum), float(images)
    if images <= 0:
        raise ValueError("pooled PSNR of no image")
    return math.inf if mse_sum == 0 else 10.0 * math.log10(PEAK**2 * images / mse_sum)


def ssim(
    x: UInt8[Array, "b h w c"], y: UInt8[Array, "b h w c"], *, border: bool = False
) -> Float[Array, " b"]:
    """Structural similarity of each image: Gaussian window (sigma 1.5, 11 px), k 0.01 and 0.03.

    Source: Wang et al. 2004; torchmetrics' defaults with data range 255, in float32.
    The mean runs over the pixels whose window lies inside the image: torchmetrics before 1.5,
    scikit-image and the original.  `border=True` pads by reflection and takes all pixels:
    torchmetrics since 1.5.  Needs images of 11 px and more.
    """
    return jnp.mean(ssim_map(x, y, border=border), axis=(1, 2, 3))


def ssim_map(
    x: UInt8[Array, "b h w c"], y: UInt8[Array, "b h w c"], *, border: bool = False
) -> Float[Array, "b _ _ c"]:
    """The structural similarity of each window; `ssim` is its mean."""
    if min(x.shape[1:3]) < 2 * _RADIUS + 1:
        raise ValueError(f"SSIM needs images of 11 px and more, got {x.shape[1:3]}")
    # Centred, so that E[x^2] - E[x]^2 loses fewer digits; variances do not change.
    a, b = (v.astype(jnp.float32) - 128.0 for v in (x, y))
    if border:
        margin = ((0, 0), (_RADIUS, _RADIUS), (_RADIUS, _RADIUS), (0, 0))
        a, b = (jnp.pad(v, margin, mode="reflect") for v in (a, b))
    mean_a, mean_b, aa, bb, ab = jnp.split(_blur(jnp.concatenate([a, b, a * a, b * b, a * b])), 5)
    var_a = jnp.maximum(aa - mean_a * mean_a, 0.0)
    var_b = jnp.maximum(bb - mean_b * mean_b, 0.0)
    covariance = ab - mean_a * mean_b
    mean_a, mean_b = mean_a + 128.0, mean_b + 128.0
    structure = (2.0 * covariance + _C2) / (var_a + var_b + _C2)
    luminance = (2.0 * mean_a * mean_b + _C1) / (mean_a * mean_a + mean_b * mean_b + _C1)
    return structure * luminance


def _blur(x: Float[Array, "b h w c"]) -> Float[Array, "b _ _ c"]:
    """The Gaussian window without padding, as shifted sums.

    Sums of slices stay float32 on every device (a convolution would not) and fuse into two loops.
    """
    for axis in (1, 2):
        size = x.shape[axis] - 2 * _RADIUS
        x = sum(
            weight * jax.lax.slice_in_dim(x, i, i + size, axis=axis)
            for i, weight in enumerate(_WINDOW)
        )
    return x


def masked_sum(values: Float[Array, " b"], mask: Float[Array, " b"]) -> Float[Array, ""]:
    """Sum over the rows whose mask is above zero; infinities of the other rows do not leak in."""
    return jnp.sum(jnp.where(mask > 0, values, 0.0))
