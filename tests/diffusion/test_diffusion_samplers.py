"""Samplers on Gaussian data, whose denoiser and whose ODE are known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from gaussian_data import DEVIATION, MEAN, denoiser, marginal, ode_end, process
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dcae_jax.diffusion.process import Kind, Prediction, ProcessConfig, Space
from dcae_jax.diffusion.samplers import (
    SAMPLERS,
    AncestralConfig,
    DDIMConfig,
    Dopri5Config,
    DPM2MConfig,
    DPMFastConfig,
    EulerConfig,
    HeunConfig,
    Variance,
    initial_noise,
    noise,
    sample,
    step_noise,
)
from dcae_jax.errors import UserError

SHAPE = (2, 3, 2)  # of one latent
KEY = jax.random.key(5)


def run(cfg, p, denoise, rows=3, steps=None, x1=None):
    """A jitted run of the samples 0, 1, ..."""
    sampler, indices = cfg.build(p), jnp.arange(rows)
    x1 = initial_noise(KEY, indices, SHAPE) if x1 is None else x1
    return jax.jit(lambda x, i: sample(sampler, denoise, x, KEY, i, steps))(x1, indices)


# ---------------------------------------------------------------------------- order of convergence

ORDERS = [
    # Ends are away from t = 0, where log-SNR and sigma / alpha are not smooth in t.
    (Kind.scaled_linear, DDIMConfig(end=0.05), 1, (64, 128, 256, 512, 1000)),
    (Kind.flow, DDIMConfig(), 1, (64, 128, 256, 512, 1000)),
    (Kind.ddpm, EulerConfig(end=0.05), 1, (64, 128, 256, 512, 1000)),
    (Kind.flow, EulerConfig(), 1, (64, 128, 256, 512, 1000)),
    (Kind.scaled_linear, HeunConfig(end=0.05), 2, (32, 64, 128, 256, 512)),
    (Kind.flow, HeunConfig(), 2, (32, 64, 128, 256, 512)),
    (Kind.scaled_linear, DPM2MConfig(end=0.05), 2, (32, 64, 128, 256, 512)),
    (Kind.ddpm, DPM2MConfig(end=0.05), 2, (32, 64, 128, 256, 512)),
    (Kind.flow, DPM2MConfig(end=0.05), 2, (32, 64, 128, 256, 512)),
    # 3 k + 2 calls: a last step of order 2 has an error of h^3 and leaves 3 whole.
    (Kind.scaled_linear, DPMFastConfig(end=0.1), 3, (62, 122, 242, 482, 962)),
    # 3 k + 1 and 3 k calls end in one step of order 1: h^2, as the published run of 30 calls.
    (Kind.scaled_linear, DPMFastConfig(end=0.1), 2, (60, 120, 240, 480, 960)),
]


@pytest.mark.parametrize(
    ("kind", "cfg", "order", "steps"), ORDERS, ids=lambda v: getattr(v, "value", None)
)
def test_order_of_convergence(kind, cfg, order, steps):
    with jax.enable_x64(True):  # the errors of order 3 end below float32's rounding
        p = process(kind, shift=1.5) if kind is Kind.flow else process(kind)
        x1 = jnp.linspace(-2.0, 2.0, 6, dtype=jnp.float64).reshape(3, 2, 1, 1)
        exact = ode_end(p, x1, float(p.shifted(jnp.asarray(cfg.end))))
        errors = [
            float(jnp.abs(run(cfg, p, denoiser(p), 3, n, x1).x0 - exact).max()) for n in steps
        ]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.2, (slope, errors)
    assert 1e-12 < errors[-1] < 0.01


@pytest.mark.slow  # four programs of diffrax
@pytest.mark.parametrize("kind", [Kind.flow, Kind.scaled_linear])
def test_the_error_of_dopri5_is_proportional_to_its_tolerance(kind):
    """Steps have a local error of h^5 (the estimate) and leave one of h^5 in the end: power 1."""
    end, tolerances = (0.0 if kind is Kind.flow else 0.05), (1e-6, 1e-7, 1e-8, 1e-9)
    with jax.enable_x64(True):
        p = process(kind)
        x1 = jnp.linspace(-2.0, 2.0, 6, dtype=jnp.float64).reshape(3, 2, 1, 1)
        exact = ode_end(p, x1, end)
        errors = [
            float(jnp.abs(run(Dopri5Config(r, r, end=end), p, denoiser(p), x1=x1).x0 - exact).max())
            for r in tolerances
        ]
    power = np.polyfit(np.log(tolerances), np.log(errors), 1)[0]
    assert abs(power - 1) < 0.2, (power, errors)


@pytest.mark.parametrize("kind", list(Kind))
def test_dopri5_follows_the_ode(kind):
    p = process(kind)
    end = 0.0 if kind is Kind.flow else 0.001
    x1 = initial_noise(KEY, jnp.arange(3), SHAPE)
    tight = run(Dopri5Config(rtol=1e-5, atol=1e-6, end=end), p, denoiser(p), x1=x1)
    loose = run(Dopri5Config(end=end), p, denoiser(p), x1=x1)
    exact = ode_end(p, x1, end)
    # rtol bounds the error of one step, relative to x / scale; some ten steps add up.
    np.testing.assert_allclose(tight.x0, exact, atol=2e-4)
    # At 1e-3 a step may jump over most of the way; scipy's RK45 is as far off (0.02).
    np.testing.assert_allclose(loose.x0, exact, atol=5e-2)
    assert (loose.evaluations < tight.evaluations).all()


def test_float32_is_enough_for_the_published_run():
    p = process(Kind.scaled_linear)
    x1 = initial_noise(KEY, jnp.arange(3), SHAPE)
    found = run(DPMFastConfig(), p, denoiser(p), x1=x1).x0
    with jax.enable_x64(True):
        exact = run(DPMFastConfig(), p, denoiser(p), x1=jnp.asarray(x1, jnp.float64)).x0
    assert found.dtype == jnp.float32 and exact.dtype == jnp.float64
    np.testing.assert_allclose(found, exact, atol=2e-5)  # x0 = x / alpha is 15 times x at t = 1


def test_published_grid_and_orders_of_the_singlestep_solver():
    fast = DPMFastConfig().build(process(Kind.scaled_linear))
    np.testing.assert_allclose(fast.times(30), np.linspace(1, 0.001, 31), atol=1e-7)
    assert fast.orders(30) == [3] * 9 + [2, 1]
    assert fast.orders(31) == [3] * 10 + [1] and fast.orders(32) == [3] * 10 + [2]
    assert [fast.orders(n) for n in (1, 2, 3, 4)] == [[1], [2], [2, 1], [3, 1]]
    assert all(sum(fast.orders(n)) == n for n in range(1, 100))


def test_published_indices_of_the_respaced_ddpm():
    sampler = AncestralConfig().build(process(Kind.ddpm))
    seen = np.round(np.asarray(sampler.process.network_time(sampler.times(250)[:-1]))).astype(int)
    assert seen.tolist() == [round(k * 999 / 249) for k in reversed(range(250))]
    assert sampler.times(250)[-1] == 0 and sampler.times(1).tolist() == [1.0, 0.0]
    every = sampler.process.network_time(sampler.times(1000)[:-1])
    np.testing.assert_array_equal(every, np.arange(999, -1, -1))


def test_shift_moves_the_grid_of_the_flow():
    grid = EulerConfig(steps=4).build(process(Kind.flow, shift=3.0)).times(4)
    np.testing.assert_allclose(grid, [1, 0.9, 0.75, 0.5, 0], atol=1e-6)


# ------------------------------------------------------------------------------------ calls counted


@pytest.mark.parametrize(
    ("cfg", "kind", "steps", "calls"),
    [
        (AncestralConfig(), Kind.ddpm, 7, 7),
        (DDIMConfig(), Kind.flow, 7, 7),
        (EulerConfig(), Kind.flow, 7, 7),
        (HeunConfig(), Kind.flow, 7, 13),
        (HeunConfig(end=0.01), Kind.flow, 7, 14),
        (HeunConfig(), Kind.flow, 1, 1),
        (DPM2MConfig(), Kind.ddpm, 7, 7),
        (DPMFastConfig(), Kind.scaled_linear, 30, 30),
        (DPMFastConfig(), Kind.scaled_linear, 8, 8),
        (DPMFastConfig(), Kind.scaled_linear, 1, 1),
        (DPMFastConfig(), Kind.scaled_linear, None, 30),
        (Dopri5Config(), Kind.flow, None, None),
    ],
)
def test_number_of_calls(cfg, kind, steps, calls):
    p, seen = process(kind), []
    found = run(cfg, p, denoiser(p, seen=seen), steps=steps).evaluations
    jax.effects_barrier()
    assert found.shape == (3,) and int(found.max()) == len(seen)
    if calls is not None:
        assert (found == calls).all()


def test_no_call_leaves_the_times_that_networks_know():
    """Discrete networks know t from 0.001 to 1, whatever the number of steps."""
    p, seen = process(Kind.scaled_linear), []
    for cfg in (DDIMConfig(), HeunConfig(), DPM2MConfig(), DPMFastConfig()):
        seen.append(cfg.build(p).times(1000)[:-1])
    run(HeunConfig(), p, denoiser(p, seen=seen), steps=100)  # no call at its last time, 0
    run(Dopri5Config(end=1e-3), p, denoiser(p, seen=seen))
    jax.effects_barrier()
    times = np.concatenate(seen)
    assert times.min() > 0.001 - 1e-6 and times.max() < 1 + 1e-6


def test_one_scan_and_one_compile():
    """The traced network appears once in a scanned run, however many steps."""
    p = process(Kind.scaled_linear)
    for cfg, times in ((DDIMConfig(), 1), (DPM2MConfig(), 1), (AncestralConfig(), 1),
                       (HeunConfig(), 3), (DPMFastConfig(), 6)):  # fmt: skip
        traced = []

        def denoise(x, t, traced=traced):
            traced.append(x.shape)
            return denoiser(p)(x, t)

        run(cfg, p, denoise, steps=60)
        assert len(traced) == times


# ------------------------------------------------------------------------------ random processes


def statistics(x, mean, deviation):
    """Mean and variance match to 4 standard errors, and the whole distribution to a KS test."""
    n, x = x.size, np.asarray(x, np.float64).ravel()
    assert abs(x.mean() - mean) < 4 * deviation / np.sqrt(n)
    assert abs(x.var() / deviation**2 - 1) < 4 * np.sqrt(2 / n)
    assert scipy.stats.kstest(x, scipy.stats.norm(mean, deviation).cdf).pvalue > 1e-3


def exact_start(p, rows, mean, deviation):
    """x at t = 1 as the data make it: standard normal noise is not quite that."""
    center, width = marginal(p, jnp.array(1.0), mean, deviation)
    return center + width * initial_noise(KEY, jnp.arange(rows), (4, 5, 5))


@pytest.mark.parametrize("steps", [10, 250])
def test_ancestral_ddpm_with_the_exact_learned_variance(steps):
    """With the true variance of x_s given x_t every step is exact, so any number of them is."""
    p = process(Kind.ddpm, learn_variance=True)
    cfg = AncestralConfig()
    grid = cfg.build(p).times(steps)

    def mix(t):
        s = grid[jnp.argmin(jnp.abs(grid - t)) + 1]
        (a, b), (sa, sb) = ((f(t), f(s)) for f in (p.alpha, p.sigma))
        beta = sa**2 - (a / b) ** 2 * sb**2
        least = jnp.maximum(beta * sb**2 / sa**2, 1e-12)  # s = 0: not used
        unsure = DEVIATION**2 * sa**2 / marginal(p, t)[1] ** 2  # Var[x0 | x_t]
        variance = least + (b * beta / sa**2) ** 2 * unsure
        return (jnp.log(variance) - jnp.log(least)) / (jnp.log(beta) - jnp.log(least))

    x1 = exact_start(p, 200, MEAN, DEVIATION)
    end = run(cfg, p, denoiser(p, mix=mix), 200, steps, x1).x0
    statistics(end, MEAN, DEVIATION)


def test_ancestral_ddpm_with_variance_beta_is_exact_for_unit_variance():
    p = process(Kind.scaled_linear)
    end = run(AncestralConfig(variance=Variance.beta), p, denoiser(p, 0.0, 1.0), 200, 50,
              exact_start(p, 200, 0.0, 1.0)).x0  # fmt: skip
    # The last step adds no noise: Var[x0 | x_0.001] = 0.00085 is missing, 3 % of a 4-sigma bound.
    statistics(end, 0.0, 1.0)


def test_ancestral_ddpm_with_posterior_variance_ends_in_a_point():
    p = process(Kind.ddpm)
    end = run(AncestralConfig(), p, denoiser(p, MEAN, 0.0), 3, 20).x0
    # x0 = (x_t - sigma eps) / alpha in closed form: only rounding is left.
    np.testing.assert_allclose(end, MEAN, atol=1e-6)


@pytest.mark.parametrize("kind", [Kind.scaled_linear, Kind.ddpm])
def test_ddim_with_eta_1_is_the_ancestral_step(kind):
    p = process(kind)
    ddim, ddpm = DDIMConfig(eta=1.0).build(p), AncestralConfig().build(p)
    x, z = (initial_noise(jax.random.key(k), jnp.arange(3), SHAPE) for k in (1, 2))
    for t, s in ((1.0, 0.9), (0.5, 0.48), (0.02, 0.01), (0.001, 0.0)):
        t, s = jnp.float32(t), jnp.float32(s)
        found = denoiser(p)(x, jnp.full(3, t))
        # The same mean written with x0 and eps, or with x0 and x: 1e-6 of either.
        np.testing.assert_allclose(
            ddim.step(x, t, s, found, z), ddpm.step(x, t, s, found, z), atol=5e-6
        )


@pytest.mark.parametrize("kind", list(Kind))
def test_euler_and_ddim_without_noise_are_one_method(kind):
    p = process(kind)
    a, b = (run(cfg(), p, denoiser(p), steps=20).x0 for cfg in (EulerConfig, DDIMConfig))
    np.testing.assert_allclose(a, b, atol=2e-5)  # x / alpha is up to 500 at t = 1


@pytest.mark.parametrize("kind", [Kind.flow, Kind.scaled_linear])
def test_ddim_with_eta_1_samples_the_data(kind):
    p = process(kind)
    end = run(DDIMConfig(eta=1.0), p, denoiser(p), 200, 1000, exact_start(p, 200, MEAN, DEVIATION))
    # The posterior's variance is short of the true one by O(1 / steps): within the 4 sigma here.
    statistics(end.x0, MEAN, DEVIATION)


# -------------------------------------------------------------------- a sample is its index's alone


def network(p):
    """A denoiser that mixes the numbers of a sample by matrix products, as a network does."""
    w = jax.random.normal(jax.random.key(3), (12, 12)) / 12**0.5

    def denoise(x, t):
        flat = jnp.concatenate([x.reshape(-1, 12)], -1)
        eps = (jnp.tanh(flat @ w + t[:, None]) @ w.T).reshape(x.shape)
        a, s = (v[:, None, None, None] for v in (p.alpha(t), p.sigma(t)))
        eps = s * (x - a * eps)  # x0 stays bounded where alpha is small
        x0 = (a * x + s**2 * eps) / (1.0 + s)
        return Prediction(x0, eps, jnp.full_like(x, 0.4))

    return denoise


CASES = {
    "ddpm": (AncestralConfig(), process(Kind.ddpm, learn_variance=True), 12),
    "ddim": (DDIMConfig(eta=0.5), process(Kind.scaled_linear), 12),
    "euler": (EulerConfig(), process(Kind.flow), 12),
    "heun": (HeunConfig(), process(Kind.flow), 12),
    "dpm_fast": (DPMFastConfig(), process(Kind.scaled_linear), 12),
    "dpm_2m": (DPM2MConfig(), process(Kind.flow), 12),
    "dopri5": (Dopri5Config(), process(Kind.flow), None),
}


def close(name):
    """Noise and times are bit-equal; XLA may sum a product of other shape in another order.

    Dopri5's steps follow from an estimate of the error, a small difference of rounded numbers, so
    they differ by 1e-4 of themselves, and what they leave of error (1e-3) with them.
    """
    return {"rtol": 1e-6, "atol": 5e-5 if name == "dopri5" else 2e-6}


ALIKE = ("ddim", "euler", "heun", "dpm_2m")  # one scan over common times, without noise


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ALIKE else n for n in SAMPLERS]
)
def test_a_sample_does_not_depend_on_its_batch(name):
    cfg, p, steps = CASES[name]
    assert type(cfg) is SAMPLERS[name]
    sampler, denoise = cfg.build(p), network(p)

    @jax.jit
    def go(indices):
        return sample(sampler, denoise, initial_noise(KEY, indices, SHAPE), KEY, indices, steps)

    whole = go(jnp.arange(8))
    assert np.isfinite(whole.x0).all() and np.std(whole.x0, axis=0).min() > 1e-3
    for rows in ([0], [5], [2, 3, 4], [7, 0, 6]):
        part = go(jnp.array(rows))
        np.testing.assert_allclose(part.x0, whole.x0[np.array(rows)], **close(name))
        np.testing.assert_array_equal(part.evaluations, whole.evaluations[np.array(rows)])


@pytest.mark.parametrize(
    "name", ["ddpm", "dpm_fast", pytest.param("dopri5", marks=pytest.mark.slow)]
)
def test_a_sample_does_not_depend_on_the_mesh(name):
    cfg, p, steps = CASES[name]
    sampler, denoise = cfg.build(p), network(p)
    mesh = Mesh(np.array(jax.devices()).reshape(8), ("data",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec("data"))

    @jax.jit
    def go(indices):
        return sample(sampler, denoise, initial_noise(KEY, indices, SHAPE), KEY, indices, steps)

    one, many = go(jnp.arange(8)), go(jax.device_put(jnp.arange(8), spread))
    assert len(many.x0.sharding.device_set) == 8
    np.testing.assert_allclose(many.x0, one.x0, **close(name))


def test_noise_is_a_function_of_key_and_index():
    all_of_them = noise(KEY, jnp.arange(100), (4, 4, 2))
    np.testing.assert_array_equal(noise(KEY, jnp.array([41]), (4, 4, 2))[0], all_of_them[41])
    first = step_noise(KEY, jnp.arange(100), (4, 4, 2))
    others = [initial_noise(KEY, jnp.arange(100), (4, 4, 2)), first(0), first(1)]
    flat = np.stack([np.asarray(v).ravel() for v in (all_of_them, *others)])
    # Independent draws of 3200 numbers: correlations of 0.018 in one deviation.
    assert np.abs(np.corrcoef(flat) - np.eye(4)).max() < 0.07
    assert scipy.stats.kstest(flat[1], "norm").pvalue > 1e-3
    assert len(np.unique(np.asarray(all_of_them).reshape(100, -1)[:, 0])) == 100


# ----------------------------------------------------------------------------------------- dopri5


def decaying(rates):
    """x' = rate x (1 - x^2) in the flow's clock: each sample as stiff as its own rate."""

    def denoise(x, t):
        slope = rates[:, None, None, None] * x * (1.0 - x**2)
        return Prediction(x - t[:, None, None, None] * slope,
                          x + (1.0 - t[:, None, None, None]) * slope, None)  # fmt: skip

    return denoise


@pytest.mark.slow
def test_dopri5_takes_its_own_steps_for_each_sample():
    p, rates = process(Kind.flow), jnp.array([0.0, -5.0, -60.0])
    found = run(Dopri5Config(), p, decaying(rates))
    easy, middle, hard = found.evaluations.tolist()
    assert easy < middle < hard
    for i in range(3):
        x1 = initial_noise(KEY, jnp.array([i]), SHAPE)
        alone = run(Dopri5Config(), p, decaying(rates[i : i + 1]), 1, x1=x1)
        np.testing.assert_allclose(alone.x0[0], found.x0[i], rtol=1e-6, atol=1e-6)
        assert alone.evaluations[0] == found.evaluations[i]


@pytest.mark.slow
def test_dopri5_that_gives_up_says_so_in_that_sample_alone():
    rates = jnp.array([0.0, -5.0, -60.0])
    found = run(Dopri5Config(max_steps=12), process(Kind.flow), decaying(rates))
    assert np.isfinite(found.x0[:2]).all() and np.isnan(found.x0[2]).all()


@pytest.mark.slow
def test_dopri5_calls_the_network_on_the_whole_batch():
    p, shapes = process(Kind.flow), []

    def denoise(x, t):
        shapes.append((x.shape, t.shape))
        return denoiser(p)(x, t)

    run(Dopri5Config(), p, denoise)
    assert set(shapes) == {((3, *SHAPE), (3,))}


# ---------------------------------------------------------------------------------------- problems

FLOW = ProcessConfig(kind=Kind.flow, predict=Space.v, loss_space=Space.v)
FLOW_X0 = ProcessConfig(kind=Kind.flow, predict=Space.x0, loss_space=Space.x0)
VP = ProcessConfig()


@pytest.mark.parametrize(
    ("cfg", "process", "says"),
    [
        (AncestralConfig(), FLOW, "use DDIM with eta = 1"),
        (AncestralConfig(steps=0), VP, "a sampler needs 1 or more"),
        (AncestralConfig(steps=1001), VP, "more than the 1000 of scaled_linear"),
        (AncestralConfig(variance=Variance.learned), VP, "use variance=posterior"),
        (DDIMConfig(eta=1.5), VP, "0 is deterministic"),
        (DDIMConfig(steps=-1), FLOW, "sampler.steps = -1"),
        (DDIMConfig(steps=2000), VP, "more than the 1000"),
        (EulerConfig(end=1.0), FLOW, "use 0 or 0.001"),
        (HeunConfig(end=0.0001), VP, "use end=0.001"),
        (HeunConfig(steps=0), FLOW, "sampler.steps = 0"),
        (DPMFastConfig(), FLOW, "use DPM-Solver++ 2M or Heun"),
        (DPMFastConfig(end=0.0), VP, "the log-SNR is infinite"),
        (DPM2MConfig(steps=0), VP, "sampler.steps = 0"),
        (Dopri5Config(), VP, "use end=0.001"),
        (Dopri5Config(), FLOW_X0, "divides by sigma = 0"),
        (Dopri5Config(rtol=0.0), FLOW, "sampler.rtol"),
        (Dopri5Config(atol=float("nan")), FLOW, "sampler.atol"),
        (Dopri5Config(max_steps=0), FLOW, "sampler.max_steps = 0"),
    ],
)
def test_samplers_that_cannot_run_are_refused_with_a_mend(cfg, process, says):
    found = list(dict.fromkeys(cfg.problems() + cfg.process_problems(process)))
    assert len(found) == 1 and says in found[0]
    with pytest.raises(UserError, match="this sampler cannot run") as e:
        cfg.build(process.build())
    assert str(e.value).count("\n") == 1


def test_wrong_steps_of_a_run_are_refused():
    x1, indices = jnp.zeros((1, *SHAPE)), jnp.arange(1)
    for cfg, steps, says in ((EulerConfig(), 0, "steps = 0"), (DDIMConfig(), 1001, "than the 1000"),
                             (Dopri5Config(end=0.001), 50, "chooses its own steps")):  # fmt: skip
        with pytest.raises(UserError, match=says):
            sample(cfg.build(VP.build()), lambda x, t: None, x1, KEY, indices, steps)


def test_what_is_allowed():
    learned = ProcessConfig(kind=Kind.ddpm, learn_variance=True)
    for cfg in (DDIMConfig(), DPMFastConfig(), DPM2MConfig(), HeunConfig(), AncestralConfig(),
                Dopri5Config(end=0.001)):  # fmt: skip
        assert not cfg.problems() and not cfg.process_problems(learned)  # ODEs leave it aside
    for cfg in (DDIMConfig(eta=1.0), EulerConfig(steps=5000), HeunConfig(), DPM2MConfig()):
        assert not cfg.process_problems(FLOW) and not cfg.process_problems(FLOW_X0)


@pytest.mark.parametrize("cfg", [HeunConfig(), DPM2MConfig(), EulerConfig(), DDIMConfig(eta=1.0)])
def test_networks_that_predict_the_data_of_a_flow_stay_finite_at_its_ends(cfg):
    p = FLOW_X0.build()
    read = p.denoiser(lambda x, t, cond: 0.5 * x + cond)
    end = run(cfg, p, lambda x, t: read(x, t, 0.1), steps=5).x0
    assert np.isfinite(end).all()


# ------------------------------------------------------------------- from data with noise of time t

FROM_THE_MIDDLE = [
    (Kind.flow, HeunConfig(steps=100)),
    (Kind.flow, DPM2MConfig(steps=200)),
    (Kind.scaled_linear, DPMFastConfig(steps=240)),
    pytest.param(Kind.flow, DDIMConfig(steps=1000), marks=pytest.mark.slow),
    pytest.param(Kind.ddpm, EulerConfig(steps=1000), marks=pytest.mark.slow),
    pytest.param(Kind.scaled_linear, Dopri5Config(1e-5, 1e-6, end=0.001), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "cfg"), FROM_THE_MIDDLE, ids=lambda v: getattr(v, "value", None))
def test_a_run_from_the_middle_follows_the_ode_from_there(kind, cfg):
    """The quantile of the marginal stays, wherever the run begins."""
    p, t = process(kind, shift=1.5) if kind is Kind.flow else process(kind), 0.4
    sampler, x = cfg.build(p).starting(t), jnp.linspace(-2.0, 2.0, 6).reshape(3, 2, 1, 1)
    np.testing.assert_allclose(sampler.times(7)[0], t, rtol=1e-6)
    found = jax.jit(lambda x: sample(sampler, denoiser(p), x, KEY, jnp.arange(3)))(x)
    (m1, d1), (m, d) = (marginal(p, jnp.float32(end)) for end in (t, float(sampler.times(7)[-1])))
    # Errors of the methods at these numbers of steps, 1e-5 to 4e-3; from t = 1 it is off by 0.1.
    np.testing.assert_allclose(found.x0, m + d * (x - m1) / d1, atol=5e-3)
    assert cfg.build(p).times(5)[0] == 1.0, "the sampler itself still starts from noise"
    if not isinstance(cfg, Dopri5Config):
        share = {Kind.flow: t / (1.5 - 0.5 * t)}.get(kind, t)
        wanted = cfg.build(p).evaluations(round(cfg.steps * share))
        assert found.evaluations.tolist() == [wanted] * 3


def test_ancestral_sampling_from_the_middle_walks_the_times_that_are_left():
    sampler = AncestralConfig(steps=10, variance=Variance.posterior).build(process(Kind.ddpm))
    assert sampler.starting(1.0).times(10).tolist() == sampler.times(10).tolist()
    half = sampler.starting(0.5)
    assert half.check_steps(None) == 5
    indices = [round(k * 499 / 4) for k in reversed(range(5))]
    np.testing.assert_allclose(half.times(5), [*((i + 1) / 1000 for i in indices), 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("cfg", "t"),
    [(HeunConfig(), 0.0), (HeunConfig(), 1.1), (DPM2MConfig(end=0.3), 0.2),
     (AncestralConfig(), 1e-4)],
)  # fmt: skip
def test_impossible_starts_are_refused(cfg, t):
    kind = Kind.ddpm if isinstance(cfg, AncestralConfig) else Kind.flow
    with pytest.raises(UserError, match="it must lie above"):
        cfg.build(process(kind)).starting(t)
