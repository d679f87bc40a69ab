"""Promise 1 of masked autoencoders: numbers do not depend on mesh, microbatches, scan or remat."""

import itertools

import jax
import masks
import numpy as np
import pytest
import tiny
from tiny import error

from dcae_jax import sharding, tree
from dcae_jax.models.transformer import Remat

# (data, fsdp, spatial, zero1); transformers have no spatial axis.
MESHES = [(8, 1, 1, True), (1, 8, 1, False), (2, 4, 1, True)]
LAYERS = [(True, Remat.none), (False, Remat.none), (True, Remat.full), (True, Remat.dots)]

# That of the autoencoder's promise: f32 sums in another order; measured 1e-7 to 4e-7.
TOLERANCE = 1e-6

# One program, since each takes long to compile: mesh, microbatches, recomputation.
COVER = [(MESHES[2], 4, LAYERS[2])]
PRODUCT = list(itertools.product(MESHES, (1, 4), LAYERS))


@pytest.fixture(autouse=True)
def _shard_small_leaves(monkeypatch):
    """The tiny model has only leaves that would be replicated."""
    monkeypatch.setattr(sharding, "SMALL", 64)


def trainer(mesh=(1, 1, 1, False), microbatches=1, layers=LAYERS[0], devices=1):
    cfg = tiny.with_mesh(masks.make(cached=False, batch=32, evals=[]), *mesh)
    cfg.microbatches = microbatches
    cfg.task.model.scan, cfg.task.model.remat = layers
    found = tiny.Trainer(cfg, devices)
    # The biases start at 0.
    gen, flat = np.random.default_rng(0), jax.device_get(tree.flatten(found.state.params))
    found.replace_params(
        {k: v + gen.normal(0, 0.1, v.shape).astype(np.float32) for k, v in flat.items()}
    )
    return found


_reference = []


def reference():
    if not _reference:
        _reference.append(trainer().sgd())
    return _reference[0]


def check(mesh, microbatches, layers):
    metrics, grads, params = reference()
    found, found_grads, found_params = trainer(mesh, microbatches, layers, devices=8).sgd()
    assert found.keys() == metrics.keys() == {"loss", "mask_ratio", "latent_ms"}
    for name in metrics:
        np.testing.assert_allclose(found[name], metrics[name], rtol=TOLERANCE, atol=1e-7)
    assert error(found_grads, grads) <= TOLERANCE
    assert error(found_params, params) <= TOLERANCE
    assert min(np.abs(g).max() for g in jax.tree.leaves(grads)) > 0, "nothing is left out"


@pytest.mark.parametrize(("mesh", "microbatches", "layers"), COVER)
def test_promise_1_masks_cover(mesh, microbatches, layers):
    check(mesh, microbatches, layers)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "microbatches", "layers"), PRODUCT)
def test_promise_1_masks_product(mesh, microbatches, layers):
    check(mesh, microbatches, layers)
