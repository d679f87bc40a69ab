"""Samples of a model through the Generator: closed forms, guidance, and that an index is alone."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcae_jax import rng, sharding
from dcae_jax.config import MeshConfig, RunConfig
from dcae_jax.diffusion.guidance import GuidanceConfig, Reference
from dcae_jax.diffusion.process import Kind, ProcessConfig, Space
from dcae_jax.diffusion.samplers import (
    AncestralConfig,
    DDIMConfig,
    Dopri5Config,
    DPM2MConfig,
    DPMFastConfig,
    EulerConfig,
    HeunConfig,
)
from dcae_jax.generator import Generator
from dcae_jax.models.dit import DiTConfig
from dcae_jax.models.layers import Dtype
from dcae_jax.tasks.base import Variables
from dcae_jax.tasks.diffuse import DiffuseConfig
from dcae_jax.tasks.latents import Normalisation

SEED, CLASSES, SHAPE = 3, 3, (2, 2, 4)
FLOW = ProcessConfig(kind=Kind.flow, predict=Space.v, loss_space=Space.v)
SHIFT, SCALE = np.array([0.5, -1.0, 0.0, 2.0], "f4"), np.array([2.0, 0.5, 1.0, 4.0], "f4")
INDEX = np.array([7, 0, 2, 100_003], np.int32)  # in no order: an index is all that counts
LABELS = np.array([2, 0, 1, 2], np.int32)


def task_of(process=FLOW):
    model = DiTConfig(
        in_channels=4, input_size=SHAPE[:2], num_classes=CLASSES, width=16, depth=2, heads=2,
        patch=1, learn_variance=False, dtype=Dtype.float32,
    )  # fmt: skip
    cfg = DiffuseConfig(model=model, process=process)
    return cfg.build(RunConfig(task=cfg))


def variables(task, seed):
    """Random weights, none of them zero."""
    shapes, _ = jax.eval_shape(task.init, jax.random.key(0))
    gen = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.3 * gen.standard_normal(x.shape), jnp.float32), shapes
    )
    return Variables(params, {}, {"norm": Normalisation(jnp.asarray(SHIFT), jnp.asarray(SCALE))})


def mesh_of(count=1):
    return sharding.make_mesh(MeshConfig(), jax.devices()[:count])


def generator(task, sampler, guide=None, mesh=None, **more):
    return Generator(task, sampler, guide or GuidanceConfig(), mesh or mesh_of(), seed=SEED, **more)


def noise(stream):
    """What is promised: stream 0 is x at t = 1, k + 1 the noise of step k."""
    key = jax.random.fold_in(rng.key(SEED, 0, "samples"), stream)
    return np.stack([jax.random.normal(jax.random.fold_in(key, int(i)), SHAPE) for i in INDEX])


def latents(normal):
    return normal / SCALE + SHIFT


FIRST = noise(0)


# ------------------------------------------------------------------------- a network that says zero


def silent(process=FLOW):
    """A task whose network gives zero, as it does before its training, at once."""
    task = task_of(process)
    task.network = lambda variables, x, time, cond: jnp.zeros_like(x)
    return task


NOTHING = Variables({}, {}, {"norm": Normalisation(jnp.asarray(SHIFT), jnp.asarray(SCALE))})


@pytest.mark.parametrize(
    ("sampler", "calls"),
    [
        (EulerConfig(steps=4), 4),
        (HeunConfig(steps=3), 5),
        (DPM2MConfig(steps=5), 5),
        pytest.param(Dopri5Config(), None, marks=pytest.mark.slow),
    ],
)
def test_without_velocity_noise_stays_where_it_is(sampler, calls):
    """v = 0: every sampler of the flow ends in x at t = 1, brought back to latents."""
    drawn = generator(silent(), sampler).draw(NOTHING, LABELS, INDEX)
    # Some divide by t and multiply by it again: rounding, 1e-6 of values around 2.
    np.testing.assert_allclose(drawn.latents, latents(FIRST), rtol=1e-5, atol=1e-5)
    assert calls is None or drawn.evaluations.tolist() == [calls] * 4


def alphas():
    """sqrt of the cumulative product of 1 - beta at t = 0, 1/1000, ..., 1; UViT's betas."""
    beta = np.linspace(np.sqrt(0.00085), np.sqrt(0.012), 1000) ** 2
    return np.sqrt(np.concatenate([[1.0], np.cumprod(1 - beta)]))


@pytest.mark.parametrize(
    ("sampler", "end"),
    [(DDIMConfig(steps=3), 0), (DPMFastConfig(steps=6), 1)],
)
def test_without_noise_in_it_x_only_grows_by_alpha(sampler, end):
    """eps = 0: x / alpha is constant along the ODE of a variance-preserving process."""
    drawn = generator(silent(ProcessConfig()), sampler).draw(NOTHING, LABELS, INDEX)
    want = FIRST * (alphas()[end] / alphas()[1000])
    # exp of sums of float32 logarithms; values up to 40.
    np.testing.assert_allclose(drawn.latents, latents(want), rtol=3e-5, atol=1e-4)


