"""PSNR, SSIM and MS-SSIM per image, on 8-bit pixels, as the released evaluation code defines them.

Everything here runs inside jit and gives one number an image, so that padded rows can be left out
exactly: sum over the real rows with `masked_sum`, add up on the host, divide at the end.
"""

import math
from typing import NamedTuple, SupportsFloat

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
_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # weights of MS-SSIM, the finest first
MS_SSIM_LEAST = WINDOW_SIDE * 2 ** (len(_SCALES) - 1)  # px: a window at the coarsest scale


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
    if min(x.shape[1:3]) < WINDOW_SIDE:
        raise ValueError(f"SSIM needs images of {WINDOW_SIDE} px and more, got {x.shape[1:3]}")
    pair = _pair(x, y)
    return _similarity(_windows(_reflected(pair) if border else pair))


def ms_ssim(x: UInt8[Array, "b h w c"], y: UInt8[Array, "b h w c"]) -> Float[Array, " b"]:
    """Structural similarity over five scales of each image; needs 176 px and more.

    Source: Wang, Simoncelli and Bovik 2003, as torchmetrics has it by default, for data range 255:
    the product of the mean contrast terms, negative ones taken as 0, each to the power of its
    weight; at the last scale it is `ssim` with `border=True`.  A scale has the means of 2 x 2
    pixels of the one before, a last odd row or column left out.
    """
    if min(x.shape[1:3]) < MS_SSIM_LEAST:
        raise ValueError(f"MS-SSIM needs images of {MS_SSIM_LEAST} px and more, got {x.shape[1:3]}")
    pair, found = _pair(x, y), jnp.ones(x.shape[0])
    for weight in _SCALES[:-1]:
        found *= _power(_contrast(_windows(pair).spread), weight)
        pair = _halved(pair)
    return found * _power(_similarity(_windows(_reflected(pair))), _SCALES[-1])


def _power(values: Float[Array, "b _ _ c"], weight: float) -> Float[Array, " b"]:
    return jnp.maximum(jnp.mean(values, axis=(1, 2, 3)), 0.0) ** weight


# Sum and difference of two images, along the batch.  Their moments are all that the similarity
# needs, and two equal images, whose difference is 0, come out as 1 exactly.
_Pair = Float[Array, "_ _ _ c"]


class _Windows(NamedTuple):
    """Under the weights of each window."""

    mean: Float[Array, "pair h w c"]
    spread: Float[Array, "pair h w c"]  # variance


def _pair(x: UInt8[Array, "b h w c"], y: UInt8[Array, "b h w c"]) -> _Pair:
    a, b = (v.astype(jnp.float32) for v in (x, y))
    return jnp.concatenate([a + b, a - b])


def _halved(pair: _Pair) -> _Pair:
    """Means of 2 x 2 pixels."""
    b, h, w, c = pair.shape
    even = pair[:, : h // 2 * 2, : w // 2 * 2]
    return jnp.mean(even.reshape(b, h // 2, 2, w // 2, 2, c), axis=(2, 4))


def _reflected(pair: _Pair) -> _Pair:
    """A window's radius more on each side, the edge not repeated."""
    margin = ((0, 0), (_RADIUS, _RADIUS), (_RADIUS, _RADIUS), (0, 0))
    return jnp.pad(pair, margin, mode="reflect")


def _windows(pair: _Pair) -> _Windows:
    """Of every window that lies inside: along columns, then along rows."""
    return _along(_along(_Windows(pair, jnp.zeros_like(pair)), 2), 1)


def _along(of: _Windows, axis: int) -> _Windows:
    """Windows of what are pixels, or windows within a row, along `axis`.

    The spread of things put together is the mean of their spreads and the spread of their means.
    It is taken around the window's middle: in float32 E[x^2] - E[x]^2 would leave 2e-3 of a flat
    white region, 5e-5 in its similarity; so it is 1e-7.  Sums of slices stay float32 on every
    device (a convolution would not) and fuse into two loops.
    """
    size = of.mean.shape[axis] - 2 * _RADIUS

    def shifted(x: _Pair, i: int) -> _Pair:
        return jax.lax.slice_in_dim(x, i, i + size, axis=axis)

    middle = shifted(of.mean, _RADIUS)
    away = sum(w * (shifted(of.mean, i) - middle) for i, w in enumerate(_WINDOW))
    spread = sum(
        w * (shifted(of.spread, i) + (shifted(of.mean, i) - middle) ** 2)
        for i, w in enumerate(_WINDOW)
    )
    return _Windows(middle + away, spread - away**2)


def _similarity(of: _Windows) -> Float[Array, "b _ _ c"]:
    """Luminance, contrast and structure."""
    of_sum, of_difference = jnp.split(of.mean**2, 2)
    luminance = (of_sum - of_difference + 2 * _C1) / (of_sum + of_difference + 2 * _C1)
    return luminance * _contrast(of.spread)


def _contrast(spread: _Pair) -> Float[Array, "b _ _ c"]:
    """Contrast and structure, (2 cov + c) / (var + var + c)."""
    of_sum, of_difference = jnp.split(spread, 2)
    return (of_sum - of_difference + 2 * _C2) / (of_sum + of_difference + 2 * _C2)


def masked_sum(values: Float[Array, " b"], mask: Float[Array, " b"]) -> Float[Array, ""]:
    """Sum over the rows whose mask is above zero; infinities of the other rows do not leak in."""
    return jnp.sum(jnp.where(mask > 0, values, 0.0))
