"""Tiles: weights that sum to 1 everywhere, and nothing changed where nothing can change."""

import itertools

import jax
import networks
import numpy as np
import pytest

from dcae_jax import tiling
from dcae_jax.tiling import Tiling

CASES = [
    (size, tile, overlap)
    for size, tile, overlap in itertools.product(
        (1, 5, 8, 13, 17, 24, 39), range(2, 13), range(1, 7)
    )
    if overlap <= tile // 2
]


def test_positions_cover_share_and_end_at_the_edge() -> None:
    for size, tile, overlap in CASES:
        found = tiling.positions(size, min(tile, size), overlap)
        if size <= tile:
            assert found == [0]
            continue
        assert found[0] == 0 and found[-1] == size - tile
        shared = [a + tile - b for a, b in itertools.pairwise(found)]
        assert min(shared) >= overlap and max(shared) - min(shared) <= 1
        # No cover with fewer tiles shares as much.
        assert (len(found) - 1) * tile - (len(found) - 2) * overlap < size or len(found) == 2


@pytest.mark.parametrize("scale", [1, 3])
def test_weights_add_up_to_one_and_fade_to_the_edges(scale) -> None:
    for size, tile, overlap in CASES:
        if size <= tile:
            continue
        starts = tiling.positions(size, tile, overlap)
        weights = tiling.ramps(starts, tile, scale)
        total = np.zeros(size * scale)
        for start, weight in zip(starts, weights, strict=True):
            total[start * scale : (start + tile) * scale] += weight
        # Each weight is rounded to f32 and at most three of them meet.
        np.testing.assert_allclose(total, 1, atol=2e-7)
        for i, weight in enumerate(weights):
            own = (starts[i + 1] if i + 1 < len(starts) else size) - starts[i]
            before = 0 if i == 0 else starts[i - 1] + tile - starts[i]
            assert (weight >= 0).all() and (weight <= 1).all()
            if before <= own:  # no third tile reaches in
                assert (np.diff(weight[: before * scale]) > -1e-6).all(), "must fade in"
            assert i > 0 or (weight[: own * scale] == 1).all(), "the first is alone up to its next"


def test_two_tiles_blend_by_the_stated_curve() -> None:
    (first, second) = tiling.ramps([0, 6], 10, 1)
    expected = np.sin(np.pi / 2 * (np.arange(4) + 0.5) / 4) ** 2
    np.testing.assert_allclose(second[:4], expected, atol=1e-7)  # f32
    np.testing.assert_allclose(first[6:], 1 - expected, atol=1e-7)
    assert (first[:6] == 1).all() and (second[4:] == 1).all()


@pytest.mark.parametrize("size", [(24, 24), (64, 40), (100, 28), (28, 100)])
@pytest.mark.parametrize(("tile", "overlap"), [(24, 4), (24, 12), (32, 8)])
def test_a_local_network_gives_the_same_in_tiles(size, tile, overlap) -> None:
    """What depends on one latent pixel only does not see the tiles, in both directions."""
    x = np.random.default_rng(0).normal(size=(*size, 3)).astype(np.float32)
    cut = Tiling(tile, overlap)
    shapes = set()

    def encode(part):
        shapes.add(part.shape)
        return networks.blocks(part, 4)

    z = tiling.encode(encode, x, cut, 4)
    whole = networks.blocks(x[None], 4)[0]
    # Weights sum to 1 to f32 rounding: 1e-6 of values up to 4.
    np.testing.assert_allclose(z, whole, atol=4e-6)
    y = tiling.decode(lambda part: networks.unblocks(part, 4), whole, cut, 4)
    np.testing.assert_allclose(y, x, atol=4e-6)
    assert len(shapes) == 1, "one program for all tiles"
    assert max(shapes.pop()) <= tile


def test_latents_are_blended_where_the_pixels_are() -> None:
    """Networks that give each tile's number: the share of a tile lies at its place, not beside."""
    cut, size = Tiling(128, 128 // 4), 256 - 32  # two tiles that share 32 px, the f32 of DC-AE
    numbers = iter((0.0, 1.0))
    z = tiling.encode(lambda part: np.full((1, 1, 4, 1), next(numbers)), _row(size), cut, 32)
    numbers = iter((0.0, 1.0))
    y = tiling.decode(lambda part: np.full((1, 32, 128, 1), next(numbers)), z, cut, 32)
    np.testing.assert_allclose(z[0, :, 0], [0, 0, 0, 0.5, 1, 1, 1], atol=1e-7)
    assert (y[0, :96] == 0).all() and (y[0, 128:] == 1).all()
    np.testing.assert_allclose(y[0, 96:128].mean(), z[0, 3, 0], atol=1e-6)


def _row(width: int) -> np.ndarray:
    return np.zeros((32, width, 3), np.float32)


def test_the_network_meets_one_tile_at_a_time() -> None:
    """Nothing as large as the image reaches the device."""
    largest = []

    def encode(part):
        largest.append(part.size)
        return networks.blocks(part, 4)

    tiling.encode(encode, np.zeros((400, 300, 3), np.float32), Tiling(64, 16), 4)
    assert max(largest) == 64 * 64 * 3 and len(largest) == 8 * 6


def test_attention_changes_the_interior_and_the_seam_stays_near_it() -> None:
    """Random weights of an f4 with a global stage: tiles differ, without a step at the seams."""
    net = networks.in_memory()
    encode, decode = jax.jit(net.encode), jax.jit(net.decode)
    x = networks.picture(160, 112).astype(np.float32) / 127.5 - 1
    cut = Tiling(64, 32)
    z = tiling.encode(encode, x, cut, 4)
    found = tiling.decode(decode, z, cut, 4)
    whole = np.asarray(decode(encode(x[None])))[0]
    difference = tiling.difference(found, whole, tiling.blended(160, 112, cut, 4))
    assert difference.interior > 0, "attention sees the tile in place of the image"
    assert difference.ratio < 2
    assert difference.largest == np.abs(found - whole).max()


def test_difference_tells_seam_from_interior() -> None:
    cut = Tiling(8, 2)
    seams = tiling.blended(8, 14, cut, 1)
    assert seams.sum() == 8 * 2 and seams[:, 6:8].all()
    tiled = np.where(seams[..., None], 3.0, 1.0).astype(np.float32) * np.ones(3, np.float32)
    found = tiling.difference(tiled, np.zeros_like(tiled), seams)
    assert found == (3.0, 3.0, 1.0) and found.ratio == 3.0
    same = tiling.difference(tiled, tiled, seams)
    assert same == (0, 0, 0) and same.ratio == 0


def test_all_problems_at_once() -> None:
    assert Tiling(512, 128).problems(32) == []
    assert Tiling(64, 32).problems(32) == []
    found = Tiling(500, 300).problems(32)
    assert len(found) == 3
    assert "--tile 500" in found[0] and "480 or 512" in found[0]
    assert "--overlap 300" in found[1] and "288 or 320" in found[1]
    assert "more than half" in found[2] and "at most 224" in found[2]
    assert "nearest: 32" in Tiling(512, 8).problems(32)[0]
    (one,) = Tiling(32, 32).problems(32)
    assert "at least 64" in one