def test_ancestral_steps_are_those_of_numpy():
    """eps = 0 again, each step written out in float64 with the noise that is promised."""
    task = silent(ProcessConfig())
    drawn = generator(task, AncestralConfig(), steps=4).draw(NOTHING, LABELS, INDEX)
    bar = alphas() ** 2
    knots = [1000, 667, 334, 1, 0]  # round(k 999 / 3) + 1, then data
    x = FIRST.astype(np.float64)
    for k, (t, s) in enumerate(itertools.pairwise(knots)):
        beta = 1 - bar[t] / bar[s]
        x0 = x / np.sqrt(bar[t])
        mean = (
            np.sqrt(bar[s]) * beta * x0 + np.sqrt(bar[t] / bar[s]) * (1 - bar[s]) * x
        ) / (1 - bar[t])  # fmt: skip
        x = mean + np.sqrt(beta * (1 - bar[s]) / (1 - bar[t])) * noise(k + 1) * (s > 0)
    # float32 against float64 over four steps; values up to 40.
    np.testing.assert_allclose(drawn.latents, latents(x), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------- guidance


def linear(seed):
    """(task, variables) of a network that mixes channels and adds a row for each class."""
    gen = np.random.default_rng(seed)
    net = {"mix": gen.normal(size=(4, 4)), "rows": gen.normal(size=(CLASSES + 1, 4))}
    task = task_of()
    task.network = lambda variables, x, time, cond: (
        x @ variables.params["net"]["mix"]
        + (variables.params["net"]["rows"][cond["label"]] + time[:, None])[:, None, None]
    )
    params = {"net": {k: jnp.asarray(v, jnp.float32) for k, v in net.items()}}
    return task, NOTHING._replace(params=params), net


def velocity(net, labels):
    """What that says of the noise, at t = 1: time 0 for the networks of flows."""
    return FIRST @ net["mix"] + net["rows"][labels][:, None, None]


@pytest.mark.parametrize(
    ("away", "scale"),
    [(Reference.null_class, 1.7), (Reference.weak_model, 1.7), (Reference.weak_model, 1.0)],
)
def test_guidance_is_the_formula_on_what_the_networks_say(away, scale):
    """One Euler step of the flow adds the velocity: reference + scale (conditional - reference)."""
    (task, weights, net), (weak_task, weak_weights, weak_net) = linear(1), linear(2)
    second = away is Reference.weak_model
    drawn = generator(
        task, EulerConfig(steps=1), GuidanceConfig(scale, away), weak=weak_task if second else None
    ).draw(weights, LABELS, INDEX, weak_weights if second else None)
    conditional = velocity(net, LABELS)
    reference = velocity(weak_net, LABELS) if second else velocity(net, [CLASSES] * 4)
    pushed = reference + scale * (conditional - reference)
    # float32 against float64; values up to 20.
    np.testing.assert_allclose(drawn.latents, latents(FIRST + pushed), rtol=1e-5, atol=3e-5)
    assert drawn.evaluations.tolist() == [1] * 4


# ------------------------------------------------------------------------- a sample is its index's


@pytest.mark.parametrize(
    ("process", "sampler"),
    [
        pytest.param(FLOW, EulerConfig(steps=2), id="euler"),
        pytest.param(FLOW, Dopri5Config(), id="dopri5", marks=pytest.mark.slow),
        pytest.param(ProcessConfig(), AncestralConfig(steps=6), id="ddpm", marks=pytest.mark.slow),
    ],
)
def test_the_same_samples_in_any_batch_on_any_mesh(process, sampler):
    """13 samples in batches of 8 over 8 devices, and of 5 on one, from the end; guided."""
    task = task_of(process)
    weights = variables(task, 1)
    label = np.arange(30, dtype=np.int32) % CLASSES
    found = []
    for count, size, whole in ((8, 8, False), (1, 5, True)):
        mesh = mesh_of(count)
        draws = generator(task, sampler, GuidanceConfig(2.0), mesh, whole=whole)
        index = np.arange(20, dtype=np.int32)[:: 1 if whole else -1]
        parts = [index[i : i + size] for i in range(0, len(index) - size + 1, size)]
        placed = jax.device_put(weights, sharding.replicated(mesh))
        drawn = {}
        for part in parts:
            batch = draws.draw(placed, label[part], part)
            assert whole or len(batch.latents.sharding.device_set) == count
            rows = zip(part, np.asarray(batch.latents), np.asarray(batch.evaluations), strict=True)
            drawn |= {int(i): (row, int(n)) for i, row, n in rows}
        found.append(drawn)
    common = sorted(found[0].keys() & found[1].keys())
    assert len(common) >= 13
    one, other = (np.stack([f[i][0] for i in common]) for f in found)
    # The promise; relative to the size of the latents, which is not that of trained ones.
    assert np.abs(one - other).max() <= 1e-4 * max(np.abs(one).max(), 1)
    assert len({row.tobytes() for row in one}) == len(common), "no two are equal"
    assert [found[0][i][1] for i in common] == [found[1][i][1] for i in common]
