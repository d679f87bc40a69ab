"""The evaluator of masked tokens: its scores against numpy, exact counts, fixed masks, mistakes."""

import diffusing
import jax
import jax.numpy as jnp
import masks
import numpy as np
import pytest

from dcae_jax import masking, rng, sharding, step
from dcae_jax.config import MeshConfig
from dcae_jax.data.latents import LatentDataConfig
from dcae_jax.errors import UserError
from dcae_jax.evals.masked import MaskedConfig
from dcae_jax.models.transformer import patchify
from dcae_jax.tasks.base import Variables


def evaluator(cfg=None, task=None, devices=1, **fields):
    cfg = cfg or masks.make()
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    made = MaskedConfig(
        **{"data": LatentDataConfig(path=cfg.data.path, split="test"), "n": 10, **fields}
    )
    made.resolve(cfg)
    assert made.problems() == []
    return made.build(cfg, task or cfg.task.build(cfg), mesh), mesh


def scores(fill, **fields):
    """What it says of a task that fills so; parameters are not asked for."""
    cfg = masks.make()
    task = cfg.task.build(cfg)
    task.fill = fill
    found, mesh = evaluator(cfg, task, **fields)
    state = step.TrainState(jnp.int32(0), {}, {}, {"0.9": {"params": {}, "stats": {}}}, {})
    with jax.set_mesh(mesh):
        constants = jax.device_put(task.constants(training=False), sharding.replicated(mesh))
        return found.run(state, constants, lambda: None).scalars


def held_out():
    """The ten normalised latents of the evaluation, as tokens."""
    cfg = masks.make()
    with LatentDataConfig(path=cfg.data.path, split="test").eval_batches(batch=10, n=10) as batches:
        latent = next(batches)["latent"]
    norm = cfg.task.build(cfg).constants(training=False)["norm"]
    return np.asarray(patchify(norm.apply(jnp.asarray(latent)), 1), np.float64)


def order_of(index, seed=0):
    """The tokens of one latent, visible ones first."""
    key = rng.key(seed, 0, "masked")
    return np.asarray(masking.indexed_order(key, jnp.asarray([index]), 4, 4)[0])


def perfect(variables, x, order, keep, label):
    return x


def nothing(variables, x, order, keep, label):
    """0 at every masked token."""
    hidden = masking.split(order, keep).masked().reshape(-1, 4, 4, 1)
    return jnp.where(hidden, 0.0, x)


def test_a_perfect_network_has_no_error():
    found = scores(perfect)
    assert found["n"] == 10
    for ratio in ("0.15", "0.40", "0.50", "0.75"):
        assert found[f"mse_r{ratio}"] == 0 and found[f"r2_r{ratio}"] == 1


def test_scores_are_those_of_numpy():
    """Of a network that says 0; the guess that does not look is the mean token of the ten."""
    found, x = scores(nothing, ratios=(0.15, 0.75), batch=4), held_out()
    mean = x.mean((0, 1))
    for ratio, keep in ((0.15, 13), (0.75, 4)):
        hidden = np.concatenate([x[i, order_of(i)[keep:]] for i in range(10)])
        assert hidden.shape == (10 * (16 - keep), 4)
        # float32 sums on the device, of numbers near 1
        assert found[f"mse_r{ratio:.2f}"] == pytest.approx((hidden**2).mean(), rel=1e-5)
        spread = ((hidden - mean) ** 2).mean()
        want = 1 - (hidden**2).mean() / spread
        assert found[f"r2_r{ratio:.2f}"] == pytest.approx(want, abs=1e-5)


def test_scores_depend_neither_on_batches_nor_on_devices():
    one = scores(nothing, batch=16)
    for batch, devices in ((3, 1), (8, 8)):
        many = scores(nothing, batch=batch, devices=devices)
        assert many.keys() == one.keys() and many["n"] == 10
        # the same numbers in sums of another order
        np.testing.assert_allclose(list(many.values()), list(one.values()), rtol=1e-5, atol=1e-6)


def test_masks_are_those_of_the_evaluators_seed_alone():
    a, b = (evaluator(masks.make(seed=seed))[0]._key for seed in (0, 7))
    orders = [np.asarray(masking.indexed_order(key, jnp.asarray([3]), 4, 4)[0]) for key in (a, b)]
    np.testing.assert_array_equal(*orders)
    np.testing.assert_array_equal(orders[0], order_of(3))
    assert (order_of(3, seed=1) != order_of(3)).any() and (order_of(4) != order_of(3)).any()
    other = evaluator(masks.make(), seed=1)[0]._key
    found = masking.indexed_order(other, jnp.asarray([3]), 4, 4)[0]
    np.testing.assert_array_equal(found, order_of(3, seed=1))


def test_whitened_tokens_are_scored_as_the_loss_has_them():
    cfg = masks.make(**{"task.norm_target": True})
    task = cfg.task.build(cfg)
    task.network = lambda variables, x, split: jnp.zeros((x.shape[0], 16, 4))
    found, _ = evaluator(cfg, task, ratios=(0.5,))
    x = held_out()[:4].reshape(4, 4, 4, 4).astype(np.float32)
    norm = task.constants(training=False)["norm"]
    batch = {"latent": norm.invert(jnp.asarray(x)), "label": jnp.zeros(4, jnp.int32),
             "mask": jnp.array([1.0, 1.0, 1.0, 0.0])}  # fmt: skip
    sums = found._sums(Variables({}, {}, {"norm": norm}), batch, jnp.int32(0))
    tokens = x.reshape(4, 16, 4).astype(np.float64)
    spread = tokens.std(-1, keepdims=True, ddof=1)
    white = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(spread**2 + 1e-6)
    hidden = np.concatenate([white[i, order_of(i)[8:]] for i in range(3)])
    assert sums["n"] == 3
    np.testing.assert_allclose(sums["ratios"][0]["wrong"], (hidden**2).mean(-1).sum(), rtol=1e-4)


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"leaves none of 16 tokens visible; .* is 0\.937"):
        evaluator(ratios=(0.99,))
    assert evaluator(ratios=(0.01, 0.93))[0]._keeps == [15, 1]
    diffusion = diffusing.make(evals=[])
    with pytest.raises(UserError, match="asks for masked tokens, and the task of this run"):
        evaluator(diffusion)
    bad = MaskedConfig(name="m", ratios=(0.5, 1.0), n=0)
    assert len(bad.problems()) == 2 and "between 0 and 1" in bad.problems()[1]
    assert MaskedConfig(ratios=(0.4,)).metrics() == ("mse_r0.40", "r2_r0.40", "n")
