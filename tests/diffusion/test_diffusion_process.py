"""Processes against the numbers of the papers, closed forms and a second, numpy, implementation."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from gaussian_data import process

from dcae_jax.diffusion.process import (
    Kind,
    Prediction,
    ProcessConfig,
    Space,
    TimeDraw,
    binned_log_likelihood,
    gaussian_kl,
)
from dcae_jax.errors import UserError

EPS, V, X0 = Space.eps, Space.v, Space.x0
TIMES = np.array([1, 2, 37, 500, 999, 1000]) / 1000


def latents(seed, rows=6, channels=3):
    x = np.random.default_rng(seed).normal(size=(rows, 2, 4, channels))
    return jnp.asarray(x, jnp.float32)


def alpha_sigma(kind, t):
    """float64, step by step as DDPM defines it."""
    if kind is Kind.flow:
        return 1 - t, t
    low, high = (1e-4, 0.02) if kind is Kind.ddpm else (0.00085, 0.012)
    if kind is Kind.ddpm:
        beta = low + (high - low) * np.arange(1000) / 999
    else:
        beta = (low**0.5 + (high**0.5 - low**0.5) * np.arange(1000) / 999) ** 2
    bar = [math.prod(1 - beta[: round(1000 * v)]) for v in t]
    return np.sqrt(bar), np.sqrt(1 - np.array(bar))


# ------------------------------------------------------------------------------------- schedules


def test_published_values_of_uvit():
    p = process(Kind.scaled_linear)
    bar = np.asarray(p.alpha(jnp.array([0.001, 1.0]))) ** 2
    np.testing.assert_allclose(bar, [0.99915, 0.0046601], rtol=1e-5)  # printed with 5 digits
    assert process(Kind.ddpm).alpha(jnp.array(1.0)) ** 2 == pytest.approx(4.0358e-5, rel=1e-4)


@pytest.mark.parametrize("kind", list(Kind))
def test_alpha_sigma_and_log_snr(kind):
    p, t = process(kind), jnp.asarray(TIMES, jnp.float32)
    alpha, sigma = alpha_sigma(kind, TIMES)
    # log alpha is up to 5 in float32: 5e-7 of alpha.
    np.testing.assert_allclose(p.alpha(t), alpha, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(p.sigma(t), sigma, rtol=2e-6)
    n = len(t) - (kind is Kind.flow)  # at t = 1 of the flow it is infinite
    expected = 2 * np.log(alpha[:n] / sigma[:n])
    np.testing.assert_allclose(p.log_snr(t)[:n], expected, rtol=1e-5, atol=5e-6)
    if kind is Kind.flow:
        assert p.log_snr(jnp.array([0.0, 1.0])).tolist() == [math.inf, -math.inf]
    else:
        # The product of no step: exactly the data.
        assert (float(p.alpha(jnp.array(0.0))), float(p.sigma(jnp.array(0.0)))) == (1.0, 0.0)
        assert p.log_snr(jnp.array(0.0)) == math.inf
        # Between the knots log alpha is linear.
        two = np.log(np.asarray(p.alpha(jnp.array([0.4, 0.401])), np.float64))
        assert float(p.log_alpha(jnp.array(0.4004))) == pytest.approx(two @ [0.6, 0.4], rel=1e-6)


@pytest.mark.parametrize("kind", list(Kind))
def test_the_times_of_ode_solvers(kind):
    p = process(kind)
    t = jnp.asarray(np.linspace(0.0, 1.0, 41), jnp.float32)
    # A rounding of the angle near pi / 2 is one of 1e-5 in log alpha, which is 10 per unit of t.
    np.testing.assert_allclose(p.time_of(p.angle(t)), t, atol=2e-6)
    # Along fixed x0 and eps the path over scale is a straight line in the clock ...
    x0, eps = latents(0, 3), latents(1, 3)
    ends = jnp.array([0.2, 0.5, 0.9])
    prediction = p.read(p.target(x0, eps, ends), p.diffuse(x0, eps, ends), ends)

    def on_path(v):
        return p.diffuse(x0, eps, jnp.full(3, v)), jnp.float32(v)

    (x, t), (y, s) = on_path(0.6), on_path(0.3)
    slope = (x / p.scale(t) - y / p.scale(s)) / (p.clock(t) - p.clock(s))
    np.testing.assert_allclose(slope, p.direction(prediction), atol=2e-5)  # differences of O(1)
    # ... and its derivative with respect to the angle is the velocity.
    (x, t), (y, s) = on_path(0.501), on_path(0.499)
    slope = (x - y) / (p.angle(t) - p.angle(s))
    found = p.velocity(Prediction(x0, eps, None), jnp.full(3, 0.5))
    np.testing.assert_allclose(slope, found, atol=2e-3)  # float32 over a step of 0.002


def test_network_times_are_the_published_ones():
    whole = jnp.arange(1, 1001) / 1000
    uvit, dit, sit = (process(k) for k in Kind)
    np.testing.assert_array_equal(uvit.network_time(whole), np.arange(1, 1001))
    np.testing.assert_array_equal(dit.network_time(whole), np.arange(1000))
    np.testing.assert_allclose(sit.network_time(whole), 1 - np.arange(1, 1001) / 1000, atol=1e-7)
    # DPM-Solver asks between them: not rounded.
    assert float(uvit.network_time(jnp.array(0.9667))) == pytest.approx(966.7, abs=1e-4)


# -------------------------------------------------------------------------------------- times


@pytest.mark.parametrize("kind", [Kind.scaled_linear, Kind.ddpm])
def test_discrete_times_are_uniform_over_the_integers(kind):
    p = process(kind)
    drawn = np.asarray(p.draw_times(jax.random.key(0), (200_000,))) * 1000
    n = np.round(drawn)
    assert np.abs(drawn - n).max() < 1e-4 and (n.min(), n.max()) == (1, 1000)
    counts = np.bincount(n.astype(int), minlength=1001)[1:]
    # chi^2 of 999 degrees of freedom: a right draw fails once in 1000 seeds, and the seed is fixed.
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
    known = np.arange(1, 1001) - (kind is Kind.ddpm)
    assert set(np.asarray(p.network_time(jnp.asarray(drawn / 1000))).tolist()) <= set(known)


@pytest.mark.parametrize(
    ("fields", "quantile"),
    [
        ({}, lambda q: q),
        ({"shift": 3.0}, lambda q: 3 * q / (1 + 2 * q)),
        (
            {"times": TimeDraw.logit_normal, "time_mean": 0.5, "time_std": 0.8},
            lambda q: 1 / (1 + np.exp(-0.5 - 0.8 * scipy.stats.norm.ppf(q))),
        ),
        (
            {"times": TimeDraw.logit_normal, "shift": 2.0},  # a shift moves the mean by log 2
            lambda q: 1 / (1 + np.exp(-math.log(2) - scipy.stats.norm.ppf(q))),
        ),
    ],
)
def test_flow_times_have_the_right_quantiles(fields, quantile):
    p = process(Kind.flow, **fields)
    drawn = np.asarray(p.draw_times(jax.random.key(1), (100_000,)), np.float64)
    assert 0 <= drawn.min() and drawn.max() <= 1
    levels = np.linspace(0.05, 0.95, 19)
    # The share below the true quantile is a binomial mean: 1.6e-3 of deviation, 3.5 of them.
    below = (drawn[:, None] <= quantile(levels)).mean(0)
    np.testing.assert_allclose(below, levels, atol=5.5e-3)


def test_draws_have_the_shape_asked_for_and_depend_on_the_key():
    for kind in Kind:
        p = process(kind)
        a, b = (p.draw_times(jax.random.key(k), (3, 2)) for k in (0, 1))
        assert a.shape == (3, 2) and a.dtype == jnp.float32 and (a != b).any()


# -------------------------------------------------------------------------- targets and losses


def spaces(kind, x0, eps, t):
    """All forms of (x0, eps) in float64."""
    a, s = (v[:, None, None, None] for v in alpha_sigma(kind, t))
    x0, eps = np.asarray(x0, np.float64), np.asarray(eps, np.float64)
    v = x0 - eps if kind is Kind.flow else a * eps - s * x0
    return a * x0 + s * eps, {X0: x0, EPS: eps, V: v}


# Predicting eps of the flow is refused, see below.
PREDICTED = [pair for pair in itertools.product(Kind, Space) if pair != (Kind.flow, EPS)]


@pytest.mark.parametrize(("kind", "predict"), PREDICTED)
def test_reading_the_target_gives_x0_and_eps_back(kind, predict):
    p = process(kind, predict=predict, loss_space=predict)
    x0, eps = latents(2), latents(3)
    t = TIMES.clip(None, 0.999)
    x_t, forms = spaces(kind, x0, eps, t)
    times = jnp.asarray(t, jnp.float32)
    np.testing.assert_allclose(p.diffuse(x0, eps, times), x_t, atol=2e-6)
    target = p.target(x0, eps, times)
    np.testing.assert_allclose(target, forms[predict], atol=2e-6)
    read = p.read(target, jnp.asarray(x_t, jnp.float32), times)
    # Rounding of x_t (3e-7) is divided by alpha, or by sigma, which are as small as this:
    a, s = alpha_sigma(kind, t)
    np.testing.assert_allclose(read.x0, forms[X0], atol=2e-6 / a.min())
    np.testing.assert_allclose(read.eps, forms[EPS], atol=2e-6 / s.min())
    assert read.variance_mix is None and read.x0.dtype == jnp.float32


@pytest.mark.parametrize("space", list(Space))
@pytest.mark.parametrize(("kind", "predict"), PREDICTED)
def test_loss_in_any_space_of_any_prediction(kind, predict, space):
    fields = {"times": TimeDraw.logit_normal} if kind is Kind.flow else {}
    p = process(kind, predict=predict, loss_space=space, **fields)
    x0, eps, output = latents(4, 4), latents(5, 4), latents(6, 4)
    t = np.array([0.1, 0.3, 0.6, 0.9])
    x_t, truth = spaces(kind, x0, eps, t)
    a, s = (v[:, None, None, None] for v in alpha_sigma(kind, t))
    out = np.asarray(output, np.float64)
    if predict is V:  # solve x_t = a x0 + s eps together with the definition of v
        found_x0 = x_t + s * out if kind is Kind.flow else a * x_t - s * out
        found_eps = (x_t - a * found_x0) / s
    elif predict is X0:
        found_x0, found_eps = out, (x_t - a * out) / s
    else:
        found_x0, found_eps = (x_t - s * out) / a, out
    v = found_x0 - found_eps if kind is Kind.flow else a * found_eps - s * found_x0
    expected = (({X0: found_x0, EPS: found_eps, V: v}[space] - truth[space]) ** 2).mean((1, 2, 3))
    loss = p.loss(output, x0, eps, jnp.asarray(x_t, jnp.float32), jnp.asarray(t, jnp.float32))
    assert loss.shape == (4,) and loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-5)  # squares of float32 ratios
    half = output.astype(jnp.bfloat16)  # a network in bfloat16: the loss is still float32
    assert p.loss(half, x0, eps, jnp.asarray(x_t, jnp.float32), jnp.asarray(t)).dtype == jnp.float32


@pytest.mark.parametrize("kind", list(Kind))
def test_min_snr_weighs_the_error_of_x0_in_every_space(kind):
    t = np.array([0.02, 0.2, 0.5, 0.8])
    x0, eps, output = latents(4, 4), latents(5, 4), latents(6, 4)
    x_t, _ = spaces(kind, x0, eps, t)
    x_t, times = jnp.asarray(x_t, jnp.float32), jnp.asarray(t, jnp.float32)
    a, s = alpha_sigma(kind, t)
    snr = (a / s) ** 2
    expected = {
        EPS: np.minimum(snr, 5) / snr,
        V: np.minimum(snr, 5) / (1 / s**2),  # 1 / sigma^2 is SNR + 1 for discrete processes
        X0: np.minimum(snr, 5),
    }
    if kind is not Kind.flow:
        np.testing.assert_allclose(1 / s**2, snr + 1)
    losses = []
    for space in Space:
        p = process(kind, predict=V, loss_space=space, min_snr=5.0)
        np.testing.assert_allclose(p.weight(times), expected[space], rtol=1e-5)
        losses.append(p.loss(output, x0, eps, x_t, times))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)  # v back to eps and x0: 1e-5 each
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-4)
    p = process(kind, predict=V, loss_space=X0, min_snr=5.0)
    assert np.isfinite(p.weight(jnp.array([0.0, 1.0]))).all()  # SNR infinite, and 0


# ------------------------------------------------------------------------------ learned variance


def slow_bound(output, x0, x_t, i):
    """One example in float64: improved DDPM's L_i in bits, from its definition."""
    beta = 1e-4 + (0.02 - 1e-4) * np.arange(1000) / 999
    bar, before = np.prod(1 - beta[: i + 1]), np.prod(1 - beta[:i])
    j = max(i, 1)
    least = beta[j] * (1 - np.prod(1 - beta[:j])) / (1 - np.prod(1 - beta[: j + 1]))
    eps, raw = np.split(output, 2, axis=-1)
    share = (raw + 1) / 2
    variance = np.exp(share * np.log(beta[i]) + (1 - share) * np.log(least))
    found = (x_t - np.sqrt(1 - bar) * eps) / np.sqrt(bar)

    def mean(x):
        return (np.sqrt(before) * beta[i] * x + np.sqrt(1 - beta[i]) * (1 - before) * x_t) / (
            1 - bar
        )

    if i:
        kl = 0.5 * (least / variance - 1 + np.log(variance / least))
        return (kl + 0.5 * (mean(x0) - mean(found)) ** 2 / variance).mean() / math.log(2)
    edges = [(x0 + sign / 255 - mean(found)) / np.sqrt(variance) for sign in (1, -1)]
    cdf = [0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (e + 0.044715 * e**3))) for e in edges]
    mass = np.where(x0 > 0.999, 1, cdf[0]) - np.where(x0 < -0.999, 0, cdf[1])
    return -np.log(mass.clip(1e-12)).mean() / math.log(2)


