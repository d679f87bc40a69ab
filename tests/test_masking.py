"""Masks: schedules, numbers of visible tokens, taking tokens out and putting them back."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcae_jax import masking
from dcae_jax.masking import MaskConfig, MaskKind, Rounding

T = 60_000
STEPS = np.arange(T)


def kept(ratio, tokens, **fields):
    return int(MaskConfig(**fields).keeps(np.array([ratio]), tokens)[0])


# -------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("tokens", "ratio", "keep"), [(49, 0.15, 41), (49, 0.4, 29), (49, 0.75, 12), (64, 0.75, 16)]
)
def test_numbers_of_visible_tokens_are_those_of_the_code(tokens, ratio, keep):
    assert kept(ratio, tokens, rounding=Rounding.exact) == keep


@pytest.mark.parametrize(
    ("tokens", "low", "high", "distinct"),
    [(16, 4, 13, 10), (49, 12, 41, 30), (64, 16, 54, 39), (196, 49, 166, 118), (256, 64, 217, 154)],
)
def test_exact_numbers_are_as_many_as_there_are(tokens, low, high, distinct):
    """From 0.15 to 0.75 each number between the two ends, once, downwards; or the six of a table.

    The table's numbers, and all tokens, are not among them unless the schedule comes near.
    """
    exact = MaskConfig(rounding=Rounding.exact).visited(0, T, T, tokens)
    assert exact == list(range(high, low - 1, -1)) and len(exact) == distinct
    nearest = MaskConfig().visited(0, T, T, tokens)
    assert len(nearest) == 6 and nearest == sorted(nearest, reverse=True)


# Share of the training, from spec: cos^2 with offset 0.008 written out; straight lines.
FRACTIONS = [0, 1 / 12, 1 / 6, 1 / 4, 1 / 3, 5 / 12, 1 / 2, 7 / 12, 2 / 3]
VALUES = {
    MaskKind.cosine: [0.150, 0.175, 0.242, 0.340, 0.454, 0.567, 0.663, 0.728, 0.750],
    MaskKind.piecewise: [0.150, 0.275, 0.400, 0.400, 0.400, 0.4875, 0.575, 0.6625, 0.750],
    MaskKind.linear: [0.150, 0.200, 0.250, 0.300, 0.350, 0.400, 0.450, 0.500, 0.550],
    MaskKind.constant: [0.75] * 9,
}


@pytest.mark.parametrize("kind", MaskKind)
def test_schedules_have_the_published_values(kind):
    cfg = MaskConfig(kind=kind)
    found = [cfg.ratio(round(f * T), T) for f in FRACTIONS]
    np.testing.assert_allclose(found, VALUES[kind], atol=6e-4)  # three digits are given
    whole = cfg.ratio(STEPS, T)
    assert (np.diff(whole) >= -1e-15).all() and whole.max() <= 0.75 + 1e-15
    np.testing.assert_array_equal([cfg.ratio(int(k), T) for k in STEPS[::5003]], whole[::5003])


def test_the_ends_of_the_schedules_are_exact():
    cosine = MaskConfig()
    assert cosine.ratio(0, T) == 0.15 and cosine.ratio(T // 2, T) == pytest.approx(0.6634, abs=5e-5)
    for k in (40_000, 40_001, T - 1):
        assert abs(cosine.ratio(k, T) - 0.75) < 1e-12
    piecewise = MaskConfig(kind=MaskKind.piecewise)
    for at, value in ((T // 6, 0.4), (T // 3, 0.4), (2 * T // 3, 0.75)):  # continuous there
        near = piecewise.ratio(np.array([at - 1, at, at + 1]), T)
        np.testing.assert_allclose(near, value, atol=5e-5)  # the slope is 0.25 / 10,000 a step
    linear = MaskConfig(kind=MaskKind.linear, ramp=0.5)
    assert linear.ratio(T // 2, T) == linear.ratio(T - 1, T) == 0.75
    assert linear.ratio(T // 4, T) == pytest.approx(0.45)


@pytest.mark.parametrize(
    ("fields", "mean"),
    [
        ({}, 0.5516), ({"kind": MaskKind.piecewise}, 0.5542), ({"kind": MaskKind.linear}, 0.450),
        ({"kind": MaskKind.linear, "ramp": 2 / 3}, 0.550), ({"kind": MaskKind.constant}, 0.75),
    ],
)  # fmt: skip
def test_time_means_of_the_schedules(fields, mean):
    assert MaskConfig(**fields).ratio(STEPS, T).mean() == pytest.approx(mean, abs=5e-4)


def test_the_cosine_is_that_of_improved_ddpm():
    """r = 0.15 + 0.60 (1 - f(k) / f(0)), written out."""
    s, last = 0.008, 40_000

    def f(k):
        return math.cos((k / last + s) / (1 + s) * math.pi / 2) ** 2

    for k in (0, 1, 777, 20_000, 39_999):
        assert MaskConfig().ratio(k, T) == pytest.approx(0.15 + 0.6 * (1 - f(k) / f(0)), abs=1e-12)


def flops_of_uvit_h(keep, tokens):
    """Forward pass of UViT-H whose last two blocks see all tokens and whose others see `keep`."""
    d, half, seen, every = 1152, 14, keep + 2.0, tokens + 2.0

    def block(n):
        return 24 * n * d**2 + 4 * n**2 * d

    skips = 4 * d**2 * ((half - 2) * seen + 2 * every)
    return (2 * half - 1) * block(seen) + 2 * block(every) + skips


@pytest.mark.parametrize("tokens", [49, 64, 256])
def test_what_the_rounding_costs(tokens):
    """A mean overhead of 0.2 to 1.6 % to the nearest number, 5 to 7 % to the next larger one.

    Of the FLOPs of UViT-H over the training, against exact numbers.
    """
    ratio = MaskConfig().ratio(STEPS, T)
    cost = {
        rounding: flops_of_uvit_h(MaskConfig(rounding=rounding).keeps(ratio, tokens), tokens).mean()
        for rounding in Rounding
    }
    assert 0.002 <= cost[Rounding.nearest] / cost[Rounding.exact] - 1 <= 0.016
    assert 0.0495 <= cost[Rounding.up] / cost[Rounding.exact] - 1 <= 0.07
    nearest = MaskConfig().keeps(ratio, tokens)
    assert np.abs((1 - nearest / tokens) - ratio).max() <= 0.0625  # half of the largest gap
    up, exact = (MaskConfig(rounding=r).keeps(ratio, tokens) for r in (Rounding.up, Rounding.exact))
    assert (up >= exact).all() and len(set(up)) == 6


@pytest.mark.parametrize("tokens", [16, 49, 64, 256])
@pytest.mark.parametrize(
    ("fields", "low", "high"),
    [
        ({"end": 0.9}, 0.15, 0.9),
        ({"kind": MaskKind.constant, "end": 0.85}, 0.85, 0.85),
        ({"start": 0.05}, 0.05, 0.75),
        ({"kind": MaskKind.piecewise, "middle": 0.8, "end": 0.8}, 0.15, 0.8),
    ],
)  # fmt: skip
def test_the_table_reaches_the_ratios_of_the_schedule(tokens, fields, low, high):
    """Its ends are met to the token, and no step is further from it than half of its widest gap."""
    cfg = MaskConfig(**fields)
    exact = {r: kept(r, tokens, rounding=Rounding.exact) for r in (low, high)}
    assert abs(cfg.keep(0, T, tokens) - exact[low]) <= 1  # rounded to the nearest, not down
    assert abs(cfg.keep(T - 1, T, tokens) - exact[high]) <= 1
    off = np.abs(cfg.keeps(cfg.ratio(STEPS, T), tokens) / tokens - (1 - cfg.ratio(STEPS, T)))
    # Half of an eighth, or of the 0.15 above the published numbers; half a token for whole numbers.
    assert off.max() <= 0.15 / 2 + 0.5 / tokens
    published = MaskConfig().table(tokens)
    assert set(published) < set(cfg.table(tokens))
    assert len(cfg.table(tokens)) <= len(published) + 2


def test_buckets_are_those_that_are_named():
    cfg = MaskConfig(buckets=(40, 20))
    assert cfg.table(49) == (20, 40, 49) and cfg.visited(0, T, T, 49) == [40, 20]
    assert cfg.keep(0, T, 49) == 40 and cfg.keep(T - 1, T, 49) == 20
    assert kept(1 - 30 / 49, 49, buckets=(40, 20)) == 40  # of two equally near ones the larger
    # 48 of 64 visible is exact whatever the floats say; 49 are more than 48.
    assert [kept(r, 64, rounding=Rounding.up) for r in (0.2343, 0.25, 0.2501)] == [54, 48, 48]


@pytest.mark.parametrize(
    ("tokens", "at"),
    [(64, (0, 0.159, 0.265, 0.355, 0.451, 0.597)), (256, (0, 0.171, 0.274, 0.364, 0.461, 0.632))],
)
def test_where_rounding_up_changes_the_program(tokens, at):
    """The published switch points of the cosine, as shares of the training."""
    keeps = MaskConfig(rounding=Rounding.up).keeps(MaskConfig().ratio(STEPS, T), tokens)
    first = [int(np.argmax(keeps == keep)) for keep in dict.fromkeys(keeps.tolist())]
    # Three digits; to the whole number below, or to the share itself: one token in 64 is 0.008.
    np.testing.assert_allclose(np.array(first) / T, at, atol=0.012)


def test_visited_numbers_are_those_of_each_step():
    """Over several blocks of steps, from the middle of a run; as a plain loop finds them."""
    cfg, steps = MaskConfig(), 300_000
    assert cfg.visited(0, steps, steps, 49) == [41, 36, 30, 24, 18, 12]
    first, last = 50_000, 150_000
    loop = dict.fromkeys(cfg.keep(k, steps, 49) for k in range(first, last, 7))
    assert cfg.visited(first, last, steps, 49) == list(loop)
    assert cfg.visited(7, 8, steps, 49) == [cfg.keep(7, steps, 49)]
    falling = MaskConfig(kind=MaskKind.linear, start=0.75, end=0.0)  # back to all tokens
    assert falling.visited(0, T, T, 49) == [12, 18, 24, 30, 36, 41, 49]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"start": -0.1}, r"mask\.start = -0\.1; a share .* from 0 to below 1"),
        ({"end": 1.0}, r"mask\.end = 1\.0; a share"),
        ({"end": float("nan")}, r"mask\.end = nan; a share"),
        ({"ramp": 1.5}, r"mask\.ramp = 1\.5; the share of the steps"),
        ({"buckets": (8, 8)}, r"mask\.buckets = \(8, 8\); different numbers"),
        ({"buckets": (0, 8)}, r"mask\.buckets = \(0, 8\); .* from 1 on"),
    ],
)  # fmt: skip
def test_bad_values_are_named(fields, message):
    (found,) = MaskConfig(**fields).problems()
    assert re.search(message, found), found
    assert MaskConfig().problems() == []


def test_too_few_tokens_are_named():
    exact = {"rounding": Rounding.exact, "kind": MaskKind.constant}
    (found,) = MaskConfig(end=0.9, **exact).token_problems(8)
    assert "leaves none of 8 tokens visible" in found and "lower mask.end" in found
    assert MaskConfig(end=0.75, **exact).token_problems(4) == []
    assert MaskConfig().token_problems(1) == []  # all of one, says the table
    (found,) = MaskConfig(
        kind=MaskKind.piecewise, middle=0.99, rounding=Rounding.exact
    ).token_problems(49)
    assert "a mask ratio of 0.99 leaves none of 49" in found and "lower mask.middle" in found
    (found,) = MaskConfig(buckets=(9, 50)).token_problems(49)
    assert "only 49 tokens" in found


# ----------------------------------------------------------------------------------------- tokens


def made(batch=5, rows=4, columns=6, keep=10, block=1):
    order = masking.random_order(jax.random.key(3), batch, rows, columns, block)
    return masking.split(order, keep)


def test_orders_are_permutations_and_differ():
    found = made()
    order, inverse = np.asarray(found.order), np.asarray(found.inverse)
    np.testing.assert_array_equal(np.sort(order), np.tile(np.arange(24), (5, 1)))
    np.testing.assert_array_equal(np.take_along_axis(order, inverse, 1)[:, :24], np.sort(order))
    assert len({tuple(row) for row in order}) == 5
    masked = np.asarray(found.masked())
    assert (masked.sum(1) == 14).all()
    for row, hidden in zip(order, masked, strict=True):
        assert set(row[:10]) == set(np.flatnonzero(~hidden))


def test_every_token_is_as_likely_to_be_visible():
    order = masking.random_order(jax.random.key(0), 20_000, 4, 4)
    share = np.bincount(np.asarray(order)[:, :4].ravel(), minlength=16) / 20_000
    # Five standard deviations of 20,000 draws of probability 1/4.
    assert np.abs(share - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 20_000)


def test_put_undoes_take():
    found, x = made(), jax.random.normal(jax.random.key(1), (5, 24, 3))
    seen = found.take(x)
    for i, j in ((0, 0), (4, 9), (2, 5)):
        np.testing.assert_array_equal(seen[i, j], x[i, found.order[i, j]])
    back = np.asarray(found.put(seen, jnp.full((1, 3), 7.0)))
    masked = np.asarray(found.masked())
    np.testing.assert_array_equal(back[~masked], np.asarray(x)[~masked])
    assert (back[masked] == 7).all()
    each = jax.random.normal(jax.random.key(2), x.shape)  # one fill for each token
    np.testing.assert_array_equal(
        found.put(seen, each), np.where(masked[:, :, None], each, np.asarray(x))
    )


def test_gradients_of_take_and_put():
    found, x = made(), jax.random.normal(jax.random.key(1), (5, 24, 3))
    weight = jax.random.normal(jax.random.key(2), (5, 24, 3))
    fill = jnp.zeros((1, 3))
    masked = np.asarray(found.masked())[:, :, None]

    def loss(x, fill):
        return jnp.sum(weight * found.put(found.take(x), fill))

    dx, dfill = jax.grad(loss, (0, 1))(x, fill)
    np.testing.assert_array_equal(dx, np.where(masked, 0, weight))
    np.testing.assert_allclose(dfill[0], np.where(masked, weight, 0).sum((0, 1)), rtol=1e-5)


def test_nothing_is_touched_where_nothing_is_masked():
    """Known when a program is traced: the very same arrays, and no gather in the program."""
    found, x = made(keep=24), jnp.ones((5, 24, 3))
    assert found.whole and found.take(x) is x and found.put(x, jnp.zeros((1, 3))) is x
    jaxpr = jax.make_jaxpr(lambda x: found.put(found.take(x), jnp.zeros((1, 3))))(x)
    assert [e for e in jaxpr.eqns if "gather" in e.primitive.name] == []


def test_blocks_stay_together():
    order = np.asarray(masking.random_order(jax.random.key(0), 7, 5, 6, block=2))
    np.testing.assert_array_equal(np.sort(order), np.tile(np.arange(30), (7, 1)))
    cell = (np.arange(30) // 6 // 2) * 3 + np.arange(30) % 6 // 2  # 3 x 3 of them, cut at the edge
    for row in cell[order]:
        changes = np.flatnonzero(np.diff(row))
        assert len(changes) == 8, "each block once, all of it"
    assert len({tuple(row) for row in cell[order]}) == 7


def test_an_order_of_named_tokens():
    visible = np.zeros((3, 8), bool)
    for i, at in enumerate(([1, 5], [0, 7], [2, 3])):
        visible[i, at] = True
    found = masking.split(masking.order_of(jnp.asarray(visible)), 2)
    np.testing.assert_array_equal(found.masked(), ~visible)
    np.testing.assert_array_equal(found.order[0], [1, 5, 0, 2, 3, 4, 6, 7])


@pytest.mark.parametrize("keep", [0, 25])
def test_a_split_keeps_one_to_all(keep):
    with pytest.raises(ValueError, match="of 24 tokens"):
        made(keep=keep)


@pytest.mark.parametrize("size", [64, 2])
def test_whitening_divides_by_one_less_than_the_numbers(size):
    x = np.random.default_rng(0).normal(3, 2, (2, 5, size)).astype(np.float32)
    mean, spread = x.mean(-1, keepdims=True), x.std(-1, keepdims=True, ddof=1)
    want = (x - mean) / np.sqrt(spread**2 + 1e-6)
    found = np.asarray(masking.whiten(jnp.asarray(x)))
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)  # f32 sums of up to 64 numbers
    other = (x - mean) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    assert np.abs(found - other).max() > 5e-3, "of ddof 0 it can be told apart"
    assert np.isfinite(masking.whiten(jnp.ones((1, 1, size)))).all()
