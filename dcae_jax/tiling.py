"""Large images in tiles: the device holds one tile at a time, the host adds them up.

All tiles of an image have one size.  They stand on whole latent pixels, evenly from edge to edge:
the fewest that give neighbours the overlap that was asked for, so neighbours share at least that.
Over what they share, one fades out while the other fades in; the weights of all tiles add up to 1
at every pixel, and latents fade by the same curve, taken at the centre of each latent pixel.

A network that looks at the whole image (attention, group norms) gives other numbers in tiles;
`difference` says how much.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

Apply = Callable[[Shaped[np.ndarray, "1 a b c"]], Float[Array, "1 d e f"] | np.ndarray]


@dataclass(frozen=True)
class Tiling:
    """How an image is cut, in pixels."""

    tile: int  # side of a tile
    overlap: int  # what neighbours share at least

    def problems(self, factor: int) -> list[str]:
        """All problems of these values for an autoencoder of this factor, each with its mend."""
        found = []
        for name, value in (("tile", self.tile), ("overlap", self.overlap)):
            if value < factor or value % factor:
                low = max(value // factor, 1) * factor
                found.append(
                    f"--{name} {value} is not a multiple of the autoencoder's factor {factor}; "
                    f"nearest: {low}" + (f" or {low + factor}" if value > low else "")
                )
        if self.overlap > self.tile // 2:
            most = max(self.tile // 2 // factor, 1) * factor
            found.append(
                f"--overlap {self.overlap} is more than half of --tile {self.tile}: most pixels "
                f"would be computed more than four times; use at most {most}"
                + (f" (and a tile of at least {2 * factor})" if self.tile < 2 * factor else "")
            )
        return found

    def splits(self, height: int, width: int) -> bool:
        """Whether an image of this size is cut at all."""
        return max(height, width) > self.tile


class _Axis(NamedTuple):
    """The tiles along one axis."""

    starts: list[int]
    tile: int  # their length
    weights: Float[np.ndarray, "tiles length"]  # at the resolution of the output


def encode(
    fn: Apply, image: Shaped[np.ndarray, "H W c"], tiling: Tiling, factor: int
) -> Float[np.ndarray, "h w f"]:
    """The latent of an image whose sides are multiples of the factor; `fn` encodes a batch of 1."""
    return _tiled(fn, image, tiling, factor, inner=factor, outer=1)


def decode(
    fn: Apply, latent: Float[np.ndarray, "h w f"], tiling: Tiling, factor: int
) -> Float[np.ndarray, "H W c"]:
    """The image of a latent; `fn` decodes a batch of 1."""
    return _tiled(fn, latent, tiling, factor, inner=1, outer=factor)


def _tiled(
    fn: Apply, x: Shaped[np.ndarray, "a b c"], tiling: Tiling, factor: int, inner: int, outer: int
) -> Float[np.ndarray, "d e f"]:
    """`inner` and `outer`: input and output pixels per latent pixel."""
    height, width = x.shape[0] // inner, x.shape[1] // inner
    rows, columns = (_axis(size, tiling, factor, outer) for size in (height, width))
    canvas = None
    for top, down in zip(rows.starts, rows.weights, strict=True):
        for left, across in zip(columns.starts, columns.weights, strict=True):
            tile = x[_span(top, rows.tile, inner), _span(left, columns.tile, inner)]
            out = np.asarray(fn(tile[None]))[0]
            if canvas is None:
                canvas = np.zeros((height * outer, width * outer, out.shape[-1]), np.float32)
            out = out * (down[:, None] * across)[..., None]
            canvas[_span(top, rows.tile, outer), _span(left, columns.tile, outer)] += out
    return canvas


def _span(start: int, length: int, scale: int) -> slice:
    return slice(start * scale, (start + length) * scale)


def _axis(size: int, tiling: Tiling, factor: int, scale: int) -> _Axis:
    """The tiles along `size` latent pixels, weighted at `scale` output pixels for each."""
    tile = min(tiling.tile // factor, size)
    starts = positions(size, tile, tiling.overlap // factor)
    return _Axis(starts, tile, ramps(starts, tile, scale))


def positions(size: int, tile: int, overlap: int) -> list[int]:
    """Where the fewest tiles begin that cover 0..size, share `overlap` or more, and end with it."""
    gaps = -(-(size - tile) // (tile - overlap)) if size > tile else 0
    return [(2 * i * (size - tile) + gaps) // (2 * gaps) if gaps else 0 for i in range(gaps + 1)]


def ramps(starts: Sequence[int], tile: int, scale: int) -> Float[np.ndarray, "tiles length"]:
    """The weight of each tile at each of its output pixels; over all tiles they add up to 1.

    sin^2 over what two neighbours share: a tile is worst at its edge, where it sees zeros in place
    of the image, and there this counts less than a straight line.  Where a third tile reaches in,
    it takes from the others in proportion.
    """
    length = tile * scale
    place = np.arange(length) + 0.5
    total = np.zeros((starts[-1] + tile) * scale)
    raw = []
    for i, start in enumerate(starts):
        before = (starts[i - 1] + tile - start) * scale if i else 0
        after = (start + tile - starts[i + 1]) * scale if i + 1 < len(starts) else 0
        weight = np.minimum(_rise(place, before), _rise(length - place, after))
        total[_span(start, tile, scale)] += weight
        raw.append(weight)
    shares = [w / total[_span(s, tile, scale)] for s, w in zip(starts, raw, strict=True)]
    return np.array(shares, np.float32)


def _rise(distance: Float[np.ndarray, " n"], over: int) -> Float[np.ndarray, " n"]:
    """From 0 at the edge to 1 at the distance `over`, and 1 from there on."""
    if not over:
        return np.ones_like(distance)
    return np.sin(0.5 * np.pi * np.minimum(distance / over, 1)) ** 2


# ------------------------------------------------------------------------------ what tiling changes


class Difference(NamedTuple):
    """|tiled - untiled|: the largest, and means where tiles were blended and where not."""

    largest: float
    seam: float
    interior: float

    @property
    def ratio(self) -> float:
        """The seams' error relative to the interior's; 0 where nothing differs."""
        if self.interior:
            return self.seam / self.interior
        return float("inf") if self.seam else 0.0


def blended(height: int, width: int, tiling: Tiling, factor: int) -> Bool[np.ndarray, "H W"]:
    """The pixels of a padded image that more than one tile has a share in."""
    rows, columns = (
        _shared(_axis(size // factor, tiling, factor, factor), size) for size in (height, width)
    )
    return rows[:, None] | columns


def _shared(axis: _Axis, size: int) -> Bool[np.ndarray, " size"]:
    scale = size // (axis.starts[-1] + axis.tile)
    tiles = np.zeros(size, np.int32)
    for start in axis.starts:
        tiles[_span(start, axis.tile, scale)] += 1
    return tiles > 1


def difference(
    tiled: Float[np.ndarray, "H W c"],
    untiled: Float[np.ndarray, "H W c"],
    seams: Bool[np.ndarray, "H W"],
) -> Difference:
    """How far two reconstructions of one image are apart, in their own units."""
    error = np.abs(tiled.astype(np.float64) - untiled)
    per_pixel = error.mean(axis=2)
    seam = per_pixel[seams].mean() if seams.any() else 0.0
    # The image's corners belong to one tile each: there is always an interior.
    return Difference(float(error.max()), float(seam), float(per_pixel[~seams].mean()))