def test_variance_bound_against_its_definition():
    p = process(Kind.ddpm, learn_variance=True)
    x0, eps, output = 0.7 * latents(7), latents(8), latents(9, channels=6)
    t = jnp.asarray(TIMES, jnp.float32)
    x_t = p.diffuse(x0, eps, t)
    output = output.at[0, ..., :3].set(eps[0] + 0.3 * output[0, ..., :3])  # some bins hold mass
    indices = np.round(TIMES * 1000).astype(int) - 1
    rows = zip(*(np.asarray(v, np.float64) for v in (output, x0, x_t)), indices, strict=True)
    expected = np.array([slow_bound(*row) for row in rows])
    found = p.variance_bound(output, x0, x_t, t)
    # At i = 999 x0 is (x_t - sigma eps) / 0.0064, at i = 0 bins are 0.4 deviations: 2e-5.
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    mse = ((output[..., :3] - eps) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(p.loss(output, x0, eps, x_t, t), mse + expected, rtol=2e-5)


def test_variance_bound_does_not_move_the_mean():
    p = process(Kind.ddpm, learn_variance=True)
    x0, eps, output = latents(7), latents(8), latents(9, channels=6)
    t = jnp.asarray(TIMES, jnp.float32)
    x_t = p.diffuse(x0, eps, t)
    grad = jax.grad(lambda o: p.variance_bound(o, x0, x_t, t).sum())(jnp.asarray(output))
    assert (grad[..., :3] == 0).all() and (grad[1:, ..., 3:] != 0).all()
    assert np.isfinite(grad).all()


def test_kl_of_gaussians_against_an_integral():
    x = np.linspace(-30, 30, 400_001)
    p, q = scipy.stats.norm(0.3, 0.8), scipy.stats.norm(-0.5, 1.7)
    expected = np.trapezoid(p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), x)
    found = gaussian_kl(jnp.array(0.8), jnp.array(2 * math.log(0.8)), jnp.array(2 * math.log(1.7)))
    assert float(found) == pytest.approx(expected, rel=1e-6)
    zero = gaussian_kl(jnp.array(0.0), jnp.array(-3.0), jnp.array(-3.0))
    assert float(zero) == 0.0


