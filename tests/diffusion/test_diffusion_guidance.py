"""Guidance: what is combined, on which channels and times, and in how many calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_data import process

from dcae_jax.diffusion.guidance import GuidanceConfig, Reference, guided, null_class
from dcae_jax.diffusion.process import Kind, Prediction, Space
from dcae_jax.diffusion.samplers import Dopri5Config, EulerConfig, initial_noise, sample

CLASSES = 7
COND = {"label": jnp.array([0, 3, 6])}
NULL = null_class(COND, CLASSES)
X = jax.random.normal(jax.random.key(0), (3, 2, 2, 5))
T = jnp.array([0.2, 0.5, 0.8])


def denoiser(calls=None, factor=1.0):
    """A prediction that depends on x, t and the label of its own row, and says how it is called."""

    def denoise(x, t, cond):
        if calls is not None:
            calls.append(x.shape[0])
        label = cond["label"].astype(jnp.float32)[:, None, None, None]
        eps = factor * (jnp.sin(x + label) + t[:, None, None, None])
        return Prediction(x - eps, eps, 0.1 * label + 0.0 * x)

    return denoise


def test_null_class_is_the_index_after_the_last():
    assert NULL["label"].tolist() == [7, 7, 7] and NULL["label"].dtype == jnp.int32
    both = null_class(COND | {"size": jnp.ones((3, 2))}, CLASSES)
    assert both["size"].shape == (3, 2) and COND["label"].tolist() == [0, 3, 6]


def test_all_channels_are_guided_in_one_call():
    calls = []
    found = guided(GuidanceConfig(scale=1.5), denoiser(calls), COND, NULL)(X, T)
    a, b = denoiser()(X, T, COND), denoiser()(X, T, NULL)
    assert calls == [6]
    np.testing.assert_allclose(found.eps, b.eps + 1.5 * (a.eps - b.eps), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.x0, b.x0 + 1.5 * (a.x0 - b.x0), rtol=1e-6, atol=1e-6)
    # x0 and eps still belong to one x.
    np.testing.assert_allclose(found.x0 + found.eps, X, atol=2e-6)
    np.testing.assert_array_equal(found.variance_mix, a.variance_mix)


def test_scale_1_is_off_and_one_call_on_the_batch():
    calls = []
    found = guided(GuidanceConfig(), denoiser(calls), COND, NULL)(X, T)
    assert calls == [3]
    np.testing.assert_array_equal(found.eps, denoiser()(X, T, COND).eps)


def test_scale_0_is_without_classes():
    found = guided(GuidanceConfig(scale=0.0), denoiser(), COND, NULL)(X, T)
    np.testing.assert_allclose(found.eps, denoiser()(X, T, NULL).eps, atol=1e-6)


def test_three_channels_as_in_the_original_dit():
    found = guided(GuidanceConfig(scale=4.0, channels=3), denoiser(), COND, NULL)(X, T)
    every = guided(GuidanceConfig(scale=4.0), denoiser(), COND, NULL)(X, T)
    plain = denoiser()(X, T, COND)
    np.testing.assert_array_equal(found.eps[..., :3], every.eps[..., :3])
    np.testing.assert_array_equal(found.x0[..., 3:], plain.x0[..., 3:])
    assert (every.x0[..., 3:] != plain.x0[..., 3:]).all()


def test_interval_guides_the_rows_whose_time_is_in_it():
    cfg = GuidanceConfig(scale=2.0, start=0.4, stop=0.6)
    found = jax.jit(guided(cfg, denoiser(), COND, NULL))(X, T)
    plain = denoiser()(X, T, COND)
    every = guided(GuidanceConfig(scale=2.0), denoiser(), COND, NULL)(X, T)
    np.testing.assert_allclose(found.eps[1], every.eps[1], rtol=1e-6, atol=1e-6)
    # Outside a - b is added to b again: rounding.
    np.testing.assert_allclose(found.eps[::2], plain.eps[::2], rtol=1e-6, atol=1e-6)
    assert np.abs(found.eps[1] - plain.eps[1]).max() > 0.1
    for edge in (0.4, 0.6):
        at_edge = guided(cfg, denoiser(), COND, NULL)(X, jnp.full(3, edge, jnp.float32))
        assert np.abs(at_edge.eps - denoiser()(X, jnp.full(3, edge), COND).eps).max() > 0.1


def test_outside_the_interval_the_second_half_is_not_computed():
    executed = []

    def denoise(x, t, cond):
        jax.debug.callback(lambda t: executed.append(len(t)), t)
        return denoiser()(x, t, cond)

    cfg = GuidanceConfig(scale=2.0, start=0.25, stop=0.75)
    p = process(Kind.flow)
    bound = guided(cfg, denoise, COND, NULL)
    # Times 1.0, 0.9, ..., 0.1: five of them lie inside.
    jax.jit(
        lambda x: sample(EulerConfig().build(p), bound, x, jax.random.key(0), jnp.arange(3), 10)
    )(X)
    jax.effects_barrier()
    assert executed == [3] * 3 + [6] * 5 + [3] * 2


def test_autoguidance_takes_a_second_denoiser_with_the_same_classes():
    calls, cfg = [], GuidanceConfig(scale=1.7, reference=Reference.weak_model)
    found = guided(cfg, denoiser(calls), COND, NULL, weak=denoiser(calls, 0.5))(X, T)
    a, b = denoiser()(X, T, COND), denoiser(factor=0.5)(X, T, COND)
    assert calls == [3, 3]
    np.testing.assert_allclose(found.eps, b.eps + 1.7 * (a.eps - b.eps), rtol=1e-6, atol=1e-6)
    for reference, weak in ((Reference.weak_model, None), (Reference.null_class, denoiser())):
        with pytest.raises(ValueError, match="second denoiser"):
            guided(GuidanceConfig(2.0, reference), denoiser(), COND, NULL, weak)


def test_guidance_reaches_the_network_through_adaptive_steps():
    """Two classes, two points: with w the flow ends in null + w (class - null)."""
    p = process(Kind.flow)
    points = jnp.array([1.0, -1.0, 0.25])  # the last one is the null class

    def network(x, t, cond):
        data = points[cond["label"]][:, None, None, None]
        time = (1.0 - t)[:, None, None, None]  # published networks count from noise to data
        return (data - x) / jnp.maximum(time, 1e-3)

    cond = {"label": jnp.array([0, 1, 1])}
    bound = guided(GuidanceConfig(3.0), p.denoiser(network), cond, null_class(cond, 2))
    x1 = initial_noise(jax.random.key(2), jnp.arange(3), (2, 2, 1))
    sampler = Dopri5Config(end=0.001).build(p)
    end = jax.jit(lambda x: sample(sampler, bound, x, jax.random.key(0), jnp.arange(3)).x0)(x1)
    expected = 0.25 + 3.0 * (points[cond["label"]] - 0.25)
    # 0.001 of the way is left, and rtol is 1e-3.
    np.testing.assert_allclose(end.mean((1, 2, 3)), expected, atol=1e-2)


@pytest.mark.parametrize("space", [Space.eps, Space.v, Space.x0])
def test_guiding_the_prediction_is_guiding_the_output(space):
    p = process(Kind.scaled_linear, predict=space, loss_space=space)

    def network(x, n, cond):
        return jnp.cos(x * (1.0 + cond["label"][:, None, None, None]))

    found = guided(GuidanceConfig(1.5), p.denoiser(network), COND, NULL)(X, T)
    n = p.network_time(T)
    a, b = network(X, n, COND), network(X, n, NULL)
    expected = p.read(b + 1.5 * (a - b), X, T)
    np.testing.assert_allclose(found.eps, expected.eps, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.x0, expected.x0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("cfg", "says"),
    [
        (GuidanceConfig(scale=-1.0), "1 is off"),
        (GuidanceConfig(scale=float("nan")), "guidance.scale"),
        (GuidanceConfig(start=0.6, stop=0.4), "0 and 1 guide everywhere"),
        (GuidanceConfig(stop=1.5), "guidance.start"),
        (GuidanceConfig(channels=-1), "0 guides all"),
    ],
)
def test_problems(cfg, says):
    assert len(cfg.problems()) == 1 and says in cfg.problems()[0]
    assert not GuidanceConfig(scale=1.5, start=0.1, stop=0.7, channels=3).problems()
