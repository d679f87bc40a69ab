"""The reconstruction evaluator: the PSNR with the first channels of the latents alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny

from dcae_jax import sharding
from dcae_jax.evals.reconstruct import METRICS
from dcae_jax.tasks.autoencode import to_float


def scores(counts, n=5):
    """(scores of n images in batches of two, the task, its weights, the evaluator)."""
    cfg = runs.make_config("phase1")
    (evaluator,) = cfg.evals
    evaluator.n, evaluator.pictures, evaluator.training_pictures = n, 0, 0
    evaluator.channel_counts = counts
    trainer = tiny.Trainer(cfg)
    made = evaluator.build(cfg, trainer.task, sharding.make_mesh(cfg.mesh, jax.devices()[:1]))
    with jax.set_mesh(trainer.mesh):
        found = made.run(trainer.state, {}, lambda: None).scalars
    return found, trainer, evaluator


@pytest.fixture(scope="module")
def scored():
    return scores((1, 3, 4))


def test_psnr_with_the_first_channels_against_numpy(scored):
    found, trainer, evaluator = scored
    assert tuple(found) == evaluator.metrics() == (*METRICS, "psnr_c1", "psnr_c3", "psnr_c4")
    with evaluator.data.eval_batches(batch=5, n=5) as batches:
        images = next(iter(batches))["image"]
    model = trainer.task.model
    weights = {"params": trainer.state.ema["0.9"]["params"]["ae"]}
    latent = np.array(model.apply(weights, to_float(jnp.asarray(images)), method="encode"))
    for count in (1, 3, 4):
        cut = latent.copy()
        cut[..., count:] = 0
        y = np.asarray(model.apply(weights, jnp.asarray(cut), method="decode"), np.float64)
        pixels = np.clip(np.floor(127.5 * (y + 1) + 0.5), 0, 255)
        mse = ((pixels - images) ** 2).mean((1, 2, 3))
        expected = (10 * np.log10(255**2 / mse)).mean()
        # A pixel within rounding of a half may fall to the other side: 1e-4 dB at most.
        assert found[f"psnr_c{count}"] == pytest.approx(expected, abs=1e-3)
    assert found["psnr_c4"] == found["psnr"] and found["psnr_c1"] != found["psnr_c3"]


def test_without_counts_the_scores_are_those_of_before(scored):
    found, _, evaluator = scores(())
    assert tuple(found) == evaluator.metrics() == METRICS
    for name in METRICS:  # two programs: a pixel's reconstruction may round otherwise
        assert found[name] == pytest.approx(scored[0][name], rel=1e-6), name