def test_binned_likelihood_adds_up_to_one():
    levels = jnp.asarray(np.arange(256) / 127.5 - 1, jnp.float32)
    for mean, log_variance in ((0.1, -3.0), (0.95, -4.0), (-2.0, 0.0)):
        mass = jnp.exp(
            binned_log_likelihood(
                levels, jnp.full_like(levels, mean), jnp.full_like(levels, log_variance)
            )
        )
        assert float(mass.sum()) == pytest.approx(1.0, abs=2e-5)  # 256 differences of float32


# --------------------------------------------------------------------------------------- problems

FLOW = {"kind": Kind.flow, "predict": V, "loss_space": V}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (FLOW | {"predict": EPS}, "use predict=v or x0"),
        (FLOW | {"predict": X0}, "loss_space=x0, or min_snr=5"),
        (FLOW | {"predict": X0, "loss_space": EPS}, "times=logit_normal"),
        (FLOW | {"learn_variance": True}, "needs kind=ddpm"),
        (FLOW | {"shift": 0.0}, "1 leaves times as they are"),
        (FLOW | {"shift": math.nan}, "process.shift = nan"),
        (FLOW | {"times": TimeDraw.logit_normal, "time_std": 0.0}, "process.time_std = 0.0"),
        (FLOW | {"times": TimeDraw.logit_normal, "time_mean": math.inf}, "process.time_mean"),
        (FLOW | {"time_mean": 1.0}, "set times=logit_normal"),
        ({"times": TimeDraw.logit_normal}, "use times=uniform"),
        ({"shift": 2.0}, "use shift=1"),
        ({"learn_variance": True}, "needs kind=ddpm, not scaled_linear"),
        ({"min_snr": -1.0}, "0 switches it off"),
    ],
)
def test_combinations_without_sense_are_refused_with_a_mend(fields, says):
    cfg = ProcessConfig(**fields)
    assert len(cfg.problems()) == 1 and says in cfg.problems()[0]
    with pytest.raises(UserError, match="cannot be built"):
        cfg.build()


