"""Gaussian data N(MEAN, DEVIATION^2): the exact denoiser and the exact ODE are known."""

import jax
import jax.numpy as jnp

from dcae_jax.diffusion.process import Kind, Prediction, ProcessConfig, Space

MEAN, DEVIATION = 0.7, 0.6


def process(kind, **fields):
    """The process of that kind with its published target."""
    space = Space.v if kind is Kind.flow else Space.eps
    return ProcessConfig(kind=kind, **({"predict": space, "loss_space": space} | fields)).build()


def marginal(p, t, mean=MEAN, deviation=DEVIATION):
    """Mean and deviation of x_t."""
    return p.alpha(t) * mean, jnp.sqrt((p.alpha(t) * deviation) ** 2 + p.sigma(t) ** 2)


def denoiser(p, mean=MEAN, deviation=DEVIATION, mix=None, seen=None):
    """E[x0 | x_t] and E[eps | x_t]; `mix(t)` gives the variance, `seen` collects the times."""

    def denoise(x, t):
        if seen is not None:
            jax.debug.callback(lambda t: seen.append(t), t)
        center, width = marginal(p, t, mean, deviation)
        column = lambda v: v[:, None, None, None]  # noqa: E731
        gap = (x - column(center)) / column(width) ** 2
        x0 = mean + column(p.alpha(t)) * deviation**2 * gap
        share = None if mix is None else jnp.full_like(x, mix(t[0]))
        return Prediction(x0, column(p.sigma(t)) * gap, share)

    return denoise


def ode_end(p, x1, end):
    """Where the probability-flow ODE takes x1 from t = 1 to `end`: the quantile stays."""
    (m1, d1), (m, d) = (marginal(p, jnp.asarray(t, x1.dtype)) for t in (1.0, end))
    return m + d * (x1 - m1) / d1
