"""Losses and whole runs against the stored outputs of DiT, U-ViT and diffusers.

tests/parity/make_sampler_fixtures.py writes them; inputs and noise come from its numpy seeds.
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_data import process

from dcae_jax.diffusion.process import Kind
from dcae_jax.diffusion.samplers import (
    AncestralConfig,
    DDIMConfig,
    DPM2MConfig,
    DPMFastConfig,
    Variance,
)

PARITY = Path(__file__).parents[1] / "parity"
STORED = np.load(PARITY / "samplers.npz")


def _maker():
    spec = importlib.util.spec_from_file_location("maker", PARITY / "make_sampler_fixtures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = _maker()
X1 = jnp.asarray(MAKER.normal(6, *MAKER.SHAPE))


def denoiser(p):
    """The formulas of the fixtures as a network of this process."""

    def network(x, n, cond):
        u = (n + (p.cfg.kind is Kind.ddpm))[:, None, None, None] / 1000
        eps = MAKER.network(x, u, jnp.sin)
        if not p.cfg.learn_variance:
            return eps
        return jnp.concatenate([eps, MAKER.variance(x, jnp.sin)], -1)

    return lambda x, t: p.denoiser(network)(x, t, None)


def run(cfg, p, n):
    """The run with the stored noise instead of ours."""
    z = jnp.asarray(MAKER.steps_noise(n))
    return jax.jit(lambda x: cfg.build(p).run(denoiser(p), x, lambda k: z[k], n).x0)(X1)


def test_schedule_of_uvit():
    p, t = process(Kind.scaled_linear), jnp.array([0.001, 0.0335, 0.5, 0.77777, 1.0])
    # The original adds up 1000 logs in float32: 1e-6 of log alpha.
    np.testing.assert_allclose(p.alpha(t), STORED["uvit_alpha"], rtol=1e-5)
    np.testing.assert_allclose(0.5 * p.log_snr(t), STORED["uvit_lambda"], rtol=5e-5, atol=1e-5)


@pytest.mark.parametrize("calls", [30, 31, 32])
def test_singlestep_runs_of_uvit(calls):
    found = run(DPMFastConfig(), process(Kind.scaled_linear), calls)
    expected = STORED[f"uvit_fast_{calls}"]
    # The 1e-4, relative to latents of order 1; both sides are float32.
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("steps", [250, 10])
def test_respaced_ancestral_runs_of_dit(steps):
    found = run(AncestralConfig(), process(Kind.ddpm, learn_variance=True), steps)
    expected = STORED[f"dit_sample_{steps}"]
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_loss_of_dit_with_learned_variance():
    p = process(Kind.ddpm, learn_variance=True)
    x0, eps, indices = MAKER.loss_inputs()
    t = jnp.asarray((indices + 1) / 1000, jnp.float32)
    x0, eps = jnp.asarray(x0), jnp.asarray(eps)
    x_t = p.diffuse(x0, eps, t)
    u = t[:, None, None, None]
    output = jnp.concatenate([MAKER.network(x_t, u, jnp.sin), MAKER.variance(x_t, jnp.sin)], -1)
    loss = p.loss(output, x0, eps, x_t, t)
    bound = p.variance_bound(output, x0, x_t, t)
    # Float32 on both sides; at i = 998 and 999 x0 is a difference over alpha = 0.0064.
    np.testing.assert_allclose(bound, STORED["dit_vb"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(loss - bound, STORED["dit_mse"], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(loss, STORED["dit_loss"], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_ddim_of_diffusers(eta):
    found = run(DDIMConfig(eta=eta), process(Kind.scaled_linear), 20)
    expected = STORED[f"ddim_{eta:g}"]
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_multistep_of_diffusers():
    found = run(DPM2MConfig(), process(Kind.scaled_linear), 20)
    expected = STORED["dpm_2m"]
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "cfg", "learned"),
    [
        ("fixed_small", AncestralConfig(), False),
        ("fixed_large", AncestralConfig(variance=Variance.beta), False),
        ("learned_range", AncestralConfig(), True),
    ],
)
def test_ddpm_step_of_diffusers(name, cfg, learned):
    p = process(Kind.ddpm, learn_variance=learned)
    t, s = jnp.float32(0.601), jnp.float32(0.561)
    z = jnp.asarray(MAKER.steps_noise(1)[0])
    found = cfg.build(p).step(X1, t, s, denoiser(p)(X1, jnp.full(2, t)), z)
    np.testing.assert_allclose(found, STORED[f"ddpm_{name}"], atol=1e-5)  # float32 on both sides