def test_all_problems_are_listed_and_what_is_offered_as_a_mend_works():
    bad = ProcessConfig(shift=2.0, times=TimeDraw.logit_normal, learn_variance=True, min_snr=-1.0)
    assert len(bad.problems()) == 4
    for mend in (
        {"times": TimeDraw.logit_normal}, {"loss_space": X0}, {"min_snr": 5.0}, {"predict": V}
    ):  # fmt: skip
        assert not ProcessConfig(**(FLOW | {"predict": X0} | mend)).problems()
    assert not ProcessConfig(kind=Kind.ddpm, learn_variance=True).problems()


def test_a_built_process_keeps_its_own_config():
    cfg = ProcessConfig(**FLOW)
    p = cfg.build()
    cfg.shift = 7.0
    assert p.cfg.shift == 1.0


@pytest.mark.parametrize(
    "cfg",
    [ProcessConfig(kind=Kind.flow, predict=Space.v, loss_space=Space.v, shift=3.0),
     # Shifts whose t / (s - (s - 1) t) is above 1 at t = 1 in float32.
     *(ProcessConfig(kind=Kind.flow, predict=Space.v, loss_space=Space.v, shift=s,
                     times=TimeDraw.logit_normal, time_mean=-0.5, time_std=1.3)
       for s in (1.3, 2.1213, 4.2426)),
     ProcessConfig(), ProcessConfig(kind=Kind.ddpm)],
)  # fmt: skip
def test_quantiles_and_shares_are_those_of_the_drawn_times(cfg):
    process = cfg.build()
    drawn = np.sort(np.asarray(process.draw_times(jax.random.key(0), (20_000,))))
    edges = np.array([0.0, 0.1, 0.3, 0.5, 0.9, 1.0], np.float32)
    found = np.asarray(process.share(jnp.asarray(edges)))
    below = np.searchsorted(drawn, edges, side="right") / len(drawn)
    np.testing.assert_allclose(found, below, atol=5 * 0.5 / np.sqrt(20_000))  # 5 deviations
    u = np.linspace(0.01, 0.99, 50, dtype=np.float32)
    t = process.quantile(jnp.asarray(u))
    # A discrete time is up to 1/1000 above; logit-normal: ndtri and ndtr in float32.
    np.testing.assert_allclose(process.share(t), u, atol=1.1e-3 if not cfg.is_flow else 1e-5)
